"""What a task reads as text or class in a CSV is what the file says."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from launcher.data.splits import Split
from launcher.errors import DataError
from launcher.tasks.params import ColumnKind
from tests.support.data_files import open_data, read_all, use_own_hub_cache

_KINDS: dict[str, ColumnKind] = {"text": "text", "label": "class", "score": "number"}


def _open(folder: Path, *files: str, kinds: dict[str, ColumnKind] | None = _KINDS) -> Split:
    return open_data(*(folder / name for name in files), cache=folder / "cache", kinds=kinds)


def _column(split: Split, name: str) -> list[object]:
    return read_all(split, name).column(0).to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "texts",
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
    ids=lambda texts: texts[0] or "empty",
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_text_column_keeps_the_text_of_the_file(tmp_path: Path, name: str, texts: list[str]) -> None:
    separator = "\t" if "tsv" in name else ","
    rows = zip(["text", *texts], ["label", 1, 2], strict=True)
    content = "".join(f"{text}{separator}{label}\n" for text, label in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert _column(_open(tmp_path, name), "text") == texts


@pytest.mark.parametrize(
    ("texts", "expected"),
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
        (["1.", ".5", "-2e1", "nan"], [1.0, 0.5, -20.0, None]),
        (["+", "-"], None),
        (["E1", "E2", "E3"], None),
    ],
    ids=str,
)
def test_class_is_an_integer_only_if_that_loses_nothing(
    tmp_path: Path, texts: list[str], expected: list[object] | None
) -> None:
    """Include numbers that nearly all differ: they stay numbers, which no task takes for classes."""
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{text}\n" for text in texts))
    assert _column(_open(tmp_path, "a.csv"), "label") == (texts if expected is None else expected)


def test_late_class_that_is_no_integer_makes_all_rows_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "some words,1\n" * 800_000 + "x,01\n")
    split = _open(tmp_path, "a.csv")
    assert split.read(np.array([0, 800_000]), ["label"]).column(0).to_pylist() == ["1", "01"]


def test_digits_in_one_file_and_words_in_another_are_one_text_column(tmp_path: Path) -> None:
    (tmp_path / "part1.csv").write_text("text,label\nsome words,1\n")
    (tmp_path / "part2.csv").write_text("text,label\n007,0\n")
    assert _column(_open(tmp_path, "part1.csv", "part2.csv"), "text") == ["some words", "007"]


def test_regression_target_is_read_as_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,score\na,1\nb,2.50\nc,1e3\n")
    assert _column(_open(tmp_path, "a.csv"), "score") == [1.0, 2.5, 1000.0]


def test_column_that_no_task_reads_loses_nothing(tmp_path: Path) -> None:
    """Show what `predict` writes again and what `init` sees before a task is chosen."""
    (tmp_path / "a.csv").write_text("id,n,x,flag,long\n007,1,1.5,true,12345678901234567890\n12,2,2.5,false,1\n")
    split = _open(tmp_path, "a.csv", kinds={})
    assert read_all(split).to_pydict() == {
        "id": ["007", "12"],
        "n": [1, 2],
        "x": [1.5, 2.5],
        "flag": ["true", "false"],
        "long": ["12345678901234567890", "1"],
    }
    assert split.schema.field("n").type == pa.int64()


@pytest.mark.parametrize("text", ["2024-01-02", "2024-01-02T03:04:05Z"])
def test_text_in_json_that_looks_like_a_time_stays_text(tmp_path: Path, text: str) -> None:
    """Undo that pyarrow infers a time, which it would print differently."""
    line = f'{{"text": "{text}", "turns": [{{"content": "{text}"}}]}}\n'
    (tmp_path / "a.jsonl").write_text(line * 3)
    split = _open(tmp_path, "a.jsonl", kinds={"text": "text", "turns": "text"})
    assert read_all(split).to_pydict() == {"text": [text] * 3, "turns": [[{"content": text}]] * 3}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a local data set repository."""
    use_own_hub_cache(monkeypatch, tmp_path)
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def test_csv_of_the_hub_keeps_its_text_too(hub: Path, tmp_path: Path) -> None:
    """Read through `datasets` and pandas."""
    (hub / "train.csv").write_text(
        "text,label,id,score,note\n0123,007,01,1.5,x\n1e5,12,02,,NA\nNA,007,03,2,\n,12,04,3,y\n"
    )
    split = open_data(f"hub:{hub}#train", cache=tmp_path / "cache", kinds=_KINDS)
    assert read_all(split, "text", "label", "id", "score").to_pydict() == {
        "text": ["0123", "1e5", "NA", ""],
        "label": ["007", "12", "007", "12"],
        "id": ["01", "02", "03", "04"],
        "score": [1.5, None, 2.0, 3.0],
    }
    (hub / "train.csv").write_text("text,label\na,0\nb,1\n")
    split = open_data(f"hub:{hub}#train", cache=tmp_path / "cache", kinds=_KINDS)
    assert _column(split, "label") == [0, 1]


def test_error_tells_how_to_name_a_saved_data_set(hub: Path, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(hub / "saved")
    with pytest.raises(DataError, match=r"cannot be loaded \(it is a folder of save_to_disk\); write .*saved alone"):
        open_data(f"hub:{hub}/saved#train", cache=tmp_path / "cache", kinds=_KINDS)
