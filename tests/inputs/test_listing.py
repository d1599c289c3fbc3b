"""Which files of a folder are data, and what their names and folders tell."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.files import list_files
from launcher.data.splits import Split
from launcher.errors import DataError
from launcher.init.splits import find_splits
from launcher.predict.row_reader import RowReader
from launcher.tasks.params import ColumnKind
from tests.support.data_files import open_data, read_all

_KINDS: dict[str, ColumnKind] = {"text": "text", "label": "class"}
_ROWS = {"text": [f"text {i}" for i in range(6)], "label": [i % 2 for i in range(6)]}
_CSV = "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(6))
_LINES = "".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in range(6))


def _open(location: Path, kinds: dict[str, ColumnKind] = _KINDS) -> Split:
    return open_data(location, cache=location.parent / ".cache", kinds=kinds)


def _rows(location: Path) -> dict[str, list[object]]:
    return read_all(_open(location)).to_pydict()  # type: ignore[no-any-return]


def _files(location: Path) -> list[str]:
    return [file.relative for file in list_files("train", str(location))]


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("zst", _zstd)])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", _CSV),
        ("a.tsv", _CSV.replace(",", "\t")),
        ("a.jsonl", _LINES),
        ("a.json", f"[{_LINES.strip().replace(chr(10), ',')}]"),
    ],
)
def test_compressed_text_file_is_read(
    tmp_path: Path, name: str, content: str, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"{name}.{ending}"
    path.write_bytes(compress(content.encode()))
    assert _rows(path) == _ROWS


def test_truncated_compressed_file_is_refused(tmp_path: Path) -> None:
    content = gzip.compress("".join(f"text {i * 7919 % 1000},{i % 2}\n" for i in range(5000)).encode())
    (tmp_path / "a.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.csv\.gz: "):
        _open(tmp_path / "a.csv.gz")


def test_compressed_file_that_is_no_text_has_no_known_ending(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.parquet\.gz has no known ending"):
        list_files("train", str(tmp_path / "a.parquet.gz"))


def test_hive_folders_add_a_column(tmp_path: Path) -> None:
    for value in ("neg", "pos"):
        (tmp_path / f"out/label={value}").mkdir(parents=True)
        table = pa.table({"text": [f"{value} {i}" for i in range(3)]})
        pq.write_table(table, tmp_path / f"out/label={value}/p.parquet")
    split = _open(tmp_path / "out")
    expected = {"text": ["neg 0", "neg 1", "neg 2", "pos 0", "pos 1", "pos 2"], "label": ["neg"] * 3 + ["pos"] * 3}
    assert read_all(split).to_pydict() == expected
    assert [piece.to_pylist() for piece in split.iter_column("label")] == [["neg"] * 3, ["pos"] * 3]
    assert RowReader(split, 2).read(range(1, 5)).to_pydict() == {name: values[1:5] for name, values in expected.items()}
    before = split.fingerprint
    (tmp_path / "out/label=neg").rename(tmp_path / "out/label=other")
    assert _open(tmp_path / "out").fingerprint != before


def test_hive_folders_may_hold_integers_nulls_and_other_formats(tmp_path: Path) -> None:
    for value in ("0", "1", "__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / f"out/a%20b={value}").mkdir(parents=True)
        (tmp_path / f"out/a%20b={value}/p.csv").write_text("text\nx\n")
    assert _rows(tmp_path / "out") == {"text": ["x"] * 3, "a b": [0, 1, None]}


def test_column_of_the_file_comes_before_that_of_a_hive_folder(tmp_path: Path) -> None:
    (tmp_path / "two/label=pos").mkdir(parents=True)
    pq.write_table(pa.table(_ROWS), tmp_path / "two/label=pos/p.parquet")
    assert _rows(tmp_path / "two") == _ROWS


def test_each_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes("\ufeffA line, of a “book”.\r\n\r\n \n  indented\tline\nthe end".encode())
    split = _open(tmp_path / "corpus.txt", {"text": "text"})
    assert read_all(split).to_pydict() == {"text": ["A line, of a “book”.", "  indented\tline", "the end"]}


def test_text_file_next_to_data_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("Take it.\n")
    (tmp_path / "train.csv").write_text(_CSV)
    assert _files(tmp_path) == ["train.csv"]
    (tmp_path / "train.csv").unlink()
    assert _files(tmp_path) == ["LICENSE.txt"]


@pytest.mark.parametrize(("name", "head"), [("a.csv", b"text,label\n"), ("a.txt", b"first\n")])
def test_error_names_the_line_that_is_not_utf8(tmp_path: Path, name: str, head: bytes) -> None:
    (tmp_path / name).write_bytes(head + "Café,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 2 is not UTF-8; save it as UTF-8"):
        _open(tmp_path / name)


def test_metadata_files_of_datasets_are_ignored(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(_ROWS).save_to_disk(tmp_path / "saved")
    assert _rows(tmp_path / "saved") == _ROWS
    assert len(_files(tmp_path / "saved")) == 1


def test_splits_of_a_saved_dataset_dict_are_not_joined(tmp_path: Path) -> None:
    """Test rows would be trained on."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict(_ROWS)
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved holds the splits test, train of a DatasetDict; name one of them"):
        _open(tmp_path / "saved")
    assert set(find_splits(str(tmp_path / "saved")).locations) == {"train", "test"}
    assert _rows(tmp_path / "saved/train") == _ROWS


def test_cloned_hub_repository_is_read(tmp_path: Path) -> None:
    (tmp_path / "repo/data").mkdir(parents=True)
    pq.write_table(pa.table(_ROWS), tmp_path / "repo/data/train-00000-of-00001.parquet")
    (tmp_path / "repo/dataset_infos.json").write_text('{"default": {"description": "", "splits": {}}}')
    (tmp_path / "repo/README.md").write_text("---\nlicense: mit\n---\n")
    assert _rows(tmp_path / "repo") == _ROWS


def test_state_json_without_arrow_files_is_data(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(_LINES)
    assert _files(tmp_path) == ["state.json"]


def test_folders_of_runs_and_models_are_ignored(tmp_path: Path) -> None:
    """Show what `init .` sees where the launcher has run and where a model is stored."""
    for name in (
        "runs/first/job.yaml", "runs/first/plan.json", "runs/first/scores-validation.json", "runs/first/metrics.jsonl",
        "runs/first/predictions/part-00000000.parquet", "runs/first/model/config.json", "runs/tuned/job.yaml",
        "runs/tuned/sweep/sweep.json", "runs/tuned/trials.csv", "bert/config.json", "bert/tokenizer.json",
        "bert/vocab.txt", "lora/adapter_config.json", "runs/.cache/abc/train.parquet",
        "out/_predictions.json", "out/part-00000000.parquet",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "train.csv").write_text(_CSV)
    (tmp_path / "job.yaml").write_text("name: first\n")
    assert _files(tmp_path) == ["train.csv"]
    assert find_splits(str(tmp_path)).locations == {"train": (str(tmp_path / "train.csv"),)}
    assert _files(tmp_path / "runs/first/predictions") == ["part-00000000.parquet"]
    assert _files(tmp_path / "out") == ["part-00000000.parquet"]


def test_error_tells_how_to_read_a_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "photos/cat/0.PNG").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds pictures and no table of them; .* write hub:.*/photos#train"):
        list_files("train", str(tmp_path / "photos"))
