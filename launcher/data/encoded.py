"""Shares without Ray Data, in the train worker itself, from rows that are encoded once. For sweeps; train workers.

A trial of a sweep reads the rows that all its predecessors in the same process have read. They stay encoded in memory
(up to a limit; rows that are augmented are encoded anew), and a thread lays out the next window while one is trained.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa

from launcher.data.order import Ids
from launcher.data.sources import Split
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN, Window
from launcher.tasks.base import Encoded, Task

# Encoded bytes of a split that may stay in the memory of each worker.
_KEPT_BYTES = 1 << 30
_ROWS_AT_ONCE = 4096


class KeptSource(StreamSource):
    """A `StreamSource` whose rows stay encoded from window to window and from trial to trial."""

    def encode(self, task: Task, window: Window, ids: Ids) -> Encoded:
        """As its base does, from memory where that is possible."""
        split = self.splits[window.kind]
        kept = None
        if not (task.augments and window.kind == TRAIN):
            said = self.job.model_dump_json(include={"task": True, "model": {"name", "revision", "from_config"}})
            kept = _kept(_Key(said, split.name, split.fingerprint, split, task))
        return super().encode(task, window, ids) if kept is None else kept.take(ids)


@dataclass(frozen=True)
class _Key:
    """Equal where rows are encoded alike."""

    said: str
    name: str
    fingerprint: str
    split: Split = field(compare=False)
    task: Task = field(compare=False)


@dataclass(frozen=True)
class _Kept:
    """A whole split, encoded."""

    samples: pa.Table
    lengths: Ids
    weights: np.ndarray
    place: Ids
    """(rows,) position of each row among the samples; -1 where it cannot be used."""
    reasons: dict[int, str]

    def take(self, ids: Ids) -> Encoded:
        """The given rows, as `Task.encode` gives them."""
        places = self.place[ids]
        kept = np.flatnonzero(places >= 0)
        chosen = places[kept]
        problems = tuple((int(i), self.reasons[int(ids[i])]) for i in np.flatnonzero(places < 0))
        return Encoded(self.samples.take(pa.array(chosen)), kept, self.lengths[chosen], self.weights[chosen], problems)


@lru_cache(maxsize=4)
def _kept(key: _Key) -> _Kept | None:
    """A split in memory; None if it is too large for that."""
    task, split = key.task, key.split
    parts: list[Encoded] = []
    place = np.full(split.rows, -1, np.int64)
    reasons: dict[int, str] = {}
    found = 0
    for begin in range(0, split.rows, _ROWS_AT_ONCE):
        ids = np.arange(begin, min(begin + _ROWS_AT_ONCE, split.rows), dtype=np.int64)
        part = task.encode(split.read(ids, task.input_columns + task.target_columns), True)
        place[begin + part.kept] = found + np.arange(len(part.kept))
        reasons |= {begin + position: reason for position, reason in part.problems}
        found += len(part.kept)
        parts.append(part)
        if part.samples.nbytes / len(ids) * split.rows > _KEPT_BYTES:
            return None
    return _Kept(
        pa.concat_tables([part.samples for part in parts], promote_options="permissive").combine_chunks(),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.weights for part in parts]),
        place,
        reasons,
    )


def cells(source: StreamSource, windows: list[Window], rank: int) -> Iterator[pa.Buffer]:
    """The packed shares of one worker, window after window; the next one is laid out meanwhile."""
    with ThreadPoolExecutor(1, "windows") as thread:
        coming = None
        for window in windows:
            following = thread.submit(_share, source, window, rank)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _share(source: StreamSource, window: Window, rank: int) -> pa.Buffer:
    (share,) = source.shares(window, [rank])
    return pa.py_buffer(share)
