"""What a task reads as text or class in a CSV is what the file says (BUGS.md r10, q30)."""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from launcher.data.convert import splittable_files
from launcher.data.splits import Split, open_files
from launcher.errors import DataError
from launcher.tasks.base import ColumnKind

_KINDS: dict[str, ColumnKind] = {"text": "text", "label": "class", "score": "number"}


def _open(folder: Path, *files: str, kinds: dict[str, ColumnKind] | None = _KINDS) -> Split:
    ready = splittable_files("train", [str(folder / name) for name in files], "auto", str(folder / "cache"), kinds)
    return open_files("train", ready, kinds=kinds)


def _column(split: Split, name: str) -> list[object]:
    return split.read(np.arange(split.rows), [name]).column(0).to_pylist()


@pytest.mark.parametrize(
    "cells",
    [
        ["0123", "12"],
        ["12", "13"],
        ["1e5", "2e7"],
        ["True", "false"],
        ["NA", "null"],
        ["NA", "12"],
        ["2024-01-02", "2024-01-03"],
        ["2024-01-02T03:04:05Z", "2024-01-02 03:04:05"],
        ["10:20:30", "1.50"],
        ["12345678901234567890123", "1"],
        ["+1", " 1"],
        ["", "7"],
        ["3.10", "3.9"],
    ],
    ids=lambda cells: cells[0] or "empty",
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_a_text_column_keeps_the_text_of_the_file(tmp_path: Path, name: str, cells: list[str]) -> None:
    """r10."""
    mark = "\t" if "tsv" in name else ","
    content = "".join(f"{text}{mark}{label}\n" for text, label in zip(["text", *cells], ["label", 1, 2], strict=True))
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert _column(_open(tmp_path, name), "text") == cells


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["0", "1", "0", "10"], [0, 1, 0, 10]),
        (["-1", "1", "", "1"], [-1, 1, None, 1]),
        (["007", "12", "007", "12"], ["007", "12", "007", "12"]),
        (["1e5", "2e7", "1e5", "2e7"], ["1e5", "2e7", "1e5", "2e7"]),
        (["3.9", "3.10", "3.9", "3.10"], ["3.9", "3.10", "3.9", "3.10"]),
        (["True", "False", "True", "True"], ["True", "False", "True", "True"]),
        (["2024-01-02", "2024-01-03", "2024-01-02", "2024-01-02"], None),
        (["NA", "DE", "null", "DE"], None),
        (["DE", "", "FR", "DE"], ["DE", None, "FR", "DE"]),
        (["0", "1", "NA", "1"], [0, 1, None, 1]),
        (["12345678901234567890", "1", "1", "1"], None),
        (["0.0", "1.0", "", "1.0"], [0.0, 1.0, None, 1.0]),
        (["0.25", "1.5", "2.75", "3.125"], [0.25, 1.5, 2.75, 3.125]),
    ],
    ids=str,
)
def test_a_class_is_an_integer_only_where_that_loses_nothing(
    tmp_path: Path, cells: list[str], read: list[object] | None
) -> None:
    """r10; numbers that are nearly all different stay numbers, which no task takes for classes."""
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{cell}\n" for cell in cells))
    assert _column(_open(tmp_path, "a.csv"), "label") == (cells if read is None else read)


def test_a_class_that_shows_late_to_be_no_integer_is_text_in_all_rows(tmp_path: Path) -> None:
    """r10, behind the first block."""
    (tmp_path / "a.csv").write_text("text,label\n" + "some words,1\n" * 800_000 + "x,01\n")
    split = _open(tmp_path, "a.csv")
    assert split.read(np.array([0, 800_000]), ["label"]).column(0).to_pylist() == ["1", "01"]


def test_digits_in_one_part_and_words_in_another_are_one_text_column(tmp_path: Path) -> None:
    """q30."""
    (tmp_path / "part1.csv").write_text("text,label\nsome words,1\n")
    (tmp_path / "part2.csv").write_text("text,label\n007,0\n")
    assert _column(_open(tmp_path, "part1.csv", "part2.csv"), "text") == ["some words", "007"]


