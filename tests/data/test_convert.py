"""Files without footers become Parquet once, with every value intact."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest

from launcher.data.convert import splittable_files
from launcher.errors import DataError, RunError
from tests.support.data_files import open_data, read_all, use_own_hub_cache

_TEXTS = ["plain", "two\nlines", 'a "quoted", one', "", "tab\there", "é 漢字"]
_ROWS = {"text": _TEXTS * 50, "label": [i % 3 for i in range(300)]}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _write(path: Path) -> None:
    if path.suffix in (".csv", ".tsv", ".txt"):
        delimiter = "\t" if path.suffix == ".tsv" else ","
        pa.csv.write_csv(pa.table(_ROWS), str(path), pa.csv.WriteOptions(delimiter=delimiter))
        return
    rows = pa.table(_ROWS).to_pylist()
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _convert(cache: Path, *locations: "Path | str", name: str = "train") -> list[str]:
    ready = splittable_files(name, [str(location) for location in locations], "auto", str(cache))
    return [file.path for file in ready]


def _read(*paths: str) -> dict[str, list[object]]:
    return read_all(open_data(*paths, cache=Path("unused"))).to_pydict()  # type: ignore[no-any-return]


def _files_in(cache: Path) -> list[str]:
    return sorted(str(path) for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.ndjson"])
def test_conversion_keeps_every_value(tmp_path: Path, cache: Path, name: str) -> None:
    _write(tmp_path / name)
    (ready,) = _convert(cache, tmp_path / name)
    assert ready.startswith(f"{cache}/") and ready.endswith("/a.parquet")
    assert _read(ready) == _ROWS


def test_format_of_the_job_file_overrides_the_ending(tmp_path: Path, cache: Path) -> None:
    _write(tmp_path / "a.txt")
    assert read_all(open_data(tmp_path / "a.txt", cache=cache, format="csv")).to_pydict() == _ROWS


def test_files_with_footers_are_not_converted(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table(_ROWS), folder / "a.parquet")
    _write(folder / "b.csv")
    pq.write_table(pa.table(_ROWS), folder / "c.parquet")
    ready = _convert(cache, folder)
    assert [ready[0], ready[2]] == [str(folder / "a.parquet"), str(folder / "c.parquet")]
    assert ready[1].startswith(str(cache))
    assert _read(*ready) == {name: values * 3 for name, values in _ROWS.items()}


def test_files_of_the_same_name_do_not_collide(tmp_path: Path, cache: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.csv").write_text(f"text\n{name}\n")
    assert _read(*_convert(cache, tmp_path / "data")) == {"text": ["x", "y"]}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_only_a_changed_file_is_converted_again(tmp_path: Path, cache: Path, name: str) -> None:
    path = tmp_path / name
    _write(path)
    first = _convert(cache, path)
    before = os.stat(first[0])
    assert _convert(cache, path, name="validation") == first
    after = os.stat(first[0])
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    path.write_text('text,label\n"new\nrow",1\n' if name == "a.csv" else '{"text": "new\\nrow", "label": 1}\n')
    second = _convert(cache, path)
    assert second != first
    assert _read(*second) == {"text": ["new\nrow"], "label": [1]}
    assert _files_in(cache) == sorted(first + second)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\none,1\ntwo,2,3\n"),
        ("a.jsonl", '{"text": "one"}\n{"text": \n'),
        ("a.jsonl", "text,label\none,1\n"),
    ],
)
def test_error_names_the_broken_file_and_nothing_is_left(tmp_path: Path, cache: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        _convert(cache, path)
    assert caught.value.message.startswith(f"{path}: not a readable {path.suffix[1:]} file (")
    assert caught.value.message.endswith("); fix the file, or set data.format")
    assert "\n" not in caught.value.message
    assert not _files_in(cache)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.jsonl", b""),
        ("a.json", b"[]"),
        ("a.txt", b""),
        ("a.tsv", b"\xef\xbb\xbf"),
    ],
)
def test_file_without_rows_is_refused(tmp_path: Path, cache: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        _convert(cache, path)
    assert caught.value.message == f"{path}: has no rows; give a file that has"
    assert not _files_in(cache)


def test_csv_that_breaks_after_its_first_block_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "some words,1\n" * 800_000 + "one,1,2\n")  # blocks are of 8 MiB
    with pytest.raises(DataError, match=r"not a readable csv file .*Row #800002: Expected 2 columns, got 3"):
        _convert(cache, path)
    assert not _files_in(cache)


@pytest.mark.parametrize(
    ("name", "first", "last", "expected"),
    [
        ("a.csv", "some words,1", "x,zero", ["some words,1", "x,zero"]),
        ("a.csv", "some words,1", "x,1.5", ["some words,1.0", "x,1.5"]),
        ("a.csv", "some words,", "x,late", ["some words,", "x,late"]),
        ("a.jsonl", '{"text": "some words", "label": 1}', '{"text": "x", "label": 1.5}', ["some words,1.0", "x,1.5"]),
        ("a.jsonl", '{"text": "some words", "label": 1}', '{"text": "x", "more": 1}', ["some words,1", "x,None"]),
    ],
)
def test_types_that_change_after_the_first_block_hold_for_all_rows(
    tmp_path: Path, cache: Path, name: str, first: str, last: str, expected: list[str]
) -> None:
    head = "text,label\n" if name == "a.csv" else ""
    (tmp_path / name).write_text(head + (first + "\n") * 800_000 + last + "\n")
    split = open_data(tmp_path / name, cache=cache)
    assert split.rows == 800_001
    rows = split.read(np.array([0, 800_000]), ["text", "label"]).to_pylist()
    assert [f"{row['text']},{row['label']}" for row in rows] == expected


def test_arrow_stream_is_converted_and_arrow_file_is_not(tmp_path: Path, cache: Path) -> None:
    table = pa.table(_ROWS)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    stream, file = _convert(cache, tmp_path / "a.arrow", tmp_path / "b.arrow")
    assert stream.startswith(str(cache)) and file == str(tmp_path / "b.arrow")
    assert _read(stream) == _ROWS


def test_row_is_located_in_the_file_that_was_converted(tmp_path: Path, cache: Path) -> None:
    _write(tmp_path / "a.csv")
    split = open_data(tmp_path / "a.csv", cache=cache)
    assert split.fragments[0].path.startswith(str(cache))
    assert split.locate(7) == (str(tmp_path / "a.csv"), 7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;label\na;1\n", "its columns are separated by ';', not by commas; write them with commas"),
        ("a.csv", "text\tlabel\na\t1\n", "its columns are separated by tabs, not by commas; name it .tsv"),
        # Texts with commas do not hide another separator.
        ("a.csv", "text;label\ntext, with 1;0\n", "its columns are separated by ';', not by commas; write them"),
        ("a.csv", "text\tlabel\ntext, with 1\t0\n", "its columns are separated by tabs, not by commas; name it .tsv"),
        ("a.tsv", "text,label\na,0\n", "its columns are separated by commas, not by tabs; name it .csv"),
        ("a.csv", "text,label\na,1\nb,1,2\n", "Row #3: Expected 2 columns, got 3: b,1,2"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3: Expecting value at character"),
        ("a.jsonl", '[{"text": "a"}, 3]\n', "row 1: it holds no object"),
        ("a.json", '[\n{"text": "a"}\n{"text": "b"}\n]\n', "after row 0: a comma or ] is expected, not {"),
        ("a.json", '[{"text": "a"}, {"text": "b}]', "row 1: Unterminated string starting at"),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]\n', "there is more text after the array of 1 rows"),
        ("a.jsonl", '{"text": "a"}\n3\n', "line 2: it holds no object"),
        ("a.jsonl", '{"a": 1}\n{"a": null}\n{"a": "x"}\n', "line 3: a is text, and a number before"),
        (
            "a.jsonl",
            '{"a": "x"}\n{"a": "\\ud83d"}\n',
            "line 2: a holds half a character (\\uD800 to \\uDFFF come in pairs)",
        ),
        ("a.jsonl", '{"m": [{"c": "x"}]}\n{"m": [{"c": 4}]}\n', "line 2: m[].c is a number, and text before"),
        ("a.jsonl", '{"text": "a"}\n{"text": "caf\udce9"}\n', "not a readable jsonl file (line 2: it is not UTF-8)"),
    ],
)
def test_error_says_what_is_wrong_with_a_file(
    tmp_path: Path, cache: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        _convert(cache, path)
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message
    assert not _files_in(cache)


def test_unwritable_cache_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a.csv")
    with pytest.raises(RunError, match=r"output\.storage: .* cannot be written \(Not a directory\); give a directory"):
        _convert(tmp_path / "a.csv", tmp_path / "a.csv")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a local data set repository."""
    use_own_hub_cache(monkeypatch, tmp_path)
    folder = tmp_path / "corpus"
    folder.mkdir()
    table = pa.table(_ROWS)
    pq.write_table(table.slice(0, 100), folder / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(100, 150), folder / "train-00001-of-00002.parquet")
    pq.write_table(table.slice(250), folder / "test-00000-of-00001.parquet")
    return folder


