"""What a run has learned from failures, so that later attempts avoid them: two records in the run directory.

`micro-batch.json`: micro-batch size after an out-of-memory error (written by `train/oom.py`, read by
`driver/memory/auto.py`). `skipped-batches.json`: batches with a non-finite loss (`train/non_finite.py`).
"""

from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record

_MICRO_BATCH_FILE = "micro-batch.json"
_SKIPPED_FILE = "skipped-batches.json"


class MicroBatchReduction(Record):
    """One out-of-memory error and the smaller micro-batch that followed."""

    step: int
    """Step that failed, counted from 1."""
    micro_batch: int
    """Size that did not fit."""
    reduced: int
    """Size used instead."""
    restarted: bool
    """Whether the workers had to restart (ZeRO 2 and 3)."""

    def sentence(self) -> str:
        """Return a sentence for log and report."""
        how = "the workers restart from the last checkpoint" if self.restarted else "the step was repeated"
        return (
            f"out of memory in step {self.step}: micro-batches of {self.reduced} instead of {self.micro_batch} from "
            f"here on, {how}; same batches, same result"
        )


class MicroBatchRecord(Record):
    """Content of micro-batch.json."""

    damage_remedy = "remove it, and the next attempt reduces the micro-batch again if it has to"

    micro_batch: int
    """Largest size known to fit; overrides a larger `parallel.micro_batch`. Delete the file when the workers have more
    memory."""
    reductions: tuple[MicroBatchReduction, ...]


def record_reduction(run: RunDir, reduction: MicroBatchReduction) -> MicroBatchReduction:
    """Add a reduction to the record, so that later attempts start with it. All ranks may report the same one."""
    # Read, add, write, without a lock: of two ranks that report different sizes at once, one is lost. The next attempt
    # may then fail in the same place, and reduces again.
    reductions = read_reductions(run)
    if reduction not in reductions:
        reductions = (*reductions, reduction)
    smallest = min(r.reduced for r in reductions)
    run.write_record(_MICRO_BATCH_FILE, MicroBatchRecord(micro_batch=smallest, reductions=reductions))
    return reduction


def read_reductions(run: RunDir) -> tuple[MicroBatchReduction, ...]:
    """Return all reductions of a run, oldest first."""
    record = run.find_record(_MICRO_BATCH_FILE, MicroBatchRecord)
    return () if record is None else record.reductions


def effective_micro_batch(run: RunDir, micro_batch: int) -> int:
    """Return the requested micro-batch size, capped by what an earlier out-of-memory error has shown to fit."""
    record = run.find_record(_MICRO_BATCH_FILE, MicroBatchRecord)
    return micro_batch if record is None else min(micro_batch, record.micro_batch)


class BadRow(Record):
    """One row of a skipped batch."""

    row: int
    """Row number in the training data, files in order."""
    file: str
    file_row: int
    """Row number inside the file, from 0."""


class SkippedBatch(Record):
    """One batch with a non-finite loss or gradient, which no attempt trains on again."""

    step: int
    """Step of the batch, counted from 1."""
    reason: str
    rows: tuple[BadRow, ...]


class SkippedBatchesRecord(Record):
    """Content of skipped-batches.json."""

    batches: tuple[SkippedBatch, ...]


def read_skipped_batches(run: RunDir) -> tuple[SkippedBatch, ...]:
    """Return all skipped batches of a run, in the order they were found."""
    record = run.find_record(_SKIPPED_FILE, SkippedBatchesRecord)
    return () if record is None else record.batches


def record_skipped_batch(run: RunDir, batch: SkippedBatch) -> None:
    """Add a batch to the record, unless its step is there already."""
    # Rank 0 alone writes it, so that reading and writing need no lock.
    batches = read_skipped_batches(run)
    if batch.step not in (known.step for known in batches):
        run.write_record(_SKIPPED_FILE, SkippedBatchesRecord(batches=(*batches, batch)))
