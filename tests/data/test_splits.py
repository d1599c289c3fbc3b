"""Splits over real files: rows of every layout are read in the order asked for, and errors name file and remedy."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from launcher.data import splits
from launcher.data.files import SUFFIXES
from launcher.data.row_sample import sample_rows
from launcher.data.splits import Split, open_split
from launcher.errors import DataError, StorageUnavailableError, UserError
from launcher.predict.row_reader import RowReader

_COLUMNS = ["id", "text", "tags"]


def _table(rows: int, first: int = 0) -> pa.Table:
    """Return rows with their number in every column, nulls and empty texts and lists among them."""
    ids = range(first, first + rows)
    texts = [None if i % 11 == 3 else "" if i % 11 == 5 else f"text {i} é" for i in ids]
    tags = pa.array([None if i % 7 == 2 else [f"t{k}" for k in range(i % 4)] for i in ids], pa.list_(pa.string()))
    return pa.table({"id": pa.array(ids, pa.int64()), "text": pa.array(texts, pa.string()), "tags": tags})


def _write_ipc(path: Path, table: pa.Table, sizes: list[int]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        begin = 0
        for size in sizes:
            writer.write_table(table.slice(begin, size).combine_chunks())
            begin += size


def _many_small_files(folder: Path) -> list[str]:
    begin = 0
    for i in range(40):
        pq.write_table(_table(1 + i % 5, begin), folder / f"part-{i:03d}.parquet")
        begin += 1 + i % 5
    return [str(folder)]


def _row_groups(folder: Path) -> list[str]:
    pq.write_table(_table(503), folder / "all.pq", row_group_size=60)
    return [str(folder / "all.pq")]


def _large_row_group(folder: Path) -> list[str]:
    pq.write_table(_table(40000), folder / "all.parquet", row_group_size=40000)
    return [str(folder / "all.parquet")]


def _ipc_batches(folder: Path) -> list[str]:
    _write_ipc(folder / "a.arrow", _table(120), [1, 50, 9, 60])
    _write_ipc(folder / "b.ipc", _table(30, 120), [30])
    return [str(folder)]


def _feather(folder: Path) -> list[str]:
    pyarrow.feather.write_feather(_table(90), str(folder / "a.feather"), compression="lz4", chunksize=40)
    pyarrow.feather.write_feather(_table(10, 90), str(folder / "b.feather"), compression="uncompressed")
    return [str(folder / "*.feather")]


def _nested_folders(folder: Path) -> list[str]:
    for i, name in enumerate(["a/x", "a/y", "b/x"]):
        (folder / name).mkdir(parents=True)
        pq.write_table(_table(20, 20 * i), folder / name / "part.parquet", row_group_size=7)
    (folder / "a" / "README.md").write_text("not data")
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "a/x/part.parquet", folder / ".hidden/part.parquet")
    shutil.copy(folder / "a/x/part.parquet", folder / "a/_part.parquet")
    return [f"{folder}/"]


def _glob(folder: Path) -> list[str]:
    for i in range(4):
        pq.write_table(_table(25, 25 * i), folder / f"train-{i}.parquet")
    pq.write_table(_table(9), folder / "test-0.parquet")
    return [str(folder / "train-[0-9].parquet")]


def _list(folder: Path) -> list[str]:
    (folder / "more").mkdir()
    pq.write_table(_table(30), folder / "z.parquet")
    pq.write_table(_table(5, 30), folder / "more/b.parquet")
    pq.write_table(_table(6, 35), folder / "more/c.parquet")
    _write_ipc(folder / "a.arrow", _table(20, 41), [13, 7])
    return [str(folder / "z.parquet"), str(folder / "more"), str(folder / "a.*")]


def _with_empty_files(folder: Path) -> list[str]:
    pq.write_table(_table(0), folder / "0.parquet")
    pq.write_table(_table(10), folder / "1.parquet")
    pq.write_table(_table(0), folder / "2.parquet")
    _write_ipc(folder / "3.arrow", _table(0), [])
    _write_ipc(folder / "4.arrow", _table(8, 10), [3, 0, 5])
    pq.write_table(_table(4, 18), folder / "5.parquet")
    return [str(folder)]


_LAYOUTS = [
    _many_small_files, _row_groups, _large_row_group, _ipc_batches, _feather, _nested_folders, _glob, _list,
    _with_empty_files,
]  # fmt: skip


@pytest.fixture(params=_LAYOUTS, ids=lambda layout: layout.__name__.strip("_"))
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    layout: Callable[[Path], list[str]] = request.param
    return open_split("train", layout(tmp_path))


def test_rows_come_in_file_order(split: Split) -> None:
    assert split.name == "train"
    assert split.schema.names == _COLUMNS
    assert split.rows == sum(fragment.rows for fragment in split.fragments)
    assert all(fragment.rows > 0 for fragment in split.fragments)
    assert split.read(np.arange(split.rows), _COLUMNS).equals(_table(split.rows).combine_chunks())


def test_rows_are_read_in_the_order_asked_for(split: Split) -> None:
    whole = _table(split.rows)
    rng = np.random.default_rng(1)
    for size in (0, 1, 2, 5, split.rows):
        ids = rng.permutation(split.rows)[:size]
        for columns in (_COLUMNS, ["text"], ["tags", "id"]):
            assert split.read(ids, columns).equals(whole.select(columns).take(pa.array(ids)).combine_chunks())


def test_row_may_be_read_twice(split: Split) -> None:
    ids = np.random.default_rng(2).integers(0, split.rows, 50)
    assert split.read(ids, ["id"]).column("id").to_pylist() == ids.tolist()


def test_locate_returns_the_file_and_the_row_in_it(split: Split) -> None:
    files: dict[str, list[int]] = {}
    for path in dict.fromkeys(fragment.path for fragment in split.fragments):
        read = pq.read_table if Path(path).suffix in (".parquet", ".pq") else pyarrow.feather.read_table
        files[path] = read(path).column("id").to_pylist()
    for row in {*np.random.default_rng(3).integers(0, split.rows, 60).tolist(), *split.starts[:-1].tolist()}:
        path, inside = split.locate(row)
        assert files[path][inside] == row


def test_fingerprint_depends_on_the_data_and_not_on_the_directory(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    _many_small_files(old)
    before = open_split("train", [str(old)]).fingerprint
    assert open_split("validation", [str(old)]).fingerprint == before
    old.rename(new)
    for location in (str(new), f"{new}/*.parquet", new.as_uri()):
        assert open_split("train", [location]).fingerprint == before
    pq.write_table(_table(2), new / "part-000.parquet")
    changed = open_split("train", [str(new)]).fingerprint
    assert changed != before
    (new / "part-001.parquet").rename(new / "part-999.parquet")
    assert open_split("train", [str(new)]).fingerprint not in (before, changed)


def test_row_groups_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    pq.write_table(_table(100), tmp_path / "a.parquet", row_group_size=50)
    before = open_split("train", [str(tmp_path)])
    pq.write_table(_table(100), tmp_path / "a.parquet", row_group_size=25)
    after = open_split("train", [str(tmp_path)])
    assert [fragment.rows for fragment in before.fragments] == [50, 50]
    assert [(f.index, f.file_row, f.rows) for f in after.fragments] == [(i, 25 * i, 25) for i in range(4)]
    assert before.fingerprint != after.fingerprint


def test_format_may_be_given_for_files_without_a_known_ending(tmp_path: Path) -> None:
    pq.write_table(_table(5), tmp_path / "data.bin")
    pq.write_table(_table(6, 5), tmp_path / "more.PARQUET")
    assert open_split("train", [str(tmp_path / "data.bin")], "parquet").rows == 5
    assert open_split("train", [str(tmp_path / "more.PARQUET")]).rows == 6
    assert open_split("train", [str(tmp_path)], "parquet").rows == 11


def test_file_may_have_more_columns_in_another_order(tmp_path: Path) -> None:
    pq.write_table(_table(5), tmp_path / "a.parquet")
    more = _table(5, 5).append_column("extra", pa.array(range(5)))
    pq.write_table(more.select(["extra", "tags", "id", "text"]), tmp_path / "b.parquet")
    split = open_split("train", [str(tmp_path)])
    ids = np.array([9, 0, 5, 4])
    assert split.read(ids, _COLUMNS).equals(_table(10).take(pa.array(ids)).combine_chunks())


def _message(*locations: object, format: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        open_split("validation", [str(location) for location in locations], format)
    assert isinstance(caught.value, UserError)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("name", ["gone", "gone.parquet", "gone/*.parquet"])
def test_missing_path_is_refused(tmp_path: Path, name: str) -> None:
    missing = f"{tmp_path}/{name}"
    expected = f"data.validation: {missing} does not exist; give a file, a directory or a glob that does"
    assert _message(missing) == expected
    pq.write_table(_table(5), tmp_path / "a.parquet")
    assert _message(tmp_path / "a.parquet", missing) == expected


def test_split_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(_table(0), tmp_path / "a.parquet")
    pq.write_table(_table(0), tmp_path / "b.parquet")
    assert _message(tmp_path) == f"data.validation: {tmp_path}/a.parquet has no rows; give a file that has"


def test_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.dat").write_text("id\n1\n")
    remedy = f"({', '.join(SUFFIXES)}); name the files so, or set data.format"
    assert _message(tmp_path / "data.dat") == f"data.validation: {tmp_path}/data.dat has no known ending {remedy}"
    assert _message(tmp_path) == f"data.validation: {tmp_path} holds no data files {remedy}"
    assert _message(tmp_path / "*.parquet") == f"data.validation: {tmp_path}/*.parquet matches no data files {remedy}"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["text", "text"]), tmp_path / "a.parquet")
    assert _message(tmp_path) == f"{tmp_path}/a.parquet: has two columns named 'text'; rename one of them"


def test_column_may_be_asked_for_twice(tmp_path: Path) -> None:
    pq.write_table(_table(5), tmp_path / "a.parquet")
    assert open_split("train", [str(tmp_path)]).read(np.arange(5), ["id", "id"]).column_names == ["id"]


def test_unreachable_storage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no route to\x1b[2J host\nmore")

    monkeypatch.setattr("launcher.data.files.open_uri", fail)
    assert _message("s3://bucket/x.parquet") == (
        "data.validation: s3://bucket/x.parquet cannot be listed (no route to?[2J host); "
        "check the address, the network and your rights"
    )


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(_table(3), tmp_path / "a.parquet")
    pq.write_table(_table(3).drop_columns(["text"]), tmp_path / "b.parquet")
    assert _message(tmp_path) == (
        f"{tmp_path}/b.parquet: has no column 'text', which {tmp_path}/a.parquet has; "
        "give all files of a split the same columns"
    )


def test_files_with_other_types_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"label": ["x", "y"]}), tmp_path / "b.parquet")
    message = _message(tmp_path)
    assert message.startswith(f"{tmp_path}/b.parquet: ")
    assert all(word in message for word in ("'label'", "int64", "string", f"{tmp_path}/a.parquet"))


def test_files_may_differ_in_the_width_of_a_number(tmp_path: Path) -> None:
    for name, kind in (("a", pa.int32()), ("b", pa.int64())):
        pq.write_table(pa.table({"label": pa.array([1, 2], kind)}), tmp_path / f"{name}.parquet")
    split = open_split("train", [str(tmp_path)])
    assert split.read(np.array([3, 0]), ["label"]).to_pydict() == {"label": [2, 1]}


@pytest.mark.parametrize(
    "more", [[], [{"tool_calls": [{"name": "f"}]}], [{"weight": 1}]], ids=["same", "list", "number"]
)
def test_fields_of_nothing_but_nulls_are_read(tmp_path: Path, more: list[dict[str, object]]) -> None:
    """Read conversations whose messages have a name that is always null, in one file and in files of other fields."""
    message = {"role": "user", "content": "hello", "name": None, "tool_calls": None}
    rows = [[message] * 2, [message], [message] * 3]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    for fields in more:
        pq.write_table(pa.table({"messages": [[{**message, **fields}]]}), tmp_path / "b.parquet")
    split = open_split("train", [str(tmp_path)])
    for table in (
        split.read(np.arange(3), ["messages"]),
        sample_rows(split, ["messages"], 100).slice(0, 3),
        RowReader(split, 16).read(range(3)),
    ):
        table.validate(full=True)
        read = table.column("messages").to_pylist()
        assert [[{**one, "weight": None} for one in row] for row in read] == [
            [{**one, "weight": None} for one in row] for row in rows
        ]


@pytest.mark.parametrize(("name", "format"), [("b.parquet", "parquet"), ("b.arrow", "arrow")])
@pytest.mark.parametrize("content", [b"", b"no data at all, but long enough for a footer", b"PAR1....PAR1"])
def test_broken_file_is_refused(tmp_path: Path, name: str, format: str, content: bytes) -> None:
    pq.write_table(_table(3), tmp_path / "a.parquet")
    (tmp_path / name).write_bytes(content)
    message = _message(tmp_path)
    assert message.startswith(f"{tmp_path}/{name}: not a readable {format} file (")
    assert message.endswith("); restore or remove it")


def test_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(_table(300), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    assert _message(tmp_path).startswith(f"{tmp_path}/a.parquet: not a readable parquet file (")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_file_that_is_removed_while_in_use_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _write_ipc(path, _table(9), [9]) if name == "a.arrow" else pq.write_table(_table(9), path)
    split = open_split("train", [str(path)])
    path.unlink()
    with pytest.raises(DataError) as caught:
        split.read(np.arange(3), ["id"])
    assert caught.value.message.startswith(f"{path}: cannot be read (")
    assert caught.value.message.endswith("); restore the file")


def test_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(_table(3000), path, compression="zstd")
    split = open_split("train", [str(path)])
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        split.read(np.arange(10), ["id"])
    assert caught.value.message.startswith(f"{path}: cannot be read (")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_view_types_of_arrow_are_read_as_plain_types(tmp_path: Path, kind: str) -> None:
    """Read texts of Polars, which are views, and of pandas as one column."""
    plain = _table(60).select(["id", "text"])
    views = plain.cast(pa.schema([("id", pa.int64()), ("text", pa.string_view())]))
    if kind == "parquet":
        pq.write_table(views, tmp_path / "a.parquet")
        pq.write_table(plain, tmp_path / "b.parquet")
    else:
        nested = views.append_column("tags", _table(60).column("tags").cast(pa.list_(pa.string_view())))
        _write_ipc(tmp_path / "a.arrow", nested, [60])
        _write_ipc(tmp_path / "b.arrow", _table(60), [60])
    split = open_split("train", [str(tmp_path)])
    names = ["id", "text"] if kind == "parquet" else _COLUMNS
    ids = np.array([3, 71, 2, 59, 60])
    rows = split.read(ids, names)
    assert rows.to_pylist() == [_table(60).select(names).to_pylist()[i % 60] for i in ids]
    assert rows.schema.field("text").type == pa.string()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_storage_that_does_not_answer_is_not_a_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pq.write_table(_table(9), tmp_path / "a.parquet")
    split = open_split("train", [str(tmp_path)])

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(splits.pq, "ParquetFile", fail)
    with pytest.raises(StorageUnavailableError, match=os.strerror(number)):
        split.read(np.arange(3), ["id"])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("sizes", "columns", "change"),
    [
        ([50, 40], ["id"], "it had 50 rows where it has 40"),
        ([50, 60], ["id"], "it had 50 rows where it has 60"),
        ([50], ["id"], "it had 50 rows where it has 0"),
        ([50, 50], ["text"], "it had a column 'id'"),
    ],
)
def test_file_that_changes_while_in_use_is_named(
    tmp_path: Path, name: str, sizes: list[int], columns: list[str], change: str
) -> None:
    path = tmp_path / name

    def write(sizes: list[int], columns: list[str]) -> None:
        table = _table(sum(sizes)).select(columns)
        if name == "a.arrow":
            _write_ipc(path, table, sizes)
            return
        with pq.ParquetWriter(path, table.schema) as writer:
            for group in range(len(sizes)):
                writer.write_table(table.slice(sum(sizes[:group]), sizes[group]))

    write([50, 50], ["id"])
    split = open_split("train", [str(path)])
    write(sizes, columns)
    with pytest.raises(DataError) as caught:
        split.read(np.array([51, 99]), ["id"])
    assert caught.value.message == f"{path}: changed while it was in use ({change}); restore the file"
