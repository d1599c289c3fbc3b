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


class LeftOut(Record):
    """One batch."""

    step: int
    """That it was for, counted from 1."""
    why: str
    rows: tuple[BadRow, ...]


class LeftOutRecord(Record):
    """left-out.json."""

    batches: tuple[LeftOut, ...]


def left_out_of(run: RunDir) -> tuple[LeftOut, ...]:
    """All of a run's, in the order they were found."""
    known = run.find_record(FILE, LeftOutRecord)
    return () if known is None else known.batches


def leave_out(run: RunDir, batch: LeftOut) -> None:
    """Write one more down."""
    known = left_out_of(run)
    if batch.step not in (one.step for one in known):
        run.write_record(FILE, LeftOutRecord(batches=(*known, batch)))