def test_a_number_is_what_it_looks_like(tmp_path: Path) -> None:
    """A target of regression."""
    (tmp_path / "a.csv").write_text("text,score\na,1\nb,2.50\nc,1e3\n")
    assert _column(_open(tmp_path, "a.csv"), "score") == [1.0, 2.5, 1000.0]


def test_a_column_nobody_reads_loses_no_zeros(tmp_path: Path) -> None:
    """r10: `predict` keeps it, and `init` looks at it before a task is chosen."""
    (tmp_path / "a.csv").write_text("id,n,x,long\n007,1,1.5,12345678901234567890\n12,2,2.5,1\n")
    split = _open(tmp_path, "a.csv", kinds={})
    assert [_column(split, name) for name in ("id", "n", "x", "long")] == [
        ["007", "12"],
        [1, 2],
        [1.5, 2.5],
        ["12345678901234567890", "1"],
    ]
    assert split.schema.field("n").type == pa.int64()


@pytest.mark.parametrize("cell", ["2024-01-02", "2024-01-02T03:04:05Z"])
def test_a_text_in_json_is_no_time(tmp_path: Path, cell: str) -> None:
    """r10 in JSON Lines: pyarrow writes such a text in another way."""
    line = f'{{"text": "{cell}", "turns": [{{"content": "{cell}"}}]}}\n'
    (tmp_path / "a.jsonl").write_text(line * 3)
    split = _open(tmp_path, "a.jsonl", kinds={"text": "text", "turns": "text"})
    assert _column(split, "text") == [cell] * 3
    assert _column(split, "turns") == [[{"content": cell}]] * 3


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local repository of data; the `datasets` cache is the test's own."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    datasets.disable_progress_bars()
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def test_a_csv_of_the_hub_keeps_its_text_too(hub: Path, tmp_path: Path) -> None:
    """r10, through `datasets` and pandas."""
    (hub / "train.csv").write_text(
        "text,label,id,score,note\n0123,007,01,1.5,x\n1e5,12,02,,NA\nNA,007,03,2,\n,12,04,3,y\n"
    )
    ready = splittable_files("train", [f"hub:{hub}#train"], "auto", str(tmp_path / "cache"), _KINDS)
    split = open_files("train", ready, kinds=_KINDS)
    assert _column(split, "text") == ["0123", "1e5", "NA", ""]
    assert _column(split, "label") == ["007", "12", "007", "12"]
    assert _column(split, "id") == ["01", "02", "03", "04"]
    assert _column(split, "score") == [1.5, None, 2.0, 3.0]
    (hub / "train.csv").write_text("text,label\na,0\nb,1\n")
    ready = splittable_files("train", [f"hub:{hub}#train"], "auto", str(tmp_path / "cache"), _KINDS)
    assert _column(open_files("train", ready, kinds=_KINDS), "label") == [0, 1]


def test_a_saved_data_set_is_told_by_the_way_to_name_it(hub: Path, tmp_path: Path) -> None:
    """q37."""
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(hub / "saved")
    with pytest.raises(DataError, match=r"cannot be loaded \(it is a folder of save_to_disk\); write .*saved alone"):
        splittable_files("train", [f"hub:{hub}/saved#train"], "auto", str(tmp_path / "cache"), _KINDS)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text;label\ntext, with 1;0\n", "its columns are separated by ';', not by commas; write them"),
        ("a.csv", "text\tlabel\ntext, with 1\t0\n", "its columns are separated by tabs, not by commas; name it .tsv"),
        ("a.tsv", "text,label\na,0\n", "its columns are separated by commas, not by tabs; name it .csv"),
    ],
)
def test_another_separator_is_told(tmp_path: Path, name: str, content: str, said: str) -> None:
    """q13: also where the texts hold commas."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(said)):
        _open(tmp_path, name)
