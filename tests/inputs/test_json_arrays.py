"""A JSON array is read like lines of objects, whatever its layout (BUGS.md r08, q18)."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launcher.data import json_files
from launcher.data.convert import splittable_files
from launcher.data.json_files import objects
from launcher.data.splits import Split, open_files
from launcher.errors import DataError
from launcher.tasks.base import ColumnKind

_ROWS = [{"instruction": f"Add {i} and 1.\n", "input": "", "output": f'{i + 1} é 漢 \\ "'} for i in range(400)]


def _open(path: Path, kinds: dict[str, ColumnKind] | None = None) -> Split:
    ready = splittable_files("train", [str(path)], "auto", str(path.parent / "cache"), kinds)
    return open_files("train", ready, kinds=kinds)


def _rows(split: Split) -> list[dict[str, object]]:
    return split.read(np.arange(split.rows), split.schema.names).to_pylist()


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_an_array_is_its_objects_as_rows(tmp_path: Path, indent: int | None, bom: str) -> None:
    """r08."""
    path = tmp_path / "train.json"
    path.write_text(bom + json.dumps(_ROWS, indent=indent, ensure_ascii=indent is None), encoding="utf-8")
    split = _open(path)
    assert _rows(split) == _ROWS
    assert split.locate(7) == (str(path), 7)


def _pieces(text: str, size: int) -> Iterator[bytes]:
    content = text.encode()
    return (content[begin : begin + size] for begin in range(0, len(content), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_where_the_pieces_of_an_array_end_does_not_matter(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """r08: numbers, escapes and letters of several bytes are cut anywhere."""
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", size)
    rows = [{"a": 12345.678e-9, "b": [True, None, "\u2028\U0001f600"], "c": {"d": "x\ty"}}, {}, {"a": -1}]
    for indent in (None, 3):
        for ascii in (True, False):
            text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
            lines = list(objects(_pieces(text, size)))
            assert [json.loads(line) for line in lines] == rows
            assert not any("\n" in line for line in lines)


def test_an_array_is_read_once_and_little_of_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """r08: of 64 MiB with one row of 3 MiB, all bytes are taken once, never far ahead of what is given out."""
    row, long = json.dumps({"text": "w" * 1000}), json.dumps({"text": "w" * (3 << 20)})
    taken = given = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        yield b"["
        for number in range(64_000):
            piece = (long if number == 900 else row).encode() + (b"," if number < 63_999 else b"]")
            taken += len(piece)
            yield piece

    furthest = 0
    for line in objects(pieces()):
        furthest = max(furthest, taken - given)
        given += len(line) + 1
    assert taken == given
    assert furthest < 16 << 20


def test_an_array_whose_types_show_late_is_read_to_the_end(tmp_path: Path) -> None:
    """r08, behind the first block."""
    path = tmp_path / "train.json"
    row = json.dumps({"text": "some words", "label": 1})
    path.write_text("[" + f"{row},\n" * 300_000 + '{"text": "x", "label": 1.5}]')
    split = _open(path)
    assert split.read(np.array([0, 300_000]), ["label"]).column(0).to_pylist() == [1.0, 1.5]


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_column_nobody_reads_may_change_its_type(tmp_path: Path, layout: str) -> None:
    """q18."""
    rows = [{"text": f"t {i}", "label": i % 2, "meta": i if i < 20 else f"v{i}"} for i in range(40)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows) if layout == "array" else "".join(json.dumps(row) + "\n" for row in rows))
    split = _open(path, {"text": "text", "label": "class"})
    assert _rows(split) == [row | {"meta": json.dumps(row["meta"])} for row in rows]
    with pytest.raises(DataError, match=r"not a readable jsonl file .*meta"):
        _open(path, {"meta": "text"})


def test_before_a_task_is_chosen_no_type_is_wrong(tmp_path: Path) -> None:
    """q18, as `init` reads."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "meta": 1, "n": {"x": 1}}\n{"text": "b", "meta": "v", "n": {"x": 2}}\n')
    split = _open(path, {})
    assert _rows(split) == [{"text": "a", "meta": "1", "n": {"x": 1}}, {"text": "b", "meta": '"v"', "n": {"x": 2}}]
