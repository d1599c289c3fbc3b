"""Note on rows sorted by class, if a shuffle pool holds few of the classes; none for rows in another order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import prepared_job

_ROWS, _CLASSES = 6000, 200


def _notes(model: Path, folder: Path, labels: "np.ndarray") -> list[str]:
    (folder / "data").mkdir()
    texts = [f"w{i % 200} " * 300 + str(i) for i in range(len(labels))]
    table = pa.table({"text": texts, "label": pa.array(labels)})
    pq.write_table(table, folder / "data/train.parquet", row_group_size=1000)
    data = {"train": str(folder / "data"), "shuffle_pool_mib": 1}
    return [note for note in prepared_job(model, data, folder).plan.notes if "sorted" in note]


def test_rows_sorted_by_one_of_many_classes_are_noted(tiny_bert: Path, tmp_path: Path) -> None:
    (note,) = _notes(tiny_bert, tmp_path, np.arange(_ROWS) * _CLASSES // _ROWS)
    assert note.startswith("data.train: rows are sorted by label: of 200 classes a shuffle pool of 1 MiB holds ")


@pytest.mark.parametrize("order", ["random", "long tail", "two classes"])
def test_rows_in_another_order_are_not_noted(tiny_bert: Path, tmp_path: Path, order: str) -> None:
    """Include a long tail, of which any pool has few classes, and two sorted classes, of which it has both."""
    rng = np.random.default_rng(0)
    labels = {
        "random": rng.integers(0, _CLASSES, _ROWS),
        "long tail": np.concatenate([np.arange(_CLASSES), np.minimum(rng.geometric(0.3, _ROWS), _CLASSES) - 1]),
        "two classes": np.arange(_ROWS) * 2 // _ROWS,
    }[order]
    labels = rng.permutation(labels) if order == "long tail" else labels
    assert _notes(tiny_bert, tmp_path, labels) == []
