"""Which rows made a step of a run, and in which steps a row is: pure functions of the job file and its data.

No run keeps such a record. The windows in question are read and encoded once more, as their batches depend on the
lengths of the rows. Runs where `launcher rows` does; `stream.py` has the cut.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from launcher.data.row_order import row_epochs, row_ranges, windows_of_row
from launcher.data.sampler import RowIds
from launcher.data.splits import Split
from launcher.data.stream import CutWindow, StreamSource
from launcher.data.windows import TRAIN, Window, train_windows
from launcher.errors import DataError
from launcher.formatting import list_names
from launcher.rundir.plan import Plan
from launcher.rundir.uri import redact_uri
from launcher.spec.job import JobSpec


@dataclass(frozen=True)
class StepRows:
    """Rows of one global batch, by part and sequence.

    Args:
        step: Step that the batch is trained in, from 1.
        ids: Row id of each row, int64 (n,).
        epoch: Epoch of each row, from 1: of its source in a mixture, else of all data.
        part: Part that each row is in, from 0.
        sequence: Number of each row's sequence in the batch, from 0; packed rows share one.
        weight: Weight of each row, float64 (n,).
        source: Index of each row's source; zeros without a mixture.
    """

    step: int
    ids: RowIds
    epoch: RowIds
    part: RowIds
    sequence: RowIds
    weight: npt.NDArray[np.float64]
    source: RowIds

    @cached_property
    def samples(self) -> RowIds:
        """Return the number of rows in each row's sequence."""
        counts: RowIds = np.bincount(self.sequence)[self.sequence] if len(self.sequence) else self.sequence
        return counts

    def table(self, split: Split) -> pa.Table:
        """Return one row for each row, with its file and its number there (from 0)."""
        files, file_rows = split.locate_all(self.ids)
        columns = {
            "step": np.full(len(self.ids), self.step, np.int64),
            "epoch": self.epoch,
            "part": self.part,
            "sequence": self.sequence,
            "samples": self.samples,
            "file": pa.array(files, pa.string()),
            "file_row": file_rows,
            "row": self.ids,
            "weight": self.weight,
        }
        if split.sources:
            columns["source"] = pa.array([split.sources[i].name for i in self.source], pa.string())
        return pa.table(columns)


@dataclass(frozen=True)
class RowUse:
    """One occurrence of a row in the training of a run."""

    row: int
    """Row id."""
    epoch: int
    """Epoch of the row's source, or of all data, from 1."""
    step: int | None
    """Step that trains on it, from 1; None if it is left out."""
    part: int | None
    """Part of the step's global batch; None if it is left out."""
    problem: str = ""
    """Reason why the row cannot be used and is left out (`data.on_bad_row: skip`)."""


def read_step_rows(job: JobSpec, plan: Plan, train: Split, steps: range) -> Iterator[StepRows]:
    """Yield the rows of each of some consecutive steps, counted from 1; windows are read one after the other.

    Raises:
        DataError: A row cannot be used and the job file says `error`.
    """
    source = StreamSource(job, {TRAIN: train}, 1)
    for window in train_windows(plan, job, steps.start - 1):
        if window.first_step >= steps.stop - 1:
            return
        if window.kind != TRAIN:
            continue
        cut = source.cut(window)
        epochs = row_epochs(row_ranges(job, train, window))
        for step, batch in enumerate(cut.batches, window.first_step + window.begin + 1):
            if step in steps:
                yield _step_rows(step, cut, batch, epochs)


def _step_rows(step: int, cut: CutWindow, batch: RowIds, epochs: RowIds) -> StepRows:
    parts = cut.parts(batch)
    sequences = [sequence for part in parts for sequence in part]
    sizes = np.array([len(sequence) for sequence in sequences], np.int64)
    positions = np.concatenate([np.empty(0, np.int64), *sequences])
    in_window = cut.encoded.valid_rows[positions]
    part_of_sequence = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return StepRows(
        step=step,
        ids=cut.ids[in_window],
        epoch=epochs[in_window] + 1,
        part=np.repeat(part_of_sequence, sizes),
        sequence=np.repeat(np.arange(len(sequences)), sizes),
        weight=cut.encoded.weights[positions],
        source=cut.source[positions],
    )


def find_row(train: Split, file: str, number: int) -> RowIds:
    """Return the row ids of a row of a file: one, or several if the training data names the file several times.

    Args:
        train: Training data.
        file: File as the job file or a message names it, or the end of its path if that is unique.
        number: Number of the row in the file, from 0.

    Raises:
        DataError: The training data has no such file, several, or the file has no such row.
    """
    names = [train.fragments.shown_name(i) for i in range(len(train.fragments.files))]
    bare = redact_uri(file)
    end = "/" + (bare if "://" in bare else os.path.normpath(bare))
    exact = (bare, bare if "://" in bare else os.path.abspath(os.path.expanduser(bare)))
    found = [i for i, name in enumerate(names) if name in exact]
    found = found or [i for i, name in enumerate(names) if name.endswith(end)]
    different = list(dict.fromkeys(names[i] for i in found))
    if not different:
        raise DataError(
            f"--row: {bare} is no file of the training data; it has {list_names(list(dict.fromkeys(names)))}"
        )
    if len(different) > 1:
        raise DataError(f"--row: {bare} may be {list_names(different)}; give more of its path")
    fragments = train.fragments
    of_file = np.flatnonzero(np.isin(fragments.file, found))
    offset = number - fragments.file_row[of_file]
    inside = (offset >= 0) & (offset < fragments.rows[of_file])
    ids: RowIds = (train.starts[:-1][of_file] + offset)[inside]
    if not len(ids):
        rows = int((fragments.file_row[of_file] + fragments.rows[of_file]).max(initial=0))
        raise DataError(f"--row: {different[0]} has no row {number}; it has {rows} rows, numbered from 0")
    return ids


def find_uses(job: JobSpec, plan: Plan, train: Split, row: int) -> Iterator[RowUse]:
    """Yield where a run trains on a row, in the order of the steps; only windows that read the row are encoded.

    Args:
        job: Job of the run.
        plan: Plan of the run.
        train: Training data.
        row: Row id.

    Raises:
        DataError: A row cannot be used and the job file says `error`.
    """
    source = StreamSource(job, {TRAIN: train}, 1)
    # A small source of a mixture may start again within a window, which is then encoded once.
    for window, group in itertools.groupby(windows_of_row(job, plan, train, row), key=lambda pair: pair[0]):
        cut = source.cut(window)
        epochs = row_epochs(row_ranges(job, train, window))
        for _, epoch in group:
            position = int(np.flatnonzero((cut.ids == row) & (epochs == epoch))[0])
            yield from _uses_in_window(window, cut, position, RowUse(row, epoch + 1, None, None))


def _uses_in_window(window: Window, cut: CutWindow, position: int, use: RowUse) -> Iterator[RowUse]:
    """Yield where a window trains on the row at one of its positions: at most one place."""
    problem = dict(cut.encoded.problems).get(position)
    if problem is not None:
        yield RowUse(use.row, use.epoch, None, None, problem)
        return
    usable = int(np.searchsorted(cut.encoded.valid_rows, position))
    for step, batch in enumerate(cut.batches, window.first_step + 1):
        # In none of them where a limit of steps ends the run inside the window.
        if usable in batch:
            parts = cut.parts(batch)
            part = next(i for i, own in enumerate(parts) if any(usable in sequence for sequence in own))
            yield RowUse(use.row, use.epoch, step, part)
