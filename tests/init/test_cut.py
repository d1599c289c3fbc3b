"""Validation rows are cut off the same way every time, and files appear whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.splits import open_split
from launcher.errors import DataError
from launcher.init import cut as module
from launcher.init.cut import hold_out, is_validation
from tests.support.toy_data import named_classes


def _split(folder: Path, rows: int) -> object:
    table = named_classes(pa.table({"i": range(rows), "y": [i % 2 for i in range(rows)]}), "y", ["no", "yes"])
    pq.write_table(table, folder / "all.parquet", row_group_size=997)
    return open_split("train", [str(folder / "all.parquet")])


def test_every_row_once_in_order_with_the_names_of_classes(tmp_path: Path) -> None:
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


def test_which_row_goes_where_does_not_depend_on_how_many_there_are() -> None:
    limit = int(0.1 * 2**64)
    few, many = (np.flatnonzero(is_validation(np.arange(n, dtype=np.uint64), limit)).tolist() for n in (100, 1000))
    assert few == [row for row in many if row < 100] and few


def test_small_data_gives_at_least_one_row(tmp_path: Path) -> None:
    assert hold_out(_split(tmp_path, 4), 0.01, tmp_path / "cut", False).validation_rows == 1
    with pytest.raises(DataError, match=r"--split 0.1: there is 1 row, too few to cut; give more data"):
        hold_out(_split(tmp_path, 1), 0.1, tmp_path / "one", False)
    assert not (tmp_path / "one").exists()


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "validation.parquet").write_text("mine")
    with pytest.raises(DataError, match=r"cut/validation.parquet: is there already; give another --output, or --force"):
        hold_out(_split(tmp_path, 10), 0.1, tmp_path / "cut", False)
    assert hold_out(_split(tmp_path, 10), 0.1, tmp_path / "cut", True).validation_rows == 1


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_flush", fail)
    with pytest.raises(DataError, match=r"cut: cannot be written \(No space left on device\); give another --output"):
        hold_out(_split(tmp_path, 10), 0.1, tmp_path / "cut", False)
    assert list((tmp_path / "cut").iterdir()) == []