def test_hub_data_set_is_converted_once_per_split(hub_folder: Path, cache: Path) -> None:
    (ready,) = _convert(cache, f"hub:{hub_folder}#train")
    assert ready.startswith(f"{cache}/")
    assert _read(ready) == {name: values[:250] for name, values in _ROWS.items()}
    before = os.stat(ready)
    assert _convert(cache, f"hub:{hub_folder}#train") == [ready]
    assert os.stat(ready).st_mtime_ns == before.st_mtime_ns
    # Without #SPLIT it is the split of the same name.
    (test,) = _convert(cache, f"hub:{hub_folder}", name="test")
    assert test != ready
    assert _read(test) == {name: values[250:] for name, values in _ROWS.items()}


@pytest.mark.parametrize("location", ["#dev", "/gone#train"])
def test_hub_data_set_that_cannot_be_loaded_is_refused(hub_folder: Path, cache: Path, location: str) -> None:
    with pytest.raises(DataError) as caught:
        _convert(cache, f"hub:{hub_folder}{location}")
    assert caught.value.message.startswith(f"data.train: hub:{hub_folder}{location} cannot be loaded (")
    remedy = "); write hub:NAME#SPLIT, with the CONFIG it needs as hub:ORG/NAME/CONFIG#SPLIT"
    assert caught.value.message.endswith(remedy)


def test_hub_location_is_parsed_to_name_config_and_split(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[object, ...]] = []

    def load_dataset(source: str, config: str | None, split: str) -> object:
        calls.append((source, config, split))
        raise ValueError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for location in ("hub:org/name/config#dev", "hub:org/name", "hub:name#train[:9]"):
        with pytest.raises(DataError, match=r"data\.test: hub:.* cannot be loaded \(no network in tests\)"):
            _convert(cache, location, name="test")
    assert calls == [("org/name", "config", "dev"), ("org/name", None, "test"), ("name", None, "train[:9]")]
    with pytest.raises(DataError, match=r"data\.input: hub:a/b/c/d has 4 parts; write hub:NAME#SPLIT"):
        _convert(cache, "hub:a/b/c/d", name="input")
