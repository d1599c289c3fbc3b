"""Files of one split that differ in what nobody reads, or hold nothing (BUGS.md q26, q28)."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.convert import splittable_files
from launcher.data.splits import Split, open_files
from launcher.driver.prepare import _repeated_file_notes
from launcher.errors import DataError
from launcher.tasks.base import ColumnKind

_KINDS: dict[str, ColumnKind] = {"text": "text", "label": "class"}
_ROWS = {"text": ["a", "b"], "label": [0, 1]}


def _open(folder: Path, kinds: dict[str, ColumnKind] = _KINDS) -> Split:
    ready = splittable_files("train", [str(folder)], "auto", str(folder.parent / "cache"), kinds)
    return open_files("train", ready, kinds=kinds)


def _read(split: Split) -> list[object]:
    return split.read(np.arange(split.rows), ["text", "label"]).to_pylist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kinds", [_KINDS, {}], ids=["task", "init"])
def test_a_column_of_some_files_that_nobody_reads_is_left_out(
    folder: Path, first: bool, kinds: dict[str, ColumnKind]
) -> None:
    """q26: the index that pandas leaves."""
    more = {**_ROWS, "__index_level_0__": [4, 5]}
    pq.write_table(pa.table(more if first else _ROWS), folder / "part1.parquet")
    pq.write_table(pa.table(_ROWS if first else more), folder / "part2.parquet")
    split = _open(folder, kinds)
    assert _read(split) == pa.table(_ROWS).to_pylist() * 2
    assert (split.schema.names, split.left_out) == (["text", "label"], ("__index_level_0__",))


def test_a_type_that_nobody_reads_does_not_decide(folder: Path) -> None:
    """q26, of types."""
    pq.write_table(pa.table({**_ROWS, "note": [1, 2]}), folder / "part1.parquet")
    pq.write_table(pa.table({**_ROWS, "note": ["x", "y"]}), folder / "part2.parquet")
    assert _open(folder).left_out == ("note",)
    with pytest.raises(DataError, match="column 'note' is string, but int64 in"):
        _open(folder, {"note": "class"})


def test_two_columns_without_a_name_are_nobodys(folder: Path) -> None:
    """q26: a spreadsheet leaves them behind the others; two of a name that is read are refused."""
    (folder / "a.csv").write_text("text,label,,\na,0,,\nb,1,,\n")
    assert _read(_open(folder)) == pa.table(_ROWS).to_pylist()
    (folder / "a.csv").write_text("text,label,text\na,0,c\n")
    with pytest.raises(DataError, match="has two columns named 'text'; rename one of them"):
        _open(folder)


@pytest.mark.parametrize("nothing", ["text,label\n", ""], ids=["header", "no bytes"])
@pytest.mark.parametrize("name", ["part1.csv", "part3.csv"])
def test_a_part_without_rows_adds_none(folder: Path, name: str, nothing: str) -> None:
    """q28."""
    (folder / name).write_text(nothing)
    (folder / "part2.csv").write_text("text,label\na,0\nb,1\n")
    assert _read(_open(folder)) == pa.table(_ROWS).to_pylist()


def test_a_csv_of_names_alone_is_refused(folder: Path) -> None:
    (folder / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"data\.train: .*a\.csv has no rows; give a file that has"):
        _open(folder)


def test_a_file_that_is_named_repeated_file_notes_is_noted(folder: Path) -> None:
    """q39."""
    (folder / "a.csv").write_text("text,label\na,0\nb,1\n")
    once = _open(folder)
    ready = splittable_files("train", [str(folder), f"{folder}/a.csv"], "auto", str(folder.parent / "cache"), _KINDS)
    twice = open_files("train", ready, kinds=_KINDS)
    assert twice.rows == 2 * once.rows
    said = f"data.train: {folder}/a.csv is named more than once, and its rows count as often"
    assert _repeated_file_notes({"validation": once, "train": twice}) == [said]
