"""The stream: windows of rows, read and encoded, cut into one share per train worker, and opened there again.

`ray_data.py` carries the shares from Ray Data workers to train workers. Row ids: `splits.py`; which rows make a window:
`sampler.py`; how a window becomes shares: `rank_batches.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa

from launcher.data.encoded_cache import encoded_rows
from launcher.data.rank_batches import (
    BatchLayout,
    LocalBatch,
    ShardHeader,
    assign_to_ranks,
    build_shard,
    deserialize_shard,
    serialize_shard,
)
from launcher.data.sample import sample
from launcher.data.sampler import EpochSampler, RowIds, cut_batches, generator, row_noise
from launcher.data.splits import Split
from launcher.data.windows import TRAIN, Window
from launcher.errors import DataError, RowCountError
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Encoded, Task


@dataclass(frozen=True)
class StreamSource:
    """All a data worker needs to turn a window into shares; put into the object store once."""

    job: JobSpec
    splits: dict[str, Split]
    world_size: int

    def read(self, window: Window) -> Iterator[bytes]:
        """The packed shares of a window, one per worker, in rank order.

        Raises:
            DataError: a row cannot be used and the job file says `error`, or no row of the window can.
        """
        return self.shares(window, range(self.world_size))

    def shares(self, window: Window, ranks: Iterable[int]) -> Iterator[bytes]:
        """The packed shares of a window for some of the workers; raises as `read` does."""
        split = self.splits[window.kind]
        task = self.task(window.kind != TRAIN)
        ids = self.row_ids(window)
        encoded = self.encode(task, window, ids)
        handle_bad_rows(split, ids, encoded, self.job.data.on_bad_row)
        batches = self.batches(window, len(ids), encoded)[window.begin : window.end]
        # An evaluation tells samples apart, so it never packs.
        packed = task.pack_length if window.kind == TRAIN else None
        given = self.job.parallel.micro_batch
        cut = BatchLayout(self.world_size, given if isinstance(given, int) else None, packed)
        dealt = [assign_to_ranks(batch, encoded.lengths, cut) for batch in batches]
        for rank in ranks:
            table, steps = build_shard(encoded, ids, batches, dealt, rank, cut)
            skipped = len(encoded.problems) if rank == 0 and window.begin == 0 else 0
            header = ShardHeader(
                window.kind, window.epoch, window.first_step + window.begin, window.last, skipped, steps
            )
            yield serialize_shard(table, header)

    def task(self, scored: bool) -> Task:
        """What encodes rows, as evaluations see it or as training does."""
        return _task(self.job.model_dump_json(include={"task", "model", "seed", "name", "data"}), scored)

    def encode(self, task: Task, window: Window, ids: RowIds) -> Encoded:
        """The rows of a window, read and made ready for the model."""
        split = self.splits[window.kind]
        if self.job.data.cache is not None and not (task.augments and window.kind == TRAIN):
            return encoded_rows(self.job, split, task, window.kind != TRAIN, ids)
        rows = self._read(window, ids, task.input_columns + task.target_columns)
        noise = row_noise(self.job.seed, window.epoch, ids) if window.kind == TRAIN else None
        return task.encode(rows, True, noise)

    def encode_rows(self, task: Task, kind: str, ids: RowIds) -> Encoded:
        """Return rows of a split, of any windows, as `encode` gives them where they are not augmented."""
        if self.job.data.cache is not None:
            return encoded_rows(self.job, self.splits[kind], task, kind != TRAIN, ids)
        return task.encode(self.splits[kind].read(ids, task.input_columns + task.target_columns), True)

    def _read(self, window: Window, ids: RowIds, columns: tuple[str, ...]) -> pa.Table:
        """Read the rows of a window; those of training come from pools, each of which is read once in a process."""
        split = self.splits[window.kind]
        if window.kind != TRAIN:
            return split.read(ids, columns)
        key = _OrderKey.of(self.job, split)
        order = _order(key, window.epoch)
        places = order.places(window.index)
        most = max(_POOL_BYTES, 2 * order.pool_bytes)
        if any(order.pool_rows(pool) * _row_bytes(key, columns) > most for pool, _, _ in places):
            return split.read(ids, columns)
        parts = [_pool(key, window.epoch, pool, columns).slice(begin, end - begin) for pool, begin, end in places]
        return pa.concat_tables(parts).combine_chunks()

    def row_ids(self, window: Window) -> RowIds:
        """Row ids of a window: the canonical order for training, file order for evaluation."""
        split = self.splits[window.kind]
        if window.kind != TRAIN:
            size = self.job.evaluation.batch_size * self.job.data.window_steps
            return np.arange(window.index * size, min(split.rows, (window.index + 1) * size), dtype=np.int64)
        return epoch_sampler(self.job, split, window.epoch).window(window.index)

    def batches(self, window: Window, rows: int, encoded: Encoded) -> list[RowIds]:
        """The window's global batches, as positions among the rows that can be used."""
        if window.kind != TRAIN:
            size = self.job.evaluation.batch_size
            return cut_batches(encoded.lengths, -(-rows // size), size, None)
        size = self.job.train.batch_size
        fingerprint = self.splits[TRAIN].fingerprint
        rng = generator("batches", fingerprint, self.job.seed, window.epoch, window.index)
        lengths = encoded.lengths if self.job.data.group_by_length else np.zeros(len(encoded.valid_rows), np.int64)
        return cut_batches(lengths, -(-rows // size), size, rng)


BAD_ROW_REMEDY = "mend the row, or set data.on_bad_row: skip to leave such rows out"
"""The remedy for a row that cannot be used."""


def handle_bad_rows(split: Split, ids: RowIds, encoded: Encoded, on_bad_row: str) -> None:
    """Do with unusable rows what the job file says.

    Raises:
        DataError: it says `error`, or none of the rows is usable; names the file and the row.
    """
    if not encoded.problems:
        return
    position, reason = encoded.problems[0]
    file, row = split.locate(int(ids[position]))
    where = f"{file}: row {row}: {reason}"
    if on_bad_row == "error":
        raise DataError(f"{where}; {BAD_ROW_REMEDY}")
    if not len(encoded.valid_rows):
        raise DataError(f"{where}, and so are all {len(ids)} rows read with it; is the right column named?")


@dataclass(frozen=True)
class _OrderKey:
    """Equal where the order is; hashes as the data does, not as its many fragments do."""

    fingerprint: str
    seed: int
    batch_size: int
    window_steps: int
    shuffle_pool_mib: int
    split: Split = field(compare=False)

    @staticmethod
    def of(job: JobSpec, split: Split) -> "_OrderKey":
        data = job.data
        return _OrderKey(
            split.fingerprint, job.seed, job.train.batch_size, data.window_steps, data.shuffle_pool_mib, split
        )


def epoch_sampler(job: JobSpec, split: Split, epoch: int) -> EpochSampler:
    """Return the order of one epoch of a job's training rows."""
    return _order(_OrderKey.of(job, split), epoch)


@lru_cache(maxsize=4)
def _order(key: _OrderKey, epoch: int) -> EpochSampler:
    found = key.split.fragments
    fragments = tuple(zip(found.rows.tolist(), found.size_bytes.tolist(), strict=True))
    window_rows = key.batch_size * key.window_steps
    return EpochSampler(fragments, key.fingerprint, key.seed, epoch, window_rows, key.shuffle_pool_mib << 20)


_POOL_BYTES = 256 << 20
"""A pool that takes more in memory, because its files say less than their texts take when unpacked, is not kept; each
window's rows are then read by themselves."""


@lru_cache(maxsize=4)
def _row_bytes(key: _OrderKey, columns: tuple[str, ...]) -> float:
    """Return what a row takes in memory, by a few of them."""
    rows = sample(key.split, columns, 32)
    return float(rows.nbytes) / max(1, len(rows))


@lru_cache(maxsize=1)  # windows come in order
def _pool(key: _OrderKey, epoch: int, pool: int, columns: tuple[str, ...]) -> pa.Table:
    """Return the rows of a pool, shuffled.

    Its slices lie all over the files, and a row group is decoded from its beginning: to read them anew for each window
    would decode most of the files for each.
    """
    return key.split.read(_order(key, epoch).pool_ids(pool), columns)


@lru_cache(maxsize=4)
def _task(job_json: str, scored: bool) -> Task:
    task = build_task(JobSpec.model_validate_json(job_json))  # its tokenizer stays loaded in this process
    return task.for_evaluation() if scored else task


class ShardStream:
    """The train worker's end of the stream: the cells of its rows, in order (`build_shards` of a Ray Data iterator)."""

    def __init__(self, rows: Iterator[pa.Buffer]) -> None:
        self._rows = rows
        self.skipped_rows = 0

    def steps(self) -> Iterator[tuple[int, int, LocalBatch]]:
        """(steps done before it, epoch, share) of each training step, in order."""
        for cell in self._rows:
            header, shares = deserialize_shard(cell)
            if header.kind != TRAIN:
                raise RowCountError(f"stream: an evaluation of {header.kind} came where training was due")
            self.skipped_rows += header.skipped_rows
            for offset, share in enumerate(shares):
                yield header.first_step + offset, header.epoch, share

    def evaluation(self, split: str, step: int) -> "Evaluation":
        """The evaluation that is due now; must be consumed to its end before the next training step."""
        return Evaluation(self._rows, split, step)


class Evaluation:
    """One pass over a split; iterate it to the end, then read `skipped_rows`."""

    def __init__(self, rows: Iterator[pa.Buffer], split: str, step: int) -> None:
        self._rows, self._split, self._step = rows, split, step
        self.skipped_rows = 0

    def __iter__(self) -> Iterator[LocalBatch]:
        for cell in self._rows:
            header, shares = deserialize_shard(cell)
            if header.kind != self._split or header.first_step != self._step:
                raise RowCountError(
                    f"stream: {header.kind} at step {header.first_step} came where {self._split} at step {self._step} "
                    "was due"
                )
            self.skipped_rows += header.skipped_rows
            yield from shares
            if header.last:
                return
