"""Whole runs on Ray over files and row groups of extreme sizes: every row is trained on once per epoch."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from launcher.driver.run import run_job
from launcher.rundir.records import EvaluationRecord, StepRecord
from tests.support.jobs import example_table, make_job, write_splits

pytestmark = pytest.mark.ray

_EPOCHS = 2
_VALIDATION_ROWS = 101


def _write_files(folder: Path, row_groups_of_files: list[list[int]]) -> int:
    """Write one Parquet file for each list of row group sizes; return the number of rows."""
    folder.mkdir()
    table = example_table(sum(map(sum, row_groups_of_files)))
    begin = 0
    for number, sizes in enumerate(row_groups_of_files):
        with pq.ParquetWriter(folder / f"part-{number:04d}.parquet", table.schema) as writer:
            for size in sizes:
                writer.write_table(table.slice(begin, size), row_group_size=size)
                begin += size
    return begin


# Tests in tests/data show order and local batches of such shapes without Ray; one of them runs here each time.
@pytest.mark.parametrize(
    "row_groups_of_files",
    [
        pytest.param([[7] * 286 + [1]], id="many-row-groups", marks=pytest.mark.long),
        pytest.param([[2]] * 999 + [[1]], id="thousand-files"),
        pytest.param([[1, 700, 3, 1, 250, 1, 1, 499, 2, 45]], id="uneven-row-groups", marks=pytest.mark.long),
        pytest.param([[5, 5, 3]], id="fewer-rows-than-a-batch", marks=pytest.mark.long),
    ],
)
def test_every_row_is_trained_on_once_per_epoch(
    row_groups_of_files: list[list[int]], tiny_bert: Path, tmp_path: Path, ray_cluster: None
) -> None:
    rows = _write_files(tmp_path / "train", row_groups_of_files)
    validation = write_splits(tmp_path / "validation", 0, validation=_VALIDATION_ROWS, row_group=9)
    job = make_job(
        tiny_bert, {"train": str(tmp_path / "train"), "window_steps": 2, **validation}, tmp_path / "runs",
        train={"epochs": _EPOCHS, "batch_size": 400},
    )  # fmt: skip
    lines = list(run_job(job, Console(quiet=True)).read_metrics())
    steps = [line for line in lines if isinstance(line, StepRecord)]
    per_epoch = -(-rows // 400)
    assert [line.step for line in steps] == list(range(1, _EPOCHS * per_epoch + 1))
    for epoch in range(1, _EPOCHS + 1):
        samples = [line.samples for line in steps if line.epoch == epoch]
        assert len(samples) == per_epoch and sum(samples) == rows
    assert steps[-1].skipped_rows == 0
    evaluations = [(line.step, line.rows, line.skipped_rows) for line in lines if isinstance(line, EvaluationRecord)]
    assert evaluations == [(per_epoch * epoch, _VALIDATION_ROWS, 0) for epoch in range(1, _EPOCHS + 1)]
