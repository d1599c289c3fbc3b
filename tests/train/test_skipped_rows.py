"""Rows that cannot be used, with `data.on_bad_row: skip`: batches without rows, and their count after a resume."""

import itertools
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here

_ROWS, _USABLE, _STEPS = 24, 3, 6


@pytest.fixture
def job(tiny_bert: Path, tmp_path: Path) -> PreparedJob:
    """A job whose window has fewer rows that can be used than batches."""
    data = write_splits(tmp_path / "data", train=_ROWS)
    table = pq.read_table(data["train"])
    texts = [text if row < _USABLE else None for row, text in enumerate(table.column("text").to_pylist())]
    text = table.schema.get_field_index("text")
    pq.write_table(table.set_column(text, "text", pa.array(texts, pa.string())), data["train"])
    sections: dict[str, Any] = {"train": {"batch_size": 4}, "parallel": {"zero": 0}, "cluster": {"workers": 1}}
    return prepared_job(tiny_bert, {**data, "on_bad_row": "skip", "window_steps": _STEPS}, tmp_path, **sections)


def _train(prepared: PreparedJob, stop_after: int | None = None) -> Any:
    steps = itertools.count(1)
    return train_here(prepared, leave=lambda: next(steps) == stop_after)["lines"]


def test_a_batch_without_usable_rows_is_a_step_without_gradient(job: PreparedJob) -> None:
    losses = [loss for _, loss in run_group(1, _train, job)]
    norms = [line.grad_norm for line in job.run.read_metrics() if line.kind == "step"]
    assert len(losses) == _STEPS and all(map(math.isfinite, losses))
    assert [loss > 0 for loss in losses] == [norm is not None and norm > 0 for norm in norms]
    assert sum(norm == 0 for norm in norms) == _STEPS - _USABLE


def test_skipped_rows_are_counted_since_the_run_began(job: PreparedJob) -> None:
    run_group(1, _train, job, 2)
    run_group(1, _train, job)
    counts = [line.skipped_rows for line in job.run.read_metrics() if line.kind == "step"]
    assert counts == [_ROWS - _USABLE] * _STEPS
