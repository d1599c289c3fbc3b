"""Parameters inferred from large data are cached, and inferred again where the files changed."""

import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import launcher.data.label_inference
from launcher.data.splits import Split
from launcher.driver.prepare import prepare
from tests.support.jobs import make_job, write_splits


def test_large_label_column_is_read_once(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher.data.label_inference, "_MIN_CACHED_ROWS", 1)
    reads: list[str] = []
    pieces = Split.iter_column
    monkeypatch.setattr(Split, "iter_column", lambda split, name: reads.append(name) or pieces(split, name))  # type: ignore[func-returns-value]
    data = write_splits(tmp_path / "data", 60)
    job = make_job(tiny_bert, data, tmp_path / "runs", task={"class_weights": "balanced"})
    first = prepare(job).job.task
    assert reads and first.parameters()["labels"]
    reads.clear()
    assert prepare(job).job.task == first and not reads

    other = make_job(tiny_bert, data, tmp_path / "runs")
    assert prepare(other).job.task != first, "other parameters have an entry of their own"
    assert reads
    reads.clear()
    table = pq.read_table(data["train"])
    changed = pa.array(["new", *table.column("label").cast(pa.string()).to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("label"), "label", changed), data["train"])
    assert "new" in prepare(job).job.task.parameters()["labels"] and reads  # type: ignore[operator]

    for record in (tmp_path / "runs/.cache/learned").iterdir():
        os.truncate(record, 7)
    with caplog.at_level(logging.WARNING):
        assert "new" in prepare(job).job.task.parameters()["labels"]  # type: ignore[operator]
    assert "the label column is read again" in caplog.text


def test_parameters_of_small_data_are_not_cached(tiny_bert: Path, tmp_path: Path) -> None:
    prepare(make_job(tiny_bert, write_splits(tmp_path / "data", 60), tmp_path / "runs"))
    assert not (tmp_path / "runs/.cache/learned").exists()
