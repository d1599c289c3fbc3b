"""How many workers a run starts with: `cluster.workers: {min: 2, max: 8}`. Runs on the head (the driver).

Ray Train's own elastic mode starts a group of the old size right after a loss and resizes to and fro (its view of the
nodes is up to twenty seconds old); here each start looks at the nodes itself, those that drain left out, and a run
grows only when the room has stood for two looks in a row.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.driver.signals import interruptible_sleep
from launcher.driver.worker_group import max_workers_available
from launcher.errors import ClusterError
from launcher.spec.job import JobSpec

_LOOK_S = 10.0
_WAIT_S = 1800.0
"""For nodes that come back, or that an autoscaler brings."""


def with_workers(job: JobSpec, workers: int) -> JobSpec:
    """The job with this number of workers."""
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"workers": workers})})


class ScalingPolicy:
    """The number of workers of one run, start by start.

    Args:
        job: says how few and how many.
    """

    def __init__(self, job: JobSpec) -> None:
        self._job = job
        self.has_grown = False
        """Whether the last start ended because there is room for more."""

    def next_workers(self, say: Callable[[str], None]) -> int:
        """As many as there is room for now; waits for the fewest.

        Raises:
            ClusterError: there is not even room for those.
            RunInterrupted: somebody did not want to wait.
        """
        cluster = self._job.cluster
        if cluster.min_workers is None:
            return cluster.workers
        until, told = time.monotonic() + _WAIT_S, False
        while (room := max_workers_available(self._job)) < cluster.min_workers:
            if time.monotonic() > until:
                raise ClusterError(
                    f"cluster.workers: there is room for {room} workers, and at least {cluster.min_workers} are "
                    "wanted; add nodes, or lower min"
                )
            if not told:
                say(f"room for {room} workers, waiting for {cluster.min_workers}")
                told = True
            interruptible_sleep(_LOOK_S, "interrupted while waiting for nodes; the same command goes on")
        return min(room, cluster.workers)

    @contextmanager
    def watch_capacity(self, job: JobSpec, leave: Callable[[], None]) -> Iterator[None]:
        """Look for room for more workers while a start is under way.

        Args:
            job: as it was started.
            leave: asks its workers to save a checkpoint and end.
        """
        self.has_grown = False
        if self._job.cluster.min_workers is None or job.cluster.workers >= self._job.cluster.workers:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._look, args=(job.cluster.workers, leave, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _look(self, workers: int, leave: Callable[[], None], stop: threading.Event) -> None:
        more = 0
        while not stop.wait(_LOOK_S):
            more = more + 1 if max_workers_available(self._job) > workers else 0
            if more >= 2:
                self.has_grown = True
                leave()
                return
