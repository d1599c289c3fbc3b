"""Jobs and data for tests: small, real, and of awkward sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from launcher.driver.prepare import PreparedJob, prepare
from launcher.spec.job import JobSpec
from launcher.spec.model import ModelSpec
from launcher.tasks import task_class


@dataclass(frozen=True)
class Columns:
    """A table as `launcher.tasks.base.TrainingColumns`."""

    table: pa.Table

    @property
    def names(self) -> list[str]:
        return list(self.table.column_names)

    def type_of(self, name: str) -> pa.DataType:
        return self.table.schema.field(name).type

    def pieces(self, name: str) -> Iterator[pa.Array]:
        yield from self.table.column(name).chunks

    def class_names(self, name: str) -> tuple[str, ...] | None:
        return None


def example_table(rows: int, seed: int = 0, task: str = "text-classification") -> pa.Table:
    """Return synthetic rows that a model can learn."""
    kind = task_class(task)
    return kind(kind.Params(), ModelSpec(name="none"), 0).example_rows(rows, seed)


def write_splits(
    folder: Path,
    train: int,
    validation: int = 0,
    test: int = 0,
    row_group: int = 100,
    task: str = "text-classification",
) -> dict[str, str]:
    """Write Parquet files of some sizes, and return the `data:` section that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    section = {}
    for seed, (name, rows) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        if rows:
            pq.write_table(example_table(rows, seed, task), folder / f"{name}.parquet", row_group_size=row_group)
            section[name] = str(folder / f"{name}.parquet")
    return section


def mark_texts(path: str) -> None:
    """Put `<sep>` before and `<end-of-row>` behind every text of a Parquet file: tokens that no tiny model has."""
    table = pq.read_table(path)
    texts = [f"<sep> {text} <end-of-row>" for text in table.column("text").to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", pa.array(texts)), path)


def make_job(model_path: Path, data: dict[str, Any], storage: Path, /, **sections: Any) -> JobSpec:
    """Return a job for tests: batch 11 in 4 parts, learning rate 1e-3, no dropout, unless `sections` say otherwise."""
    base: dict[str, Any] = {
        "name": "test",
        "task": {"type": "text-classification", "max_length": 32},
        "model": {"name": str(model_path), "dropout": 0.0},
        "data": {"window_steps": 4, **data},
        "train": {"epochs": 1, "batch_size": 11, "learning_rate": 1e-3, "log_every_steps": 1},
        "checkpoint": {"every_minutes": None},
        "parallel": {"zero": 2},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "output": {"storage": str(storage)},
    }
    if sections.get("task", {}).get("type", "text-classification") != "text-classification":
        base["task"] = {}
    for name, values in sections.items():
        base[name] = {**base[name], **values} if isinstance(base.get(name), dict) else values
    if base["train"]["batch_size"] >= 4:
        base["train"].setdefault("virtual_ranks", 4)  # half of the default: as many forward passes in each step
    return JobSpec.model_validate(base)


def prepared_job(model_path: Path, data: dict[str, Any], storage: Path, /, **sections: Any) -> PreparedJob:
    """Return a job of `make_job`, resolved and planned."""
    return prepare(make_job(model_path, data, storage, **sections))
