"""Splits from file names, the names a job file gives them, and validation rows that are held out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.splits import open_split
from launcher.errors import DataError
from launcher.init import splits as module
from launcher.init.splits import FoundSplits, find_splits, hold_out, is_validation, split_of
from tests.support.toy_data import named_classes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _touch(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.parquet", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("train/part-0.parquet", "train"),
        ("sst2_dev.csv", "validation"),
        ("val.jsonl", "validation"),
        ("valid/a.parquet", "validation"),
        ("TEST.parquet", "test"),
        ("train/test-clip.parquet", "train"),
        ("train_test.parquet", ""),
        ("contest.parquet", ""),
        ("items.parquet", ""),
    ],
)
def test_split_follows_from_the_file_name(path: str, split: str) -> None:
    assert split_of(path) == split


@pytest.mark.parametrize(
    ("files", "locations"),
    [
        (["train.parquet", "valid.csv"], {"train": ("d/train.parquet",), "validation": ("d/valid.csv",)}),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"],
            {"train": ("d/data/train-*.parquet",), "test": ("d/data/test-0.parquet",)},
        ),
        (["train/a.csv", "train/b.csv", "dev/a.csv"], {"train": ("d/train",), "validation": ("d/dev/a.csv",)}),
        (["a.parquet", "b.parquet"], {"train": ("d",)}),
        (["data-0.arrow", "data-1.arrow", "state.json"], {"train": ("d",)}),
        (["train/data-0.arrow", "train/state.json", "dataset_dict.json"], {"train": ("d/train/data-0.arrow",)}),
        (["a.pq", "b.pq", "test.pq"], {"train": ("d/a.pq", "d/b.pq"), "test": ("d/test.pq",)}),
    ],
)
def test_directory_is_divided_by_file_names(
    files: list[str], locations: dict[str, tuple[str, ...]], folder: Path
) -> None:
    _touch(*(f"d/{file}" for file in files))
    assert find_splits("d").locations == locations
    absolute = {name: tuple(f"{folder}/{place}" for place in places) for name, places in locations.items()}
    assert find_splits(f"{folder}/d").locations == absolute


def test_files_without_a_split_are_left_out(folder: Path) -> None:
    _touch("d/train.parquet", "d/items.parquet")
    assert find_splits("d") == FoundSplits({"train": ("d/train.parquet",)}, ("items.parquet",))


def test_single_file_is_for_training(folder: Path) -> None:
    _touch("train.parquet", "validation.parquet", "eval.parquet", "sub/test.parquet")
    assert find_splits("train.parquet") == FoundSplits(
        {"train": ("train.parquet",)}, (), {"validation": "validation.parquet"}
    )
    assert find_splits("validation.parquet") == FoundSplits({"train": ("validation.parquet",)})
    assert find_splits("trai*.parquet").locations == {"train": ("train.parquet",)}
    assert find_splits("hub:org/name#train") == FoundSplits({"train": ("hub:org/name#train",)})


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nowhere", "nowhere does not exist; give a file, a directory or a glob that does"),
        ("d", "d: its files are all for test and validation by their names; name the file to train on"),
        ("*.parquet", "*.parquet matches no data files (.parquet, .pq, .arrow, .feather, .ipc, .csv, .tsv, .jsonl, "
                      ".ndjson, .json, .txt); name the files so"),
    ],
)  # fmt: skip
def test_location_without_training_files_is_refused(location: str, message: str, folder: Path) -> None:
    _touch("d/test.parquet", "d/dev.parquet")
    with pytest.raises(DataError) as caught:
        find_splits(location)
    assert caught.value.message == message


def _split(folder: Path, rows: int) -> object:
    table = named_classes(pa.table({"i": range(rows), "y": [i % 2 for i in range(rows)]}), "y", ["no", "yes"])
    pq.write_table(table, folder / "all.parquet", row_group_size=997)
    return open_split("train", [str(folder / "all.parquet")])


def test_parts_hold_every_row_once_in_order_with_class_names(tmp_path: Path) -> None:
    split = _split(tmp_path, 10_000)
    parts = hold_out(split, 0.1, tmp_path / "cut", False)
    train, validation = pq.read_table(parts.train), pq.read_table(parts.validation)
    assert (train.num_rows, validation.num_rows) == (parts.train_rows, parts.validation_rows)
    assert 900 < parts.validation_rows < 1100
    rows = [train.column("i").to_pylist(), validation.column("i").to_pylist()]
    assert sorted([*rows[0], *rows[1]]) == list(range(10_000)) and all(part == sorted(part) for part in rows)
    assert open_split("train", [parts.train]).class_names == (("y", ("no", "yes")),)
    assert pq.read_metadata(parts.train).num_row_groups == 1
    again = hold_out(split, 0.1, tmp_path / "again", False)
    assert Path(again.validation).read_bytes() == Path(parts.validation).read_bytes()
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["train.parquet", "validation.parquet"]


def test_held_out_rows_do_not_depend_on_the_number_of_rows() -> None:
    limit = int(0.1 * 2**64)
    few, many = (np.flatnonzero(is_validation(np.arange(n, dtype=np.uint64), limit)).tolist() for n in (100, 1000))
    assert few == [row for row in many if row < 100] and few


def test_at_least_one_row_is_held_out(tmp_path: Path) -> None:
    assert hold_out(_split(tmp_path, 4), 0.01, tmp_path / "cut", False).validation_rows == 1
    with pytest.raises(DataError, match=r"--split 0.1: there is 1 row, too few to divide; give more data"):
        hold_out(_split(tmp_path, 1), 0.1, tmp_path / "one", False)
    assert not (tmp_path / "one").exists()


def test_existing_files_are_replaced_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "validation.parquet").write_text("mine")
    with pytest.raises(DataError, match=r"cut/validation.parquet: exists already; give another --output, or --force"):
        hold_out(_split(tmp_path, 10), 0.1, tmp_path / "cut", False)
    assert hold_out(_split(tmp_path, 10), 0.1, tmp_path / "cut", True).validation_rows == 1


def test_failed_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_flush", fail)
    with pytest.raises(DataError, match=r"cut: cannot be written \(No space left on device\); give another --output"):
        hold_out(_split(tmp_path, 10), 0.1, tmp_path / "cut", False)
    assert list((tmp_path / "cut").iterdir()) == []
