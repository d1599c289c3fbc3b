"""Assigns parts to workers until all are written, and replaces workers that die. Runs on the head (the driver).

Plain Ray actors, not Ray Data: the work is a list of part numbers, so resuming means leaving out those that exist, and
the driver holds one number per part whatever the size of the input. Ray Data would move every row through the object
store, keep metadata of every block, and know nothing of what an earlier command wrote. Read `worker.py` next.
"""

import threading
from dataclasses import dataclass
from typing import Any  # handles of actors, whose methods Ray makes at run time

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from launcher.driver.progress import PredictionProgress
from launcher.errors import RunInterrupted, TrainingError
from launcher.predict.output import Part, remove_unfinished
from launcher.predict.parts import PartQueue
from launcher.predict.worker import PredictionConfig, Predictor

_POLL_S = 0.5
# A part that has killed as many workers is not tried again.
_MAX_DEATHS = 3
# Errors of a worker that died, as opposed to one that it raised.
_DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


@dataclass
class _Worker:
    """An actor and the call that it is working on."""

    actor: Any
    loading: "ray.ObjectRef[None] | None" = None
    stream: "ray.ObjectRefGenerator[int | Part] | None" = None
    progress: "int | Part" = 0
    """Last answer of the stream: number of rows of its part that are done, or the whole part."""

    @property
    def pending(self) -> "ray.ObjectRef[None] | ray.ObjectRefGenerator[int | Part] | None":
        return self.loading or self.stream

    @property
    def rows_done(self) -> int:
        return self.progress.rows if isinstance(self.progress, Part) else self.progress


class PredictionDriver:
    """Workers of one command.

    Args:
        config: Settings that all workers share.
        queue: Parts that are missing.
        view: Progress on the console.
        existing: Sums over the parts that an earlier command has written.
    """

    def __init__(self, config: PredictionConfig, queue: PartQueue, view: PredictionProgress, existing: Part) -> None:
        self._config, self._queue, self._view = config, queue, view
        # Once, not with each actor: the split of 100,000 files takes megabytes.
        self._config_ref = ray.put(config)
        self._workers: dict[int, _Worker] = {}
        self._next_key = 0
        self._load_failures = 0
        # Set by the thread that handles signals, while `run` polls in another one.
        self._stop = threading.Event()
        self.parts = existing
        """Sums over the parts that are written."""

    def request_stop(self) -> bool:
        """Stop within a second; written parts are kept."""
        self._stop.set()
        return True

    def run(self) -> None:
        """Predict the missing parts.

        Raises:
            RunInterrupted: `request_stop` was called.
            TrainingError: Workers died again and again.
            RayError: A worker raised an error; it is wrapped inside.
        """
        try:
            # A command that resumes near its end may have fewer parts than workers; a worker without a part would load
            # a model for nothing.
            for _ in range(min(self._config.job.cluster.workers, self._queue.left)):
                self._start_worker()
            while self._queue.left:
                if self._stop.is_set():
                    raise RunInterrupted(
                        f"interrupted; {self.parts.rows} of {self._config.layout.rows} rows are in "
                        f"{self._config.output.uri}; run the same command again to resume"
                    )
                self._poll()
        finally:
            # Kill, do not wait: what is written is safe under its name, and a part at hand is predicted again.
            for worker in self._workers.values():
                ray.kill(worker.actor)
            # After the kill: a worker that still writes would have its file removed under it.
            remove_unfinished(self._config.output)

    def _poll(self) -> None:
        """Give idle workers a part, and handle the answers that have arrived."""
        for key, worker in self._workers.items():
            # Before the wait, so that an answer of the last round is followed by a new part without a pause.
            if worker.pending is None:
                self._assign(key, worker)
        # `ray.wait` returns the very objects that it was given, so their ids lead back to the workers.
        pending = {id(w.pending): (key, w.pending) for key, w in self._workers.items() if w.pending is not None}
        # Returns with the first answer: no worker waits until another one is done. The timeout is the delay of a stop.
        ready, _ = ray.wait([ref for _, ref in pending.values()], timeout=_POLL_S)
        for ref in ready:
            key, _ = pending[id(ref)]
            try:
                self._handle_answer(key, self._workers[key])
            except _DEATHS as error:
                self._replace(key, error)
        workers = self._workers.values()
        rows = self.parts.rows + sum(worker.rows_done for worker in workers)
        self._view.show(rows, sum(worker.loading is None for worker in workers))

    def _start_worker(self) -> None:
        cluster = self._config.job.cluster
        options = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker or None}
        actor: Any = ray.remote(Predictor).options(**options).remote(self._config_ref)
        # Keys are never used twice, so that the queue cannot take a new worker for the dead one before it.
        self._workers[self._next_key] = _Worker(actor, actor.load.remote())
        self._next_key += 1

    def _assign(self, key: int, worker: _Worker) -> None:
        assignment = self._queue.take(key)
        if assignment is not None:
            worker.stream = worker.actor.predict.remote(*assignment)
            worker.progress = 0

    def _handle_answer(self, key: int, worker: _Worker) -> None:
        if worker.loading is not None:
            ray.get(worker.loading)
            worker.loading = None
            self._load_failures = 0
            return
        assert worker.stream is not None
        # The wait said that an answer is there, so this does not block; a worker's error is raised by `ray.get`.
        answer = next(worker.stream, None)
        if answer is not None:
            worker.progress = ray.get(answer)
            return
        assert isinstance(worker.progress, Part)  # the last answer of every stream that ends without an error
        # Only now, after the last answer: the worker sends it once the part has its final name.
        self._queue.mark_written(key)
        self.parts += worker.progress
        worker.stream = None
        worker.progress = 0

    def _replace(self, key: int, error: Exception) -> None:
        worker = self._workers.pop(key)
        ray.kill(worker.actor)
        reason = " ".join(str(error).split())[:300]
        lost = self._queue.requeue(key)
        if worker.loading is not None:
            # Counted apart from parts: a model that does not fit kills every worker, and none of them ever takes a
            # part.
            self._load_failures += 1
        if self._load_failures >= _MAX_DEATHS:
            raise TrainingError(
                f"workers died {_MAX_DEATHS} times in a row while they loaded the model ({reason}); give them more "
                "memory"
            )
        if lost is not None and lost[1] >= _MAX_DEATHS:
            rows = self._config.layout.part(lost[0])
            file, row = self._config.split.locate(rows.start)
            raise TrainingError(
                f"part {lost[0]} ({len(rows)} rows from {file}: row {row}) killed its worker {_MAX_DEATHS} times "
                f"({reason}); set a smaller evaluation.batch_size, which takes less memory, and run the same command "
                "again"
            )
        self._start_worker()
