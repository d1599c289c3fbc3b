"""A JSON array is read like lines of objects, whatever its layout."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launcher.data import json_files
from launcher.data.json_files import objects
from launcher.data.splits import Split
from launcher.errors import DataError
from launcher.tasks.params import ColumnKind
from tests.support.data_files import open_data, read_all

_ROWS = [{"instruction": f"Add {i} and 1.\n", "input": "", "output": f'{i + 1} é 漢 \\ "'} for i in range(400)]


def _open(path: Path, kinds: dict[str, ColumnKind] | None = None) -> Split:
    return open_data(path, cache=path.parent / "cache", kinds=kinds)


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_array_becomes_its_objects_as_rows(tmp_path: Path, indent: int | None, bom: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(bom + json.dumps(_ROWS, indent=indent, ensure_ascii=indent is None), encoding="utf-8")
    split = _open(path)
    assert read_all(split).to_pylist() == _ROWS
    assert split.locate(7) == (str(path), 7)


def _chunks(text: str, size: int) -> Iterator[bytes]:
    content = text.encode()
    return (content[begin : begin + size] for begin in range(0, len(content), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_chunks_of_an_array_may_end_anywhere(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Cut numbers, escapes and characters of several bytes."""
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", size)
    rows = [{"a": 12345.678e-9, "b": [True, None, "\u2028\U0001f600"], "c": {"d": "x\ty"}}, {}, {"a": -1}]
    for indent in (None, 3):
        for ascii in (True, False):
            text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
            lines = list(objects(_chunks(text, size)))
            assert [json.loads(line) for line in lines] == rows
            assert not any("\n" in line for line in lines)


def test_array_is_streamed_once_with_bounded_memory() -> None:
    """Read 64 MiB with one row of 3 MiB: all bytes once, never far ahead of the rows that are yielded."""
    row = json.dumps({"text": "w" * 1000})
    long = json.dumps({"text": "w" * (3 << 20)})
    read_bytes = yielded_bytes = most_ahead = 0

    def chunks() -> Iterator[bytes]:
        nonlocal read_bytes
        yield b"["
        for number in range(64_000):
            chunk = (long if number == 900 else row).encode() + (b"," if number < 63_999 else b"]")
            read_bytes += len(chunk)
            yield chunk

    for line in objects(chunks()):
        most_ahead = max(most_ahead, read_bytes - yielded_bytes)
        yielded_bytes += len(line) + 1
    assert read_bytes == yielded_bytes
    assert most_ahead < 16 << 20


def test_types_of_an_array_that_change_late_hold_for_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    row = json.dumps({"text": "some words", "label": 1})
    path.write_text("[" + f"{row},\n" * 300_000 + '{"text": "x", "label": 1.5}]')
    assert _open(path).read(np.array([0, 300_000]), ["label"]).column(0).to_pylist() == [1.0, 1.5]


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_unread_column_may_change_its_type(tmp_path: Path, layout: str) -> None:
    rows = [{"text": f"t {i}", "label": i % 2, "meta": i if i < 20 else f"v{i}"} for i in range(40)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows) if layout == "array" else "".join(json.dumps(row) + "\n" for row in rows))
    split = _open(path, {"text": "text", "label": "class"})
    assert read_all(split).to_pylist() == [row | {"meta": json.dumps(row["meta"])} for row in rows]
    with pytest.raises(DataError, match=r"not a readable jsonl file .*meta"):
        _open(path, {"meta": "text"})


def test_before_a_task_is_chosen_every_column_may_change_its_type(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "meta": 1, "n": {"x": 1}}\n{"text": "b", "meta": "v", "n": {"x": 2}}\n')
    assert read_all(_open(path, {})).to_pylist() == [
        {"text": "a", "meta": "1", "n": {"x": 1}},
        {"text": "b", "meta": '"v"', "n": {"x": 2}},
    ]
