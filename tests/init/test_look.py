"""A sample that is small and spread, and labels that are counted."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.splits import open_split, sample
from launcher.errors import DataError
from launcher.init.look import Labels, count_labels
from tests.support.toy_data import SINGLE, look_at, named_classes, picture, words


def test_a_sample_is_spread_over_files_that_are_sorted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [0] * 5000 + [1] * 5000}), tmp_path / "a.parquet", row_group_size=5000)
    split = open_split("train", [str(tmp_path)])
    found = sample(split, ["label"], 100).column("label").to_pylist()
    assert found == [0] * 50 + [1] * 50
    seen = look_at(pa.table({"text": words(3000), "label": [0] * 1500 + [1] * 1500}), tmp_path)
    assert seen.rows == 3000 and seen.column("label").distinct == 2 and seen.column("text").rows == 2000


def test_few_pictures_are_read(tmp_path: Path) -> None:
    seen = look_at(pa.table({"image": [picture(i) for i in range(40)], "label": [0, 1] * 20}), tmp_path)
    assert seen.column("image").rows == 16 and seen.column("label").rows == 40


def test_arrow_files_too(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, SINGLE.schema) as writer:
        writer.write_table(SINGLE, max_chunksize=25)
    split = open_split("train", [str(tmp_path / "a.arrow")])
    assert sample(split, ["stars"], 9).num_rows == 9
    assert count_labels(split, "stars") == Labels((("1", 20), ("2", 20), ("3", 20)), 60, 0)


@pytest.mark.parametrize(
    ("values", "counts", "nulls"),
    [
        (pa.array(["b", "a", "b", None]), (("b", 2), ("a", 1)), 1),
        (pa.array(["b", "a", "b"]).dictionary_encode(), (("b", 2), ("a", 1)), 0),
        (pa.array([True, False, True]), (("True", 2), ("False", 1)), 0),
        (pa.array([["a", "b"], ["b"], None]), (("b", 2), ("a", 1)), 1),
        (pa.array([0.5, float("nan"), None]), (), 2),
        (pa.array([[{"start": 1}]]), (), 0),
    ],
    ids=str,
)
def test_labels_are_counted(values: pa.Array, counts: object, nulls: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": values}), tmp_path / "a.parquet")
    found = count_labels(open_split("train", [str(tmp_path)]), "y")
    assert (found.counts, found.nulls, found.rows) == (counts, nulls, len(values))


def test_classes_with_names(tmp_path: Path) -> None:
    seen = look_at(named_classes(pa.table({"y": [1, 1, -1]}), "y", ["no", "yes"]), tmp_path)
    assert seen.column("y").class_names == ("no", "yes") and seen.column("y").feature == "ClassLabel"
    counts = count_labels(open_split("train", [str(tmp_path)]), "y").counts
    assert counts == (("yes", 2), ("-1", 1))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    seen = look_at(SINGLE, tmp_path)
    with pytest.raises(DataError, match=r"--label star: toy.parquet has no such column; did you mean stars\?"):
        seen.column("star", "--label")
    with pytest.raises(DataError, match=r"--text zzz: toy.parquet has no such column; it has id, review, stars"):
        seen.column("zzz")


def test_names_with_commas_are_names(tmp_path: Path) -> None:
    seen = look_at(pa.table({"a,b": ["x"], "a": ["x"]}), tmp_path)
    assert seen.named("a,b") == ("a,b",) and seen.named("a, c") == ("a", "c")
