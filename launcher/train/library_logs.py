"""What Ray's own processes print into a command's output, where the launcher says it better. Runs on the head.

Ray prints it whatever `log_to_driver` says (ray 2.60, `_private/worker.py`, listen_error_messages). What is not known
here passes: it may be all that there is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ray._private.worker as worker

_SAID_BETTER = (
    # Every start on a machine with fewer cores than Ray's processes.
    "worker processes have been started on node",
    # Ids and a list of usual causes, where `driver/ray_errors.py` names rank and host.
    "A worker died or was killed while executing a task",
)
_Print = Callable[[Mapping[str, Any], bool], None]


def silence_ray_messages() -> None:
    """Leave such lines out from now on, in this process."""
    given = worker.print_to_stdstream
    if not isinstance(given, _Hushed):
        worker.print_to_stdstream = _Hushed(given)


class _Hushed:
    def __init__(self, given: _Print) -> None:
        self._given = given

    def __call__(self, data: Mapping[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not any(known in line for known in _SAID_BETTER)]
        if lines:
            self._given({**data, "lines": lines}, ignore_prefix)
