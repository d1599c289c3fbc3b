"""Class weights of the loss: validation of the job file, counting, and the tensor.

Runs on the client and the head (names and counts, without torch) and in train workers (the tensor). Read `labels.py`
and `tags.py` next, which use it.
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


def _parse_weights(value: object) -> object:
    """Return class weights with class names as strings: YAML reads the class 1 as a number.

    Raises:
        ValueError: The value is neither a mapping to positive weights nor "balanced". A weight of 0 is refused because
            a global batch of such rows would divide its loss by 0.
    """
    if value is None or value == "balanced":
        return value
    if isinstance(value, dict) and all(_is_weight(weight) for weight in value.values()):
        return {str(name): weight for name, weight in value.items()}
    shown = f"{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}" if isinstance(value, dict) else value
    raise ValueError(f"class_weights is {shown}; give balanced or {{class: weight above 0}}")


def _is_weight(value: object) -> bool:
    # A boolean is an int to Python: `true` would weigh 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


ClassWeights = Annotated[Literal["balanced"] | dict[str, float] | None, BeforeValidator(_parse_weights)]
"""Class weights in a job file."""


def count_classes(pieces: Iterable[pa.Array], names: Sequence[str], class_of: Callable[[object], int]) -> list[int]:
    """Return the number of rows of each class in a column; rows with an invalid label are not counted.

    Args:
        pieces: Values of the column, in chunks.
        names: Class names in order.
        class_of: Function from a value to its class index; raises ValueError for an invalid label.
    """
    counts = [0] * len(names)
    for piece in pieces:
        # Distinct values only: Arrow counts a chunk in one pass, and Python sees each class once.
        for entry in pc.value_counts(piece).to_pylist():
            try:
                counts[class_of(entry["values"])] += entry["counts"]
            except ValueError:
                # A bad row: `data.on_bad_row` decides.
                continue
    return counts


def balanced_weights(counts: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """Return the weights of scikit-learn's `compute_class_weight("balanced")`: rows / (k * rows of the class).

    k counts the classes that occur; a class without a training row gets 1.0, which no loss ever uses.
    """
    rows, occurring = sum(counts), sum(count > 0 for count in counts)
    return {
        name: float(rows / (occurring * count)) if count else 1.0 for name, count in zip(names, counts, strict=True)
    }


def complete_weights(weights: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return a weight for each class in order, 1.0 for those that the job file does not list.

    Raises:
        DataError: The job file lists a class that the data does not have.
    """
    for name in weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            remedy = f"did you mean {near[0]}?" if near else f"the classes are {', '.join(names)}"
            raise DataError(f"task.class_weights: {name!r} is not a class; {remedy}")
    return {name: float(weights.get(name, 1.0)) for name in names}


def weight_tensor(weights: tuple[float, ...], device: "torch.device") -> "torch.Tensor | None":
    """Return class weights as float32 (classes,) on a device, or None if all classes weigh the same."""
    from torch._guards import detect_fake_mode

    if not weights:
        return None
    # Trap: the cache must neither get a fake tensor (`driver/memory/activations.py`) nor return a real one among fake
    # ones.
    if detect_fake_mode() is not None:
        return _weight_tensor.__wrapped__(weights, device)
    return _weight_tensor(weights, device)


# Cached: a new tensor at each step would be a host-to-device copy, which waits for the device.
@lru_cache(maxsize=4)
def _weight_tensor(weights: tuple[float, ...], device: "torch.device") -> "torch.Tensor":
    import torch

    return torch.tensor(weights, dtype=torch.float32, device=device)
