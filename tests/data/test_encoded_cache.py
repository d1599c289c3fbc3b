"""The cache of encoded rows: the same stream, encoded once, whatever happens to the files."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from launcher.data import encoded_cache
from launcher.data.encoded_cache import Block
from launcher.data.in_memory import InMemorySource
from launcher.data.stream import StreamSource
from launcher.data.windows import evaluation_windows, train_windows
from launcher.driver.prepare import PreparedJob, prepare
from launcher.errors import DataError
from launcher.spec.data import CacheSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.tasks.samples import Encoded
from tests.support.jobs import example_table, make_job, prepared_job, write_splits
from tests.support.worker_group import share_cells

TASKS = ["text-classification", "token-classification", "question-answering", "causal-lm", "image-classification"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make splits of several blocks that need several passes; drop what other tests left in memory."""
    monkeypatch.setattr(encoded_cache, "BLOCK_ROWS", 16)
    monkeypatch.setattr(encoded_cache, "_MAX_BLOCKS_AT_ONCE", 2)
    encoded_cache._entry.cache_clear()
    yield
    encoded_cache._entry.cache_clear()


def _job(model: Path, folder: Path, cached: bool, **sections: Any) -> PreparedJob:
    kind = sections.get("task", {}).get("type", "text-classification")
    if not (folder / "data").exists():
        write_splits(folder / "data", 83, 29, row_group=20, task=kind)
    data = {name: str(folder / f"data/{name}.parquet") for name in ("train", "validation")}
    cache = {"cache": {"path": str(folder / "cache")}} if cached else {}
    data |= cache | sections.pop("data", {})
    train = {"epochs": 2, **sections.pop("train", {})}
    return prepared_job(model, data, folder, train=train, **sections)


def _shards(prepared: PreparedJob) -> list[bytes]:
    return [shard.to_pybytes() for rank in range(2) for shard in share_cells(prepared, 2, rank, 0)]


class _Counted:
    """Counter of the rows that a task encodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
        self.rows = 0
        encode_rows = type(task).encode

        def encode(task: Task, rows: pa.Table, *args: Any) -> Encoded:
            self.rows += len(rows)
            return encode_rows(task, rows, *args)

        monkeypatch.setattr(type(task), "encode", encode)


def _blocks(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*/*.block"))


@pytest.mark.parametrize("kind", TASKS)
def test_stream_is_the_same_and_encodes_each_row_once(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    task = {"type": kind} | ({} if kind == "image-classification" else {"max_length": 32})
    plain = _shards(_job(tiny_models[kind], tmp_path, cached=False, task=task))
    prepared = _job(tiny_models[kind], tmp_path, cached=True, task=task)
    counted = _Counted(monkeypatch, build_task(prepared.job))
    assert _shards(prepared) == plain
    assert counted.rows == 83 + 29, "both epochs, both evaluations and both workers"
    encoded_cache._entry.cache_clear()  # as in another process
    assert _shards(prepared) == plain
    assert counted.rows == 83 + 29
    assert not list((tmp_path / "cache").glob("*/.*"))


def test_augmented_rows_are_not_cached(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    task = {"type": "image-classification", "augment": {"flip_fraction": 0.5}}
    model = tiny_models["image-classification"]
    plain = _shards(_job(model, tmp_path, cached=False, task=task))
    prepared = _job(model, tmp_path, cached=True, task=task)
    assert _shards(prepared) == plain
    assert len(_blocks(tmp_path)) == 2  # of validation
    assert any(note.startswith("data.cache: training rows are augmented") for note in prepared.plan.notes)


def test_unusable_rows_are_skipped_or_refused_as_without_a_cache(tiny_bert: Path, tmp_path: Path) -> None:
    table = example_table(83)
    texts = table.column("text").to_pylist()
    texts[13] = texts[57] = None
    texts[16:32] = [None] * 16  # a whole block
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": texts, "label": table.column("label")}), tmp_path / "data/train.parquet")
    pq.write_table(example_table(29), tmp_path / "data/validation.parquet")
    skip = {"on_bad_row": "skip"}
    plain = _shards(_job(tiny_bert, tmp_path, cached=False, data=skip))
    for _ in range(2):
        assert _shards(_job(tiny_bert, tmp_path, cached=True, data=skip)) == plain
        encoded_cache._entry.cache_clear()
    with pytest.raises(DataError, match=r"train\.parquet: row \d+: text is null; fix the row"):
        _shards(_job(tiny_bert, tmp_path, cached=True))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "removed"])
def test_damaged_block_is_made_again(tiny_bert: Path, tmp_path: Path, damage: str) -> None:
    prepared = _job(tiny_bert, tmp_path, cached=True)
    plain = _shards(prepared)
    victim = max(_blocks(tmp_path), key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    rows = Block.open(victim).samples.to_pylist()
    if damage == "removed":
        victim.unlink()
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        victim.write_bytes({"cut": content[:-100], "flipped": flipped, "empty": b""}[damage])
    for _ in range(2):
        encoded_cache._entry.cache_clear()
        assert _shards(prepared) == plain
    # Not byte by byte: unused bits of a bitmap depend on the rows that were encoded in the same pass.
    assert Block.open(victim).samples.to_pylist() == rows


def test_another_encoding_has_another_entry(tiny_bert: Path, tmp_path: Path) -> None:
    first = _job(tiny_bert, tmp_path, cached=True)
    _shards(first)
    count = len(_blocks(tmp_path))
    _shards(_job(tiny_bert, tmp_path, cached=True, seed=5, train={"learning_rate": 1.0}))
    assert len(_blocks(tmp_path)) == count, "the seed and the learning rate do not change how a row is encoded"
    _shards(_job(tiny_bert, tmp_path, cached=True, task={"max_length": 5}))
    assert len(_blocks(tmp_path)) == 2 * count
    # Other rows of the same number and file size: the order stays, what was encoded does not.
    path = tmp_path / "data/train.parquet"
    pq.write_table(example_table(83, 0).take(pa.array(np.arange(83)[::-1])), path, row_group_size=20)
    os.utime(path, (1, 1))
    changed = _job(tiny_bert, tmp_path, cached=True)
    assert _shards(changed) == _shards(_job(tiny_bert, tmp_path, cached=False))


def test_another_version_of_the_launcher_has_another_entry(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a chat is rendered or a column read is decided outside of the task's own module."""
    job = _job(tiny_bert, tmp_path, cached=True)
    _shards(job)
    count = len(_blocks(tmp_path))
    encoded_cache._entry.cache_clear()
    _shards(job)
    assert len(_blocks(tmp_path)) == count
    encoded_cache._entry.cache_clear()
    monkeypatch.setattr(encoded_cache, "_PACKAGE", tmp_path)
    (tmp_path / "changed.py").touch()
    _shards(job)
    assert len(_blocks(tmp_path)) == 2 * count


