"""Shares without Ray Data, in the train worker itself: of small data, and for the trials of a sweep. Train workers.

The stream is the same. A thread lays out the next window while one is trained. A trial of a sweep reads the rows that
all its predecessors in the same process have read: they stay encoded in memory (up to a limit; rows that are augmented
are encoded anew).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa

from launcher.data.blocks import Block
from launcher.data.encoded_cache import encoding_of
from launcher.data.sampler import RowIds
from launcher.data.splits import Split
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN, Window
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Encoded, Task

# Encoded bytes of a split that may stay in the memory of each worker.
_KEPT_BYTES = 1 << 30
_ROWS_AT_ONCE = 4096


# Each worker encodes all rows of a window, as its batches depend on their lengths. Of so little data this costs less
# than Ray Data's four processes, which start one after another; a GPU would wait for it.
_SMALL_BYTES, _FEW_WORKERS = 32 << 20, 4


def can_read_in_workers(job: JobSpec, splits: Mapping[str, Split]) -> bool:
    """Return whether train workers read and encode for themselves, not Ray Data for them.

    Args:
        job: The resolved job; `cluster.data_workers` decides, or leaves it to the size of the data.
        splits: Those that are streamed.
    """
    if job.cluster.data_workers != "auto":
        return job.cluster.data_workers == 0
    if job.cluster.workers > _FEW_WORKERS or job.cluster.gpus_per_worker or build_task(job).augments:
        return False
    return sum(int(split.fragments.size_bytes.sum()) for split in splits.values()) <= _SMALL_BYTES


class InMemorySource(StreamSource):
    """A `StreamSource` whose rows stay encoded from window to window and from trial to trial."""

    def encode(self, task: Task, window: Window, ids: RowIds) -> Encoded:
        """As its base does, from memory where that is possible."""
        split = self.splits[window.kind]
        kept = None
        if not (task.augments and window.kind == TRAIN):
            encode = partial(self.encode_rows, task, window.kind)
            kept = _kept(_Key(encoding_of(self.job), split.name, split.version, split, encode))
        return super().encode(task, window, ids) if kept is None else kept.take(ids)


@dataclass(frozen=True)
class _Key:
    """Equal where rows are encoded alike."""

    said: str
    name: str
    version: str
    split: Split = field(compare=False)
    encode: Callable[[RowIds], Encoded] = field(compare=False)


@lru_cache(maxsize=4)
def _kept(key: _Key) -> Block | None:
    """A split in memory; None if it is too large for that."""
    rows = key.split.rows
    parts: list[Encoded] = []
    bounds = [(begin, min(begin + _ROWS_AT_ONCE, rows)) for begin in range(0, rows, _ROWS_AT_ONCE)]
    for begin, stop in bounds:
        part = key.encode(np.arange(begin, stop, dtype=np.int64))
        parts.append(part)
        if part.samples.nbytes / (stop - begin) * rows > _KEPT_BYTES:
            return None
    return Block.of(parts, [stop - begin for begin, stop in bounds])


def iter_shards_in_memory(source: StreamSource, windows: Iterable[Window], rank: int) -> Iterator[pa.Buffer]:
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
