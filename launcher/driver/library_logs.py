"""Filter for lines of Ray that the launcher reports better itself. Runs on the head.

Ray prints them whatever `log_to_driver` is (ray 2.60, _private/worker.py, listen_error_messages), and has no public
filter. All other lines pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ray._private.worker as worker

_SILENCED = (
    # At every start on a machine with fewer cores than Ray has processes.
    "worker processes have been started on node",
    # Ids and a list of common causes; `ray_errors.py` names rank and host.
    "A worker died or was killed while executing a task",
)
_Print = Callable[[Mapping[str, Any], bool], None]


def silence_ray_messages() -> None:
    """Drop such lines from now on, in this process. May be called again."""
    inner = worker.print_to_stdstream
    # A process may open several Ray sessions; filters must not be nested.
    if not isinstance(inner, _Filter):
        # Monkeypatch (see the module). Ray looks the function up at every message, so this takes effect at once.
        worker.print_to_stdstream = _Filter(inner)


class _Filter:
    def __init__(self, inner: _Print) -> None:
        self._inner = inner

    def __call__(self, data: Mapping[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not any(text in line for text in _SILENCED)]
        if lines:
            self._inner({**data, "lines": lines}, ignore_prefix)