def test_full_cache_adds_nothing_and_changes_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _shards(_job(tiny_bert, tmp_path, cached=False))
    prepared = _job(tiny_bert, tmp_path, cached=True, data={"cache": {"path": str(tmp_path / "cache"), "gib": 1e-9}})
    counted = _Counted(monkeypatch, build_task(prepared.job))
    assert _shards(prepared) == plain
    assert counted.rows > 83 + 29
    assert len(_blocks(tmp_path)) < 8


def test_least_recently_used_entries_are_evicted_first(tmp_path: Path) -> None:
    now = time.time()
    for name, hours in (("recent", 0.1), ("old", 3), ("older", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000000.block").write_bytes(bytes(100))
        (tmp_path / name / "used").touch()
        os.utime(tmp_path / name / "used", (now - 3600 * hours,) * 2)
    (tmp_path / "other").mkdir()  # not an entry of the cache
    (tmp_path / "other" / "thesis.txt").write_bytes(bytes(1000))
    assert encoded_cache.evict(tmp_path, 1000) == 300
    assert encoded_cache.evict(tmp_path, 250) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "other", "recent"]
    assert encoded_cache.evict(tmp_path, 10) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "recent"]


def test_unwritable_cache_is_warned_about_and_changes_nothing(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _shards(_job(tiny_bert, tmp_path, cached=False))
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING, "launcher"):
        assert _shards(_job(tiny_bert, tmp_path, cached=True)) == plain
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and all("no more rows are cached (" in line for line in warnings)  # one per split


def test_cache_is_in_the_storage_unless_that_is_remote(tiny_bert: Path, tmp_path: Path) -> None:
    data = {**write_splits(tmp_path / "data", 20), "cache": {}}
    assert encoded_cache.cache_root(make_job(tiny_bert, data, tmp_path)) == f"{tmp_path}/.cache/encoded"
    remote = make_job(tiny_bert, data, tmp_path, output={"storage": "s3://key:secret@bucket/runs"})
    with pytest.raises(DataError, match=r"^data\.cache: s3://bucket/runs is remote, .* set data\.cache\.path to a"):
        prepare(remote)
    with pytest.raises(ValidationError, match="give a directory on the nodes"):
        CacheSpec(path="s3://bucket/cache")


def test_trials_of_a_sweep_fill_and_read_the_cache(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = _job(tiny_bert, tmp_path, cached=True)
    counted = _Counted(monkeypatch, build_task(prepared.job))
    rows = prepared.splits["validation"].rows
    windows = [
        *train_windows(prepared.plan, prepared.job, 0),
        *evaluation_windows("validation", (rows,), prepared.job, 1),
    ]
    in_memory = InMemorySource(prepared.job, prepared.splits, 2)
    plain = StreamSource(_job(tiny_bert, tmp_path, cached=False).job, prepared.splits, 2)
    assert [list(in_memory.read(window)) for window in windows] == [list(plain.read(window)) for window in windows]
    encoded = counted.rows
    assert _shards(prepared)
    assert counted.rows == encoded


def test_block_is_the_same_after_writing_and_reading(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path, cached=False)
    task = build_task(prepared.job)
    rows = example_table(10).set_column(0, "text", pa.array([None, *["w1 w2"] * 8, None]))
    block = Block.of([task.encode(rows, True)], [10])
    with (tmp_path / "x.block").open("wb") as file:
        size = block.slice(2, 10).write(file)
    assert size == (tmp_path / "x.block").stat().st_size
    copy = Block.open(tmp_path / "x.block")
    assert copy.reasons == {7: "text is null"} and copy.place.tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    assert copy.samples.equals(block.samples.slice(1)) and copy.samples.schema == block.samples.schema
