"""Files of one split that differ in columns that no task reads, or have no rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.splits import Split
from launcher.driver.plan_notes import repeated_file_notes
from launcher.errors import DataError
from launcher.tasks.params import ColumnKind
from tests.support.data_files import open_data, read_all

_KINDS: dict[str, ColumnKind] = {"text": "text", "label": "class"}
_ROWS = {"text": ["a", "b"], "label": [0, 1]}


def _open(*locations: Path, kinds: dict[str, ColumnKind] = _KINDS) -> Split:
    return open_data(*locations, cache=locations[0].parent / "cache", kinds=kinds)


def _read(split: Split) -> list[object]:
    return read_all(split, "text", "label").to_pylist()  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("kinds", [_KINDS, {}], ids=["task", "init"])
def test_unread_column_of_some_files_is_ignored(folder: Path, is_first: bool, kinds: dict[str, ColumnKind]) -> None:
    """Ignore the index that pandas writes, for example."""
    more = {**_ROWS, "__index_level_0__": [4, 5]}
    pq.write_table(pa.table(more if is_first else _ROWS), folder / "part1.parquet")
    pq.write_table(pa.table(_ROWS if is_first else more), folder / "part2.parquet")
    split = _open(folder, kinds=kinds)
    assert _read(split) == pa.table(_ROWS).to_pylist() * 2
    assert (split.schema.names, split.left_out) == (["text", "label"], ("__index_level_0__",))


def test_only_columns_that_are_read_need_one_type(folder: Path) -> None:
    pq.write_table(pa.table({**_ROWS, "note": [1, 2]}), folder / "part1.parquet")
    pq.write_table(pa.table({**_ROWS, "note": ["x", "y"]}), folder / "part2.parquet")
    assert _open(folder).left_out == ("note",)
    with pytest.raises(DataError, match="column 'note' is string, but int64 in"):
        _open(folder, kinds={"note": "class"})


def test_only_columns_that_are_read_need_unique_names(folder: Path) -> None:
    """Accept what a spreadsheet exports: columns without a name behind the others."""
    (folder / "a.csv").write_text("text,label,,\na,0,,\nb,1,,\n")
    assert _read(_open(folder)) == pa.table(_ROWS).to_pylist()
    (folder / "a.csv").write_text("text,label,text\na,0,c\n")
    with pytest.raises(DataError, match="has two columns named 'text'; rename one of them"):
        _open(folder)


@pytest.mark.parametrize("content", ["text,label\n", ""], ids=["header", "no bytes"])
@pytest.mark.parametrize("name", ["part1.csv", "part3.csv"])
def test_file_without_rows_adds_none(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    (folder / "part2.csv").write_text("text,label\na,0\nb,1\n")
    assert _read(_open(folder)) == pa.table(_ROWS).to_pylist()


def test_csv_with_a_header_alone_is_refused(folder: Path) -> None:
    (folder / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"data\.train: .*a\.csv has no rows; give a file that has"):
        _open(folder)


def test_file_that_is_named_twice_is_noted(folder: Path) -> None:
    (folder / "a.csv").write_text("text,label\na,0\nb,1\n")
    once = _open(folder)
    twice = _open(folder, folder / "a.csv")
    assert twice.rows == 2 * once.rows
    note = f"data.train: {folder}/a.csv is named more than once, and its rows count as often"
    assert repeated_file_notes({"validation": once, "train": twice}) == [note]
