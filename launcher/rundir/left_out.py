"""Steps whose batch a run leaves out, as its loss was no number: left-out.json. Runs anywhere.

`train/non_finite.py` writes it; the loop passes over these steps whenever the run makes them again.
"""

from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record

FILE = "left-out.json"


class BadRow(Record):
    """A row of such a batch."""

    row: int
    """Row number in the training data, files in order."""
    file: str
    file_row: int
    """Row number inside the file, from 0."""


class SkippedBatch(Record):
    """One batch."""

    step: int
    """That it was for, counted from 1."""
    reason: str
    rows: tuple[BadRow, ...]


class SkippedBatchesRecord(Record):
    """left-out.json."""

    batches: tuple[SkippedBatch, ...]


def read_skipped_batches(run: RunDir) -> tuple[SkippedBatch, ...]:
    """All of a run's, in the order they were found."""
    known = run.find_record(FILE, SkippedBatchesRecord)
    return () if known is None else known.batches


def record_skipped_batch(run: RunDir, batch: SkippedBatch) -> None:
    """Write one more down."""
    known = read_skipped_batches(run)
    if batch.step not in (one.step for one in known):
        run.write_record(FILE, SkippedBatchesRecord(batches=(*known, batch)))
