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

from launcher.data.convert import convert_to_parquet
from launcher.data.splits import open_split
from launcher.errors import DataError, RunError

_TEXTS = ["plain", "two\nlines", 'a "quoted", one', "", "tab\there", "é 漢字"]
_ROWS = {"text": _TEXTS * 50, "label": [i % 3 for i in range(300)]}


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def _write_csv(path: Path, delimiter: str = ",") -> None:
    pa.csv.write_csv(pa.table(_ROWS), str(path), pa.csv.WriteOptions(delimiter=delimiter))


def _write_jsonl(path: Path) -> None:
    rows = [dict(zip(_ROWS, values, strict=True)) for values in zip(*_ROWS.values(), strict=True)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _read(ready: list[str]) -> dict[str, list[object]]:
    split = open_split("train", ready)
    return split.read(np.arange(split.rows), split.schema.names).to_pydict()


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.ndjson"])
def test_every_value_survives(tmp_path: Path, cache: str, name: str) -> None:
    path = tmp_path / name
    _write_jsonl(path) if "json" in name else _write_csv(path, "\t" if name == "a.tsv" else ",")
    ready = convert_to_parquet("train", [str(path)], "auto", cache)
    assert len(ready) == 1
    assert ready[0].startswith(cache + "/")
    assert ready[0].endswith("/a.parquet")
    assert _read(ready) == _ROWS


def test_a_format_given_by_name(tmp_path: Path, cache: str) -> None:
    _write_csv(tmp_path / "a.txt")
    assert _read(convert_to_parquet("train", [str(tmp_path / "a.txt")], "csv", cache)) == _ROWS


def test_files_that_have_footers_are_taken_as_they_are(tmp_path: Path, cache: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table(_ROWS), folder / "a.parquet")
    _write_csv(folder / "b.csv")
    pq.write_table(pa.table(_ROWS), folder / "c.parquet")
    ready = convert_to_parquet("train", [str(folder)], "auto", cache)
    assert [ready[0], ready[2]] == [str(folder / "a.parquet"), str(folder / "c.parquet")]
    assert ready[1].startswith(cache)
    assert _read(ready) == {name: values * 3 for name, values in _ROWS.items()}


def test_files_of_one_name_do_not_collide(tmp_path: Path, cache: str) -> None:
    for name in ("x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.csv").write_text(f"text\n{name}\n")
    assert _read(convert_to_parquet("train", [str(tmp_path / "data")], "auto", cache)) == {"text": ["x", "y"]}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_an_unchanged_file_is_converted_once_and_a_changed_one_again(tmp_path: Path, cache: str, name: str) -> None:
    path = tmp_path / name
    _write_csv(path) if name == "a.csv" else _write_jsonl(path)
    first = convert_to_parquet("train", [str(path)], "auto", cache)
    before = os.stat(first[0])
    assert convert_to_parquet("validation", [str(path)], "auto", cache) == first
    after = os.stat(first[0])
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    path.write_text('text,label\n"new\nrow",1\n' if name == "a.csv" else '{"text": "new\\nrow", "label": 1}\n')
    second = convert_to_parquet("train", [str(path)], "auto", cache)
    assert second != first
    assert _read(second) == {"text": ["new\nrow"], "label": [1]}
    assert sorted(str(p) for p in Path(cache).rglob("*") if p.is_file()) == sorted(first + second)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\none,1\ntwo,2,3\n"),
        ("a.csv", ""),
        ("a.jsonl", '{"text": "one"}\n{"text": \n'),
        ("a.jsonl", "text,label\none,1\n"),
        ("a.jsonl", ""),
    ],
)
def test_a_broken_file_is_named_and_leaves_nothing_behind(tmp_path: Path, cache: str, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        convert_to_parquet("train", [str(path)], "auto", cache)
    kind = name.removeprefix("a.")
    assert caught.value.message.startswith(f"{path}: not a readable {kind} file (")
    assert caught.value.message.endswith("); mend the file, or set data.format")
    assert "\n" not in caught.value.message
    assert not [p for p in Path(cache).rglob("*") if p.is_file()]


def test_a_csv_that_breaks_after_its_first_block(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "some words,1\n" * 800_000 + "one,1,2\n")  # blocks are of 8 MiB
    with pytest.raises(DataError, match=r"not a readable csv file .*Row #800002: Expected 2 columns, got 3"):
        convert_to_parquet("train", [str(path)], "auto", cache)
    assert not [p for p in Path(cache).rglob("*") if p.is_file()]


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
def test_a_file_whose_types_show_late(
    tmp_path: Path, cache: str, name: str, first: str, last: str, expected: list[str]
) -> None:
    path = tmp_path / name
    head = "text,label\n" if name == "a.csv" else ""
    path.write_text(head + (first + "\n") * 800_000 + last + "\n")
    split = open_split("train", convert_to_parquet("train", [str(path)], "auto", cache))
    assert split.rows == 800_001
    rows = split.read(np.array([0, 800_000]), ["text", "label"]).to_pylist()
    assert [f"{row['text']},{row['label']}" for row in rows] == expected


def test_true_and_false_stay_the_texts_they_are(tmp_path: Path, cache: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\none,true\ntwo,false\n")
    assert _read(convert_to_parquet("train", [str(tmp_path / "a.csv")], "auto", cache))["label"] == ["true", "false"]


def test_an_arrow_stream_becomes_parquet(tmp_path: Path, cache: str) -> None:
    table = pa.table(_ROWS)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    ready = convert_to_parquet("train", [str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow")], "auto", cache)
    assert ready[0].startswith(cache) and ready[1] == str(tmp_path / "b.arrow")
    assert _read(ready[:1]) == _ROWS


def test_a_row_is_named_by_the_file_the_user_knows(tmp_path: Path, cache: str) -> None:
    _write_csv(tmp_path / "a.csv")
    split = open_split("train", convert_to_parquet("train", [str(tmp_path / "a.csv")], "auto", cache))
    assert split.fragments[0].path.startswith(cache)
    assert split.locate(7) == (str(tmp_path / "a.csv"), 7)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text;label\na;1\n", "its columns are separated by ';', not by commas; write them with commas"),
        ("a.csv", "text\tlabel\na\t1\n", "its columns are separated by tabs, not by commas; name it .tsv"),
        ("a.csv", "text,text\na,1\n", "has two columns named 'text'; rename one of them"),
        ("a.csv", "text,label\na,1\nb,1,2\n", "Row #3: Expected 2 columns, got 3: b,1,2"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3: Expecting value at character"),
        ("a.jsonl", '[{"text": "a"}, 3]\n', "row 1: it holds no object"),
        ("a.json", '[\n{"text": "a"}\n{"text": "b"}\n]\n', "behind row 0: a comma or ] is expected, not {"),
        ("a.json", '[{"text": "a"}, {"text": "b}]', "row 1: Unterminated string starting at"),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]\n', "more follows behind the array of 1 rows"),
        ("a.json", "[]", "not a readable jsonl file (Empty JSON file)"),
        ("a.jsonl", '{"text": "a"}\n3\n', "line 2: it holds no object"),
        ("a.jsonl", '{"a": 1}\n{"a": null}\n{"a": "x"}\n', "line 3: a is text, and a number before"),
        (
            "a.jsonl",
            '{"a": "x"}\n{"a": "\\ud83d"}\n',
            "line 2: a holds half a character (\\uD800 to \\uDFFF come in pairs)",
        ),
        ("a.jsonl", '{"m": [{"c": "x"}]}\n{"m": [{"c": 4}]}\n', "line 2: m[].c is a number, and text before"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, cache: str, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        convert_to_parquet("train", [str(path)], "auto", cache)
    assert caught.value.message.startswith(f"{path}: ")
    assert said in caught.value.message
    assert not [p for p in Path(cache).rglob("*") if p.is_file()]


def test_json_lines_that_are_not_utf8(tmp_path: Path, cache: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.jsonl: not a readable jsonl file \(line 2: it is not UTF-8\)"):
        convert_to_parquet("train", [str(tmp_path / "a.jsonl")], "auto", cache)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    _write_csv(tmp_path / "a.csv")
    with pytest.raises(RunError, match=r"output\.storage: .* cannot be written \(Not a directory\); give a directory"):
        convert_to_parquet("train", [str(tmp_path / "a.csv")], "auto", str(tmp_path / "a.csv"))


def test_a_csv_that_is_not_utf8(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="not a readable csv file"):
        convert_to_parquet("train", [str(path)], "auto", cache)


def test_what_is_missing_is_said_as_for_other_files(tmp_path: Path, cache: str) -> None:
    with pytest.raises(DataError, match=r"data\.train: .*gone\.csv does not exist"):
        convert_to_parquet("train", [str(tmp_path / "gone.csv")], "auto", cache)


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local data set repository; the `datasets` cache is the test's own."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    folder = tmp_path / "corpus"
    folder.mkdir()
    table = pa.table(_ROWS)
    pq.write_table(table.slice(0, 100), folder / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(100, 150), folder / "train-00001-of-00002.parquet")
    pq.write_table(table.slice(250), folder / "test-00000-of-00001.parquet")
    datasets.disable_progress_bars()
    return folder


def test_a_hub_data_set(hub_folder: Path, cache: str) -> None:
    ready = convert_to_parquet("train", [f"hub:{hub_folder}#train"], "auto", cache)
    assert len(ready) == 1
    assert ready[0].startswith(cache + "/")
    assert _read(ready) == {name: values[:250] for name, values in _ROWS.items()}
    before = os.stat(ready[0])
    assert convert_to_parquet("train", [f"hub:{hub_folder}#train"], "auto", cache) == ready
    assert os.stat(ready[0]).st_mtime_ns == before.st_mtime_ns
    # Without #SPLIT it is the split of the same name.
    test = convert_to_parquet("test", [f"hub:{hub_folder}"], "auto", cache)
    assert test != ready
    assert _read(test) == {name: values[250:] for name, values in _ROWS.items()}


def test_a_hub_data_set_that_cannot_be_loaded(hub_folder: Path, cache: str) -> None:
    for location in (f"hub:{hub_folder}#dev", f"hub:{hub_folder / 'gone'}#train"):
        with pytest.raises(DataError) as caught:
            convert_to_parquet("train", [location], "auto", cache)
        assert caught.value.message.startswith(f"data.train: {location} cannot be loaded (")
        remedy = "); write hub:NAME#SPLIT, with the CONFIG it needs as hub:ORG/NAME/CONFIG#SPLIT"
        assert caught.value.message.endswith(remedy)


def test_what_a_hub_name_asks_for(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load_dataset(source: str, config: str | None, split: str) -> object:
        asked.append((source, config, split))
        raise ValueError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for location in ("hub:org/name/config#dev", "hub:org/name", "hub:name#train[:9]"):
        with pytest.raises(DataError, match=r"data\.test: hub:.* cannot be loaded \(no network here\)"):
            convert_to_parquet("test", [location], "auto", cache)
    assert asked == [("org/name", "config", "dev"), ("org/name", None, "test"), ("name", None, "train[:9]")]
    with pytest.raises(DataError, match=r"data\.input: hub:a/b/c/d has 4 parts; write hub:NAME#SPLIT"):
        convert_to_parquet("input", ["hub:a/b/c/d"], "auto", cache)
