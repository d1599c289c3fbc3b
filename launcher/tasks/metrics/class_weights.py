"""Weights of classes in the loss: what a job file may say, and what the training data makes of it.

Runs on the client and the head (names, counts; no torch) and in train workers (the tensor). `tasks/metrics/labels.py`
and `tasks/metrics/tags.py` use it.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator

from launcher.errors import DataError

if TYPE_CHECKING:
    import torch


def _weights(value: object) -> object:
    """YAML reads the class 1 as a number; class names are texts.

    Raises:
        ValueError: it is no weights at all; zero would let a global batch weigh nothing.
    """
    if value is None or value == "balanced":
        return value
    if isinstance(value, dict) and all(_is_weight(weight) for weight in value.values()):
        return {str(name): weight for name, weight in value.items()}
    given = f"{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}" if isinstance(value, dict) else value
    raise ValueError(f"class_weights is {given}; give balanced or {{class: weight above 0}}")


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


ClassWeights = Annotated[Literal["balanced"] | dict[str, float] | None, BeforeValidator(_weights)]
"""Class weights in a job file."""


def count_classes(pieces: Iterable[pa.Array], names: Sequence[str], class_of: Callable[[object], int]) -> list[int]:
    """How often each class stands in a column, whose labels that are none are left to whoever reads the rows.

    Args:
        pieces: the column's values, a part at a time.
        names: class names in order.
        class_of: the class of a value; raises ValueError where it has none.
    """
    counts = [0] * len(names)
    for piece in pieces:
        for entry in pc.value_counts(piece).to_pylist():
            try:
                counts[class_of(entry["values"])] += entry["counts"]
            except ValueError:
                continue  # a bad row: `data.on_bad_row` decides about it
    return counts


def balanced(counts: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """Rows / (k * rows of the class) for each of the k classes that occur: scikit-learn's `compute_class_weight`.

    A class without a training row gets 1.0, which no loss ever sees.
    """
    rows, occurring = sum(counts), sum(count > 0 for count in counts)
    return {
        name: float(rows / (occurring * count)) if count else 1.0 for name, count in zip(names, counts, strict=True)
    }


def completed(weights: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """A weight for each class in order, 1.0 for those that the job file leaves out.

    Raises:
        DataError: a weight is given for what is no class.
    """
    for name in weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            remedy = f"did you mean {near[0]}?" if near else f"the classes are {', '.join(names)}"
            raise DataError(f"task.class_weights: {name!r} is not a class; {remedy}")
    return {name: float(weights.get(name, 1.0)) for name in names}


@lru_cache(maxsize=4)
def weight_tensor(weights: tuple[float, ...], device: "torch.device") -> "torch.Tensor | None":
    """float32 (classes,), moved to the device once; None where all classes weigh the same."""
    import torch

    return torch.tensor(weights, dtype=torch.float32, device=device) if weights else None
