"""Whole runs on Ray over files and row groups of extreme sizes: every row is trained on once per epoch."""

from collections.abc import Callable
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


def _one_file_of_many_row_groups(folder: Path) -> str:
    pq.write_table(example_table(2003), folder / "all.parquet", row_group_size=7)
    return str(folder / "all.parquet")


def _a_thousand_files(folder: Path) -> str:
    table = example_table(1999)
    for i in range(1000):
        pq.write_table(table.slice(2 * i, 2), folder / f"part-{i:04d}.parquet")
    return str(folder)


def _uneven_row_groups(folder: Path) -> str:
    sizes = [1, 700, 3, 1, 250, 1, 1, 499, 2, 45]
    table = example_table(sum(sizes))
    with pq.ParquetWriter(folder / "uneven.parquet", table.schema) as writer:
        begin = 0
        for size in sizes:
            writer.write_table(table.slice(begin, size), row_group_size=size)
            begin += size
    return str(folder / "*.parquet")


def _fewer_rows_than_a_batch(folder: Path) -> str:
    pq.write_table(example_table(13), folder / "few.parquet", row_group_size=5)
    return str(folder / "few.parquet")


def _footer_rows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("shape", "rows", "row_groups"),
    [
        # Tests in tests/data show order and local batches of such shapes without Ray; one of them runs here each time.
        pytest.param(_one_file_of_many_row_groups, 2003, 287, marks=pytest.mark.long),
        (_a_thousand_files, 1999, 1000),
        pytest.param(_uneven_row_groups, 1503, 10, marks=pytest.mark.long),
        pytest.param(_fewer_rows_than_a_batch, 13, 3, marks=pytest.mark.long),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else str(value),
)
def test_every_row_is_trained_on_once_per_epoch(
    shape: Callable[[Path], str], rows: int, row_groups: int, tiny_bert: Path, tmp_path: Path, ray_cluster: None
) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    location = shape(folder)
    assert _footer_rows(folder) == rows  # the files have the shape of the test's name
    assert sum(pq.read_metadata(path).num_row_groups for path in folder.iterdir()) == row_groups
    validation = write_splits(tmp_path / "validation", 0, validation=_VALIDATION_ROWS, row_group=9)
    job = make_job(
        tiny_bert, {"train": location, "window_steps": 2, **validation}, tmp_path / "runs",
        train={"epochs": _EPOCHS, "batch_size": 400},
    )  # fmt: skip
    lines = list(run_job(job, Console(quiet=True)).read_metrics())
    steps = [line for line in lines if isinstance(line, StepRecord)]
    per_epoch = -(-rows // 400)
    assert [line.step for line in steps] == list(range(1, _EPOCHS * per_epoch + 1))
    for epoch in range(1, _EPOCHS + 1):
        samples = [line.samples for line in steps if line.epoch == epoch]
        assert len(samples) == per_epoch
        assert sum(samples) == rows
    assert steps[-1].skipped_rows == 0
    evaluations = [(line.step, line.rows, line.skipped_rows) for line in lines if isinstance(line, EvaluationRecord)]
    assert _footer_rows(tmp_path / "validation") == _VALIDATION_ROWS
    assert evaluations == [(per_epoch * epoch, _VALIDATION_ROWS, 0) for epoch in range(1, _EPOCHS + 1)]
