"""Shares without Ray Data, in the train worker itself, from rows that are encoded once. For sweeps; train workers.

A trial of a sweep reads the rows that all its predecessors in the same process have read. They stay encoded in memory
(up to a limit; rows that are augmented are encoded anew), and a thread lays out the next window while one is trained.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa

from launcher.data.blocks import Block
from launcher.data.cache import encoding_of
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
        encode = partial(super().encode, task, window)
        kept = None
        if not (task.augments and window.kind == TRAIN):
            kept = _kept(_Key(encoding_of(self.job), split.name, split.version, split, encode))
        return encode(ids) if kept is None else kept.take(ids)


@dataclass(frozen=True)
class _Key:
    """Equal where rows are encoded alike."""

    said: str
    name: str
    version: str
    split: Split = field(compare=False)
    encode: Callable[[Ids], Encoded] = field(compare=False)


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


def cells(source: StreamSource, windows: Iterable[Window], rank: int) -> Iterator[pa.Buffer]:
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
