"""Chooses the number of workers of each attempt: `cluster.workers: {min: 2, max: 8}`. Runs on the head (the driver).

Ray Train has an elastic mode of its own (ray 2.60, train/v2/_internal/execution/scaling_policy). It is not used: right
after a loss it starts a group of the old size, because its view of the nodes is up to 20 s old, and then resizes to and
fro. Here each attempt asks the nodes itself and leaves out those that drain; a run grows only when two polls in a row
have seen the capacity.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.driver.signals import interruptible_sleep
from launcher.driver.worker_group import max_workers_available
from launcher.errors import ClusterError
from launcher.spec.job import JobSpec

# Each poll opens a connection to every node.
_POLL_S = 10.0
_MAX_WAIT_S = 1800.0
"""Time for nodes to restart, or for an autoscaler to add them."""
_POLLS_BEFORE_GROWING = 2
"""Capacity that another job gives back for a moment is no reason to restart."""


def with_workers(job: JobSpec, workers: int) -> JobSpec:
    """Return the job with another number of workers."""
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"workers": workers})})


class ScalingPolicy:
    """Number of workers of a run, attempt by attempt (the counterpart of Ray Train V2's `ScalingPolicy`).

    Args:
        job: Job as the user gave it: the smallest and the largest number of workers.
    """

    def __init__(self, job: JobSpec) -> None:
        self._job = job
        self.resize_requested = False
        """True if the last attempt was stopped because the cluster can hold more workers."""

    def next_workers(self, log: Callable[[str], None]) -> int:
        """Return the number of workers that the cluster can hold now; wait until it can hold the minimum.

        Args:
            log: Function that shows one sentence if the method has to wait.

        Raises:
            ClusterError: The cluster cannot hold the minimum after half an hour.
            RunInterrupted: A signal arrived during the wait.
        """
        cluster = self._job.cluster
        # A fixed number is not probed: Ray Train itself waits for the nodes (`_no_retries` in worker_group.py).
        if cluster.min_workers is None:
            return cluster.workers
        deadline = time.monotonic() + _MAX_WAIT_S
        is_waiting = False
        available = max_workers_available(self._job)
        while available < cluster.min_workers:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cluster.workers: the cluster can hold {available} workers, and at least {cluster.min_workers} "
                    "are needed; add nodes, or lower min"
                )
            if not is_waiting:
                log(f"the cluster can hold {available} workers; waiting until it can hold {cluster.min_workers}")
                is_waiting = True
            interruptible_sleep(_POLL_S, "interrupted while waiting for nodes; run the same command again to resume")
            available = max_workers_available(self._job)
        return min(available, cluster.workers)

    @contextmanager
    def watch_capacity(self, job: JobSpec, request_restart: Callable[[], None]) -> Iterator[None]:
        """Watch the cluster during an attempt, and stop the attempt when the run can grow.

        Args:
            job: Job with the number of workers of this attempt.
            request_restart: Function that asks the workers to save a checkpoint and exit.
        """
        self.resize_requested = False
        if self._job.cluster.min_workers is None or job.cluster.workers >= self._job.cluster.workers:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._poll, args=(job.cluster.workers, request_restart, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            # Joined below: a late poll must not stop the next attempt.
            stop.set()
            thread.join()

    def _poll(self, workers: int, request_restart: Callable[[], None], stop: threading.Event) -> None:
        polls_with_capacity = 0
        while not stop.wait(_POLL_S):
            polls_with_capacity = polls_with_capacity + 1 if max_workers_available(self._job) > workers else 0
            if polls_with_capacity >= _POLLS_BEFORE_GROWING:
                # Before the request: the workers may exit at once, and the controller then asks for the reason.
                self.resize_requested = True
                request_restart()
                return
