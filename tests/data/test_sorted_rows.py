"""A note on rows sorted by class, where a shuffle pool sees few of the classes; none for rows in any other order."""

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


@pytest.mark.parametrize("order", ["random", "rare", "two"])
def test_other_rows_are_not_noted(tiny_bert: Path, tmp_path: Path, order: str) -> None:
    """Drawn evenly; drawn from a long tail, of which a pool holds few classes too; sorted, of two classes."""
    dice = np.random.default_rng(0)
    labels = {
        "random": dice.integers(0, _CLASSES, _ROWS),
        "rare": np.concatenate([np.arange(_CLASSES), np.minimum(dice.geometric(0.3, _ROWS), _CLASSES) - 1]),
        "two": np.arange(_ROWS) * 2 // _ROWS,
    }[order]
    labels = dice.permutation(labels) if order == "rare" else labels
    assert _notes(tiny_bert, tmp_path, labels) == []
