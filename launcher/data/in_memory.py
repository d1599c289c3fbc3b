"""Shards without Ray Data, built in the train worker itself: for small data, and for the trials of a sweep.

Runs on train workers. The stream is the same; a thread builds the next window's shard while one is trained. Trials that
run one after the other in a process read the rows that the first one encoded: they stay in memory up to a limit, unless
they are augmented. Read `stream.py` next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa

from launcher.data.encoded_cache import Block, encoding_of
from launcher.data.sampler import RowIds
from launcher.data.splits import Split
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN, Window
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.tasks.samples import Encoded

_MAX_ENCODED_BYTES = 1 << 30
"""Encoded size of a split that may stay in the memory of each worker."""
_ROWS_AT_ONCE = 4096
# A worker must encode all rows of a window, as the batches depend on their lengths. For so little data that costs less
# than the start of Ray Data's four processes, one after another; a GPU would wait for it.
_SMALL_BYTES, _FEW_WORKERS = 32 << 20, 4


def can_read_in_workers(job: JobSpec, splits: Mapping[str, Split]) -> bool:
    """Return whether train workers read and encode for themselves, without Ray Data.

    Args:
        job: Resolved job. `cluster.data_workers` decides; `auto` leaves it to the size of the data.
        splits: Splits that are streamed.
    """
    if job.cluster.data_workers != "auto":
        # A number is an order: 0 forces this path for data of any size, and any other number forces Ray Data.
        return job.cluster.data_workers == 0
    # Augmented rows are encoded again in each epoch, so even small data cost as much as large.
    if job.cluster.workers > _FEW_WORKERS or job.cluster.gpus_per_worker or build_task(job).augments:
        return False
    return sum(int(split.fragments.size_bytes.sum()) for split in splits.values()) <= _SMALL_BYTES


class InMemorySource(StreamSource):
    """A `StreamSource` whose encoded rows stay in memory from window to window and from trial to trial."""

    def encode(self, task: Task, window: Window, ids: RowIds) -> Encoded:
        """Return the encoded rows of a window, from memory if the split is small enough and not augmented."""
        split = self.splits[window.kind]
        block = None
        # Before the look-up, as building the block encodes the split: augmented rows would be encoded for nothing.
        if not (task.augments and window.kind == TRAIN):
            encode = partial(self.encode_rows, task, window.kind)
            block = _encode_split(_SplitKey(encoding_of(self.job), split.name, split.version, split, encode))
        # `block.take` gives what `encode` gives, bit for bit: whether a split fits into memory must not change the
        # curve.
        return super().encode(task, window, ids) if block is None else block.take(ids)


@dataclass(frozen=True)
class _SplitKey:
    """Cache key of an encoded split: equal if its rows are encoded alike."""

    encoding: str
    name: str
    version: str
    split: Split = field(compare=False)
    encode: Callable[[RowIds], Encoded] = field(compare=False)


# A split that is too large is remembered as None, so that it is not tried again for each window.
@lru_cache(maxsize=4)
def _encode_split(key: _SplitKey) -> Block | None:
    """Encode a whole split; return None if it is too large to stay in memory."""
    rows = key.split.rows
    parts: list[Encoded] = []
    bounds = [(begin, min(begin + _ROWS_AT_ONCE, rows)) for begin in range(0, rows, _ROWS_AT_ONCE)]
    for begin, stop in bounds:
        part = key.encode(np.arange(begin, stop, dtype=np.int64))
        parts.append(part)
        # Estimated from each part, so that a large split costs one part and not a gibibyte before it is given up.
        if part.samples.nbytes / (stop - begin) * rows > _MAX_ENCODED_BYTES:
            return None
    return Block.of(parts, [stop - begin for begin, stop in bounds])


def iter_shards_in_memory(source: StreamSource, windows: Iterable[Window], rank: int) -> Iterator[pa.Buffer]:
    """Yield the serialized shards of one rank, window after window; the next one is built in a thread meanwhile."""
    # One thread: `StreamSource` caches pools and encoded splits, and windows must come in order.
    with ThreadPoolExecutor(1, "windows") as thread:
        pending = None
        for window in windows:
            # Submitted before the wait for the one before: the thread is never idle while a window is trained.
            following = thread.submit(_build_shard, source, window, rank)
            if pending is not None:
                # Raises here what the thread raised, in window order, after all windows before it have been trained.
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _build_shard(source: StreamSource, window: Window, rank: int) -> pa.Buffer:
    (shard,) = source.shards(window, [rank])
    return pa.py_buffer(shard)
