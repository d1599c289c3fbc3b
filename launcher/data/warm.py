"""A data worker that has imported and loaded what it needs by the time the first window is due. Runs on the head.

Ray keeps the process of a task that ended for the next one: while train workers start, which takes longer, a task
encodes a few rows, and the first window finds its process ready.
"""

from contextlib import suppress

import numpy as np
import ray

from launcher.data.in_memory import can_read_in_workers
from launcher.data.ray_data import TASK_CPUS
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN
from launcher.errors import LauncherError

_ROWS = 8
# A process serves the next task of the same environment alone, and Ray Data adds this to that of its own tasks.
_AS_RAY_DATA = {"env_vars": {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}}


def warm_up(source: StreamSource) -> None:
    """Start it, if there will be data workers; nobody waits for it."""
    if can_read_in_workers(source.job, source.splits):
        return
    _encode_some.options(runtime_env=_AS_RAY_DATA).remote(source)


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)
def _encode_some(source: StreamSource) -> None:
    with suppress(LauncherError):  # what is wrong here is wrong with the first window
        task, split = source.task(scored=False), source.splits[TRAIN]
        ids = np.arange(min(_ROWS, split.rows), dtype=np.int64)
        task.encode(split.read(ids, task.input_columns + task.target_columns), True)
