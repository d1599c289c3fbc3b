"""Parameters of tasks: the keys of the `task:` section, and the columns that complete them. Runs anywhere."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, Field, model_validator

ColumnKind = Literal["text", "class", "number"]
"""How a column of a file without types (CSV) is parsed: a text keeps every character, a class becomes an integer only
where that loses nothing, and a number is parsed as one."""


class TaskParams(BaseModel):
    """Parameters of a task: its keys in the `task:` section of the job file, frozen and validated."""

    one_of: ClassVar[tuple[str, ...]] = ()
    """Keys of which at most one may be set."""

    model_config = {
        "frozen": True,
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "validate_default": True,
        "allow_inf_nan": False,
    }

    @model_validator(mode="after")
    def _check_one_of(self) -> "TaskParams":
        set_keys = [name for name in self.one_of if getattr(self, name)]
        if len(set_keys) > 1:
            raise ValueError(f"{set_keys[0]} and {set_keys[1]} are both given, but a row is one of them; keep one")
        return self


class SmoothedParams(TaskParams):
    """Parameters of tasks that train with cross entropy."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is spread over all classes while training (Szegedy et al. 2016, arXiv:1512.00567);
    validation and test losses stay plain, so that runs with different shares can be compared."""


class PackedParams(TaskParams):
    """Parameters of tasks that can train on several samples in one sequence."""

    packing: bool | Literal["auto"] = "auto"
    """Put several samples into one sequence, with the same loss curve; off for models that do not isolate them. `auto`
    packs on GPUs, and on a CPU only without `data.group_by_length`, which is faster there (1.2 times, measured)."""


class TrainingColumns(Protocol):
    """Whole columns of the training data, read before training begins."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all columns."""

    def type_of(self, name: str) -> pa.DataType:
        """Return the Arrow type of a column."""

    def pieces(self, name: str) -> Iterator[pa.Array]:
        """Yield the values of a column, in chunks that fit in memory."""

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Return the class names of an integer column if its files have them (a `ClassLabel` of `datasets`)."""


def is_list(kind: pa.DataType) -> bool:
    """Return True for lists of any length, small or large."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def item_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the items of a list; of another type that type."""
    return kind.value_type if is_list(kind) else kind
