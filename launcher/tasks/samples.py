"""Samples of a task: encoded rows, and micro-batches of them. Data workers make the first, train workers the second."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import pyarrow as pa

# Data workers encode without the cost of importing torch.
if TYPE_CHECKING:
    import numpy as np
    import torch


_Cell = TypeVar("_Cell")
_Value = TypeVar("_Value")


def read_each(
    cells: Iterable[_Cell], read: Callable[[_Cell], _Value]
) -> tuple[list[_Value], list[int], tuple[tuple[int, str], ...]]:
    """Return what `read` makes of each cell or row, their positions, and (position, reason) of those it refuses.

    Args:
        cells: Cells of a column, or rows.
        read: Function that raises ValueError with the reason.
    """
    values, valid_rows, problems = [], [], []
    for i, cell in enumerate(cells):
        try:
            values.append(read(cell))
            valid_rows.append(i)
        except ValueError as problem:
            problems.append((i, str(problem)))
    return values, valid_rows, tuple(problems)


@dataclass(frozen=True)
class Encoded:
    """Samples of a table of rows.

    Args:
        samples: One row for each usable input row, with the columns that `collate` reads.
        valid_rows: Positions of those rows in the input table, int64 (n,), ascending.
        lengths: Cost of each sample, int64 (n,), for length grouping and packing; tokens for text, 1 for pictures.
        weights: Weight of each sample in its global batch, float64 (n,); the loss of a global batch is the sum of its
            sample losses divided by the sum of these. 1 for a class per row, the number of labelled tokens for tags.
        problems: Pairs (position, reason) of the rows that cannot be used; `data.on_bad_row` decides what follows.
    """

    samples: pa.Table
    valid_rows: "np.ndarray"
    lengths: "np.ndarray"
    weights: "np.ndarray"
    problems: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class LostLabels:
    """Labels that can be read but not represented: their rows are used, the labels are neither learned nor scored.

    Args:
        labels: Number of labels of this kind in the rows that were checked.
        lost: Pairs (position, reason) of the lost labels.
        kind: Plural noun for these labels, for messages.
        remedy: Advice to the user.
    """

    labels: int = 0
    lost: tuple[tuple[int, str], ...] = ()
    kind: str = "labels"
    remedy: str = ""


@dataclass(frozen=True)
class Batch:
    """Micro-batch of B rows on one device; a row is one sample, or several where samples are packed.

    Args:
        inputs: Keyword arguments of the model's forward without the labels: tensors (S, ...), or flags. S is B where
            each row is one sequence, and more where rows have several.
        labels: Targets that the losses compare with, (B, ...) or (S, ...); -100 marks a position without a label.
        mask: 1.0 for a real row and 0.0 for a filler, float32 (B,). Fillers keep the number of forward passes equal
            on all ranks, without which collectives would deadlock. A micro-batch has rows or one filler, never both.
        targets: Tensors of other kinds that losses and metrics need, by name: row of each sequence, boxes, scores.
        source: Index of the source of each row in a mixture, int64 (B,); None without a mixture.
        totals: Sums over the whole global batch: `weight`, and each of `Task.normalizers`. Empty in `predict`.
        rows: Row id of each row in its split, -1 for a filler. Empty in `predict`.
    """

    inputs: "Mapping[str, torch.Tensor | bool]"
    labels: "torch.Tensor"
    mask: "torch.Tensor"
    targets: "Mapping[str, torch.Tensor]" = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    source: "torch.Tensor | None" = None
    rows: Sequence[int] = ()

    def to(self, device: "torch.device") -> "Batch":
        """Return a copy on another device. Copies from pinned memory are asynchronous."""
        return replace(
            self,
            inputs={n: v if isinstance(v, bool) else v.to(device, non_blocking=True) for n, v in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            targets={name: tensor.to(device, non_blocking=True) for name, tensor in self.targets.items()},
            source=None if self.source is None else self.source.to(device, non_blocking=True),
        )


Outputs: TypeAlias = "Mapping[str, torch.Tensor]"
"""Outputs of a model for a micro-batch by name, such as `logits`: the `ModelOutput` of transformers is one."""
