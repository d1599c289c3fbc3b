"""Counts of the labels of a split."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.splits import open_split
from launcher.init.labels import count_labels


@pytest.mark.parametrize(
    ("values", "counts", "nulls"),
    [
        (pa.array(["b", "a", "b", None]), (("b", 2), ("a", 1)), 1),
        (pa.array(["b", "a", "b"]).dictionary_encode(), (("b", 2), ("a", 1)), 0),
        (pa.array([True, False, True]), (("True", 2), ("False", 1)), 0),
        (pa.array([["a", "b"], ["b"], None]), (("b", 2), ("a", 1)), 1),
        (pa.array([["b", None, "a"], [None, None], ["b"], []]), (("b", 2), ("a", 1)), 2),
        (pa.array([0.5, float("nan"), None]), (), 2),
        (pa.array([[{"start": 1}]]), (), 0),
    ],
    ids=str,
)
def test_labels_are_counted(values: pa.Array, counts: object, nulls: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": values}), tmp_path / "a.parquet")
    labels = count_labels(open_split("train", [str(tmp_path)]), "y")
    assert (labels.counts, labels.nulls, labels.rows) == (counts, nulls, len(values))
