"""The stream: windows of rows, read, encoded and cut into one shard per rank; and its end on the train workers.

The first half runs on data workers (or in train workers, `in_memory.py`), `ShardStream` on train workers. `splits.py`
has row ids, `sampler.py` the rows of a window, `rank_batches.py` the shards, and `ray_data.py` the transport.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from launcher.data.encoded_cache import encoded_rows
from launcher.data.mixture import cut_mixed_batches, source_of
from launcher.data.rank_batches import (
    BatchLayout,
    LocalBatch,
    ShardHeader,
    build_shard,
    cut_into_parts,
    deserialize_shard,
    serialize_shard,
)
from launcher.data.row_order import noise_of, read_ranges, row_ranges, source_counts
from launcher.data.sampler import RowIds, cut_batches, generator
from launcher.data.splits import Split
from launcher.data.windows import TRAIN, Window, training_window
from launcher.errors import DataError, RowCountError
from launcher.rundir.plan import Plan
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.tasks.samples import Encoded

BAD_ROW_REMEDY = "fix the row, or set data.on_bad_row: skip to leave such rows out"
"""Remedy for a row that cannot be used, for messages."""


@dataclass(frozen=True)
class CutWindow:
    """Encoded window cut into global batches. But for the layout's shards, nothing in it depends on the ranks.

    Args:
        ids: Row ids of the window before encoding, int64 (n,).
        encoded: Usable rows of the window.
        batches: Global batches from the window's `begin` on, as positions among the usable rows.
        source: Source of each usable row; zeros without a mixture.
        layout: Cut of each batch into parts and shards.
    """

    ids: RowIds
    encoded: Encoded
    batches: list[RowIds]
    source: RowIds
    layout: BatchLayout

    def parts(self, batch: RowIds) -> list[list[RowIds]]:
        """Return the parts of one of the batches: for each a list of sequences, each the positions of its samples."""
        return cut_into_parts(batch, self.encoded.lengths, self.layout, self.source)


@dataclass(frozen=True)
class StreamSource:
    """All that a data worker needs to turn a window into shards; put into the object store once."""

    job: JobSpec
    splits: dict[str, Split]
    world_size: int

    def read(self, window: Window) -> Iterator[bytes]:
        """Yield the serialized shards of a window, one per rank, in rank order.

        Raises:
            DataError: A row cannot be used and the job file says `error`, or no row of the window can be used.
        """
        return self.shards(window, range(self.world_size))

    def shards(self, window: Window, ranks: Iterable[int]) -> Iterator[bytes]:
        """Yield the serialized shards of a window for some ranks; raises as `read` does."""
        cut = self.cut(window)
        assigned = [cut.parts(batch) for batch in cut.batches]
        # Here the ranks begin: the parts are settled, and any number of ranks divides the same ones.
        # One rank's table at a time: those of all ranks together are as large as the encoded window itself.
        for rank in ranks:
            table, steps = build_shard(cut.encoded, cut.ids, cut.batches, assigned, rank, cut.layout)
            # Counted once: on rank 0, and not again by a run that resumes inside the window.
            skipped = len(cut.encoded.problems) if rank == 0 and window.begin == 0 else 0
            first_step = window.first_step + window.begin
            parts = cut.layout.parts_of(rank)
            header = ShardHeader(window.kind, window.epoch, first_step, window.is_last, skipped, parts, steps)
            yield serialize_shard(table, header)

    def cut(self, window: Window) -> CutWindow:
        """Read and encode a window and cut it into the global batches that are not done yet; raises as `read` does."""
        split = self.splits[window.kind]
        task = self.task(window.kind != TRAIN)
        # The whole window is encoded even for a single rank: the lengths of all rows decide which rows share a batch,
        # and whether a row is usable shows only now.
        ids = self.row_ids(window)
        encoded = self.encode(task, window, ids)
        # Before the cut: a batch consists of usable rows alone, and the header counts the others.
        handle_bad_rows(split, ids, encoded, self.job.data.on_bad_row)
        # The window is cut whole and then sliced. Cutting only what is left of it after a resume would draw another
        # shuffle.
        batches = self.batches(window, ids, encoded)[window.begin : window.end]
        # Evaluations never pack: they need the result of each sample by itself.
        pack_length = task.pack_length if window.kind == TRAIN else None
        micro_batch = self.job.parallel.micro_batch
        size = micro_batch if isinstance(micro_batch, int) else None
        starts = tuple(source.first_row for source in split.sources)
        layout = BatchLayout(
            self.world_size, self.job.virtual_ranks, size, pack_length, task.normalizers, task.partner_columns, starts
        )
        return CutWindow(ids, encoded, batches, layout.source_of(ids[encoded.valid_rows]), layout)

    def task(self, for_evaluation: bool) -> Task:
        """Return the task that encodes rows: as evaluation or as training needs it."""
        # JSON is the cache key, of only those sections that a task is built from: jobs that differ elsewhere, as most
        # trials of a sweep do, share one task and its loaded tokenizer.
        return _build_task(self.job.model_dump_json(include={"task", "model", "seed", "name", "data"}), for_evaluation)

    def encode(self, task: Task, window: Window, ids: RowIds) -> Encoded:
        """Read and encode the rows of a window."""
        # Augmented rows differ from epoch to epoch; a cache would repeat the first draw for ever.
        is_cached = self.job.data.cache is not None and not task.augments
        if is_cached or window.kind != TRAIN:
            # An evaluation reads in file order, without pools: of a row group larger than a window, each window decodes
            # the beginning again.
            return self.encode_rows(task, window.kind, ids)
        ranges = row_ranges(self.job, self.splits[TRAIN], window)
        columns = task.input_columns + task.target_columns
        return task.encode(read_ranges(ranges, columns), True, noise_of(ranges, ids))

    def encode_rows(self, task: Task, kind: str, ids: RowIds) -> Encoded:
        """Read and encode any rows of a split, without augmentation."""
        if self.job.data.cache is not None:
            return encoded_rows(self.job, self.splits[kind], task, kind != TRAIN, ids)
        return task.encode(self.splits[kind].read(ids, task.input_columns + task.target_columns), True)

    def row_ids(self, window: Window) -> RowIds:
        """Return the row ids of a window: in the sampler's order for training, in file order for evaluation."""
        if window.kind != TRAIN:
            return np.arange(window.first_row, window.first_row + window.rows, dtype=np.int64)
        return np.concatenate([part.ids for part in row_ranges(self.job, self.splits[TRAIN], window)])

    def batches(self, window: Window, ids: RowIds, encoded: Encoded) -> list[RowIds]:
        """Return the global batches of a window, as positions among the rows that can be used.

        Nothing here may depend on the number of ranks or the micro-batch: it is why the curve does not.

        Args:
            window: Window to cut.
            ids: Row ids of the window, unusable ones included.
            encoded: Encoded rows of the window.
        """
        if window.kind != TRAIN:
            size = self.job.evaluation_batch_size
            # No shuffle: metrics do not depend on the order, and with the longest rows first memory peaks in a window's
            # first batch.
            return cut_batches(encoded.lengths, -(-len(ids) // size), size, None)
        size = self.job.train.batch_size
        fingerprint = self.splits[TRAIN].fingerprint
        # A generator per window: a resumed run draws the same batches without drawing those of earlier windows.
        # The arguments are part of the order of every run: see `generator`.
        rng = generator("batches", fingerprint, self.job.seed, window.epoch, window.index)
        # Equal lengths leave the order of the window; the number of batches is the plan's, skipped rows or not.
        lengths = encoded.lengths if self.job.data.group_by_length else np.zeros(len(encoded.valid_rows), np.int64)
        sources = self.splits[TRAIN].sources
        if sources:
            source = source_of([part.first_row for part in sources], ids[encoded.valid_rows])
            return cut_mixed_batches(lengths, source, source_counts(self.job, window), rng)
        return cut_batches(lengths, -(-len(ids) // size), size, rng)


def handle_bad_rows(split: Split, ids: RowIds, encoded: Encoded, on_bad_row: str) -> None:
    """Raise for rows that cannot be used, unless the job file says to skip them.

    Raises:
        DataError: `on_bad_row` is `error`, or none of the rows can be used; names the file and the row.
    """
    if not encoded.problems:
        return
    position, reason = encoded.problems[0]
    file, row = split.locate(int(ids[position]))
    where = f"{file}: row {row}: {reason}"
    if on_bad_row == "error":
        raise DataError(f"{where}; {BAD_ROW_REMEDY}")
    # Skipping cannot help here: a filler needs some sample to repeat (`rank_batches.py`).
    if not len(encoded.valid_rows):
        raise DataError(f"{where}, and so are all {len(ids)} rows read with it; is the right column named?")


def read_batch_rows(job: JobSpec, plan: Plan, splits: dict[str, Split], step: int) -> RowIds:
    """Return the row ids of the global batch after `step` steps, for reports about a non-finite loss.

    Reads and encodes the whole window of the batch once more, in the calling process.

    Returns:
        Row ids, int64 (n,), ascending.
    """
    # One rank, whatever the run has: batches do not depend on ranks.
    cut = StreamSource(job, splits, 1).cut(training_window(plan, job, step))
    rows: RowIds = cut.ids[cut.encoded.valid_rows[cut.batches[0]]]
    # In place, which is safe: indexing with an array has copied.
    rows.sort()
    return rows


@lru_cache(maxsize=4)
def _build_task(job_json: str, for_evaluation: bool) -> Task:
    # The cached task keeps its tokenizer loaded.
    task = build_task(JobSpec.model_validate_json(job_json))
    return task.for_evaluation() if for_evaluation else task


class ShardStream:
    """Train worker's end of the stream: local batches in order, out of the serialized shards of its rank."""

    def __init__(self, shards: Iterator[pa.Buffer]) -> None:
        self._shards = shards
        self.skipped_rows = 0

    def steps(self) -> Iterator[tuple[int, int, LocalBatch]]:
        """Yield (steps completed before it, epoch, local batch) for each training step, in order."""
        for content in self._shards:
            # A shard is taken whole before its first step. An evaluation that is due inside a window comes behind that
            # window in the stream: it takes its shards while the remaining steps of the window wait here.
            header, batches = deserialize_shard(content)
            # Reader and writer walk the same windows, each by itself. A mismatch means that an evaluation was not read
            # to its end, or that the transport changed the order; training would use the wrong rows unnoticed.
            if header.kind != TRAIN:
                raise RowCountError(f"stream: an evaluation of {header.kind} came where training was due")
            self.skipped_rows += header.skipped_rows
            for offset, batch in enumerate(batches):
                yield header.first_step + offset, header.epoch, batch

    def evaluation(self, split: str, step: int) -> "Evaluation":
        """Return the evaluation that is due now.

        Training and evaluation share one stream: the evaluation must be consumed to its end before the next step.
        """
        return Evaluation(self._shards, split, step)


class Evaluation:
    """One pass over a split; iterate it to the end, then read `skipped_rows`."""

    def __init__(self, shards: Iterator[pa.Buffer], split: str, step: int) -> None:
        self._shards = shards
        self._split = split
        self._step = step
        self.skipped_rows = 0

    def __iter__(self) -> Iterator[LocalBatch]:
        for content in self._shards:
            header, batches = deserialize_shard(content)
            if header.kind != self._split or header.first_step != self._step:
                raise RowCountError(
                    f"stream: {header.kind} at step {header.first_step} came where {self._split} at step {self._step} "
                    "was due"
                )
            self.skipped_rows += header.skipped_rows
            yield from batches
            # Stop at the mark, not at the end of the stream: the next shard is one of training, and taking it would
            # lose it.
            if header.is_last:
                return
