"""Hands parts to workers until all are there; replaces workers that die. Runs on the head (the driver).

Plain Ray actors, not Ray Data: what is missing is a list of part numbers, so going on is leaving out those that exist,
and the driver holds a number per part and a few per worker, whatever the input's size. Ray Data would move every row
through the object store, keep metadata of every block, and know nothing of what an earlier execution wrote.
"""

import threading
from dataclasses import dataclass
from typing import Any  # handles of actors, whose methods Ray makes at run time

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from launcher.driver.prediction_progress import PredictionProgress
from launcher.errors import RunInterrupted, TrainingError
from launcher.predict.output import Part, remove_unfinished
from launcher.predict.parts import PartQueue
from launcher.predict.worker import PredictionConfig, Predictor

_WAIT_S = 0.5
# A part that takes its worker down as often is not to be had by trying.
_TRIES = 3
# The ways in which a worker is gone, as opposed to an error that it raised.
_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


@dataclass
class _Worker:
    """An actor, and what it was asked for last."""

    actor: Any
    loading: "ray.ObjectRef[None] | None" = None
    stream: "ray.ObjectRefGenerator[int | Part] | None" = None
    said: "int | Part" = 0
    """What the stream said last: rows of its part that are done, or the whole part."""


class PredictionDriver:
    """One command's workers.

    Args:
        order: what they share.
        turns: which parts are missing.
        view: shows how far it is.
        found: sum over the parts that are there already.
    """

    def __init__(self, order: PredictionConfig, turns: PartQueue, view: PredictionProgress, found: Part) -> None:
        self._order, self._turns, self._view = order, turns, view
        self._shared = ray.put(order)
        self._workers: dict[int, _Worker] = {}
        self._started = self._false_starts = 0
        self._stop = threading.Event()
        self.parts = found
        """Sum over the parts that are there."""

    def ask_stop(self) -> bool:
        """Stop soon; what is written is kept."""
        self._stop.set()
        return True

    def run(self) -> None:
        """Predict what is missing.

        Raises:
            RunInterrupted: `ask_stop` was called.
            TrainingError: workers die again and again.
            RayError: around what a worker raised.
        """
        cluster = self._order.job.cluster
        try:
            for _ in range(min(cluster.workers, self._turns.left)):
                self._start()
            while self._turns.left:
                if self._stop.is_set():
                    raise RunInterrupted(
                        f"interrupted; {self.parts.rows} of {self._order.layout.rows} rows are in "
                        f"{self._order.output.uri}, and the same command goes on"
                    )
                self._turn()
        finally:
            for worker in self._workers.values():
                ray.kill(worker.actor)
            remove_unfinished(self._order.output)

    def _turn(self) -> None:
        """Give work to who has none, and hear one who has something to say."""
        for key, worker in self._workers.items():
            if worker.loading is None and worker.stream is None:
                self._give(key, worker)
        asked = {id(about): (key, about) for key, w in self._workers.items() if (about := w.loading or w.stream)}
        ready, _ = ray.wait([about for _, about in asked.values()], timeout=_WAIT_S)
        for about in ready:
            key, _ = asked[id(about)]
            try:
                self._hear(key, self._workers[key])
            except _GONE as error:
                self._replace(key, error)
        self._view.show(self.parts.rows + sum(_partial(w) for w in self._workers.values()), self._at_work())

    def _at_work(self) -> int:
        return sum(worker.loading is None for worker in self._workers.values())

    def _start(self) -> None:
        cluster = self._order.job.cluster
        options = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker or None}
        actor: Any = ray.remote(Predictor).options(**options).remote(self._shared)
        self._workers[self._started] = _Worker(actor, actor.load.remote())
        self._started += 1

    def _give(self, key: int, worker: _Worker) -> None:
        turn = self._turns.take(key)
        if turn is not None:
            worker.stream, worker.said = worker.actor.predict.remote(*turn), 0

    def _hear(self, key: int, worker: _Worker) -> None:
        if worker.loading is not None:
            ray.get(worker.loading)
            worker.loading, self._false_starts = None, 0
            return
        assert worker.stream is not None
        answer = next(worker.stream, None)
        if answer is not None:
            worker.said = ray.get(answer)
            return
        assert isinstance(worker.said, Part)  # the last word of every stream that ends by itself
        self._turns.done(key)
        self.parts += worker.said
        worker.stream, worker.said = None, 0

    def _replace(self, key: int, error: Exception) -> None:
        worker = self._workers.pop(key)
        ray.kill(worker.actor)
        reason = " ".join(str(error).split())[:300]
        lost = self._turns.lost(key)
        if worker.loading is not None:
            self._false_starts += 1
        if self._false_starts >= _TRIES:
            raise TrainingError(
                f"workers died {_TRIES} times in a row while they loaded the model ({reason}); give them more memory"
            )
        if lost is not None and lost[1] >= _TRIES:
            rows = self._order.layout.part(lost[0])
            file, row = self._order.split.locate(rows.start)
            raise TrainingError(
                f"part {lost[0]} ({len(rows)} rows from {file}: row {row}) took its worker down {_TRIES} times "
                f"({reason}); a smaller evaluation.batch_size takes less memory, and the same command goes on"
            )
        self._start()


def _partial(worker: _Worker) -> int:
    return worker.said.rows if isinstance(worker.said, Part) else worker.said
