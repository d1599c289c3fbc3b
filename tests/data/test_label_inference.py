"""What the data tells of a task is kept for large data, and read anew where the files changed."""

import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import launcher.data.label_inference
from launcher.data.splits import Split
from launcher.driver.prepare import prepare, with_absolute_paths
from tests.support.jobs import make_job, write_splits


def test_a_large_column_is_read_once(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher.data.label_inference, "_WORTH_KEEPING", 1)
    reads: list[str] = []
    inner = Split.pieces
    monkeypatch.setattr(Split, "pieces", lambda split, name: reads.append(name) or inner(split, name))  # type: ignore[func-returns-value]
    data = write_splits(tmp_path / "data", 60)
    job = make_job(tiny_bert, data, tmp_path / "runs", task={"class_weights": "balanced"})
    first = prepare(job).job.task
    assert reads and first.parameters()["labels"]
    reads.clear()
    assert prepare(job).job.task == first and not reads

    other = make_job(tiny_bert, data, tmp_path / "runs")
    assert prepare(other).job.task != first, "other parameters are another matter"
    assert reads
    reads.clear()
    file = Path(data["train"])
    file = file if file.is_file() else next(file.rglob("*.parquet"))
    table = pq.read_table(file)
    changed = pa.array(["new", *table.column("label").cast(pa.string()).to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("label"), "label", changed), file)
    assert "new" in prepare(job).job.task.parameters()["labels"] and reads  # type: ignore[operator]

    for kept in (tmp_path / "runs/.cache/learned").iterdir():
        os.truncate(kept, 7)
    with caplog.at_level(logging.WARNING):
        assert "new" in prepare(job).job.task.parameters()["labels"]  # type: ignore[operator]
    assert "the data is read anew" in caplog.text


def test_small_data_leaves_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    prepare(make_job(tiny_bert, write_splits(tmp_path / "data", 60), tmp_path / "runs"))
    assert not (tmp_path / "runs/.cache/learned").exists()


def test_the_home_directory_is_known_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home/model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    job = with_absolute_paths(make_job(Path("~/model"), {"train": "~/data/train.parquet"}, Path("~/runs")))
    assert job.model.name == str(tmp_path / "home/model")
    assert job.data.train == (str(tmp_path / "home/data/train.parquet"),)
    assert job.output.storage == str(tmp_path / "home/runs")
