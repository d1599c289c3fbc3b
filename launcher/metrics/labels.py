"""Labels of a row as a whole: one class, several, or a number. Targets, losses, metrics and predictions of such heads.

Runs in data workers (targets; no torch) and train workers. Tasks that label whole rows compose it, whatever they read.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import torch

    from launcher.metrics.classification import MulticlassMetrics, MultilabelMetrics
    from launcher.metrics.regression import RegressionMetrics

Kind = Literal["single-label", "multi-label", "regression"]

_MAIN = {"single-label": "accuracy", "multi-label": "f1", "regression": "pearson"}
_HIGHER = {
    "single-label": ("accuracy", "micro_f1", "f1", "precision", "recall"),
    "multi-label": ("f1", "exact_match"),
    "regression": ("pearson", "spearman"),
}
_MACRO = ("macro_f1", "macro_precision", "macro_recall", "roc_auc")


@dataclass(frozen=True)
class Labels:
    """What a row's label may be.

    Args:
        column: the column that holds it, for messages.
        kind: one class, several, or a number.
        names: class names in order; empty for regression.
    """

    column: str
    kind: Kind
    names: tuple[str, ...]

    @property
    def main_metric(self) -> str:
        """The metric that decides which checkpoint is best."""
        return _MAIN[self.kind]

    def metric_mode(self, metric: str) -> Literal["max", "min"] | None:
        """Whether more of a metric is better; None for one that these labels do not have."""
        if metric == "loss" or (metric == "mse" and self.kind == "regression"):
            return "min"
        higher = _HIGHER[self.kind] + (() if self.kind == "regression" else _MACRO)
        return "max" if metric in higher else None

    def config(self) -> dict[str, object]:
        """The model config's entries: number, names and kind of the labels."""
        names = self.names or ("value",)
        problem = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": problem.get(self.kind, "regression"),
        }

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _numeric(self) -> bool:
        return any(name.lstrip("-").isdigit() for name in self.names)

    def target(self, value: object) -> list[float]:
        """A label as numbers: its class, a 0/1 for each class, or itself.

        Raises:
            ValueError: it is null, unknown, or not a number; the text says which.
        """
        if value is None:
            raise ValueError(f"{self.column} is null")
        if self.kind == "multi-label":
            if not isinstance(value, list):
                raise ValueError(f"{self.column} is {value!r}, which is not a list of labels")
            chosen = {self._class(v) for v in value}
            return [float(i in chosen) for i in range(len(self.names))]
        return [float(self._class(value))] if self.kind == "single-label" else [self._number(value)]

    def _number(self, value: object) -> float:
        try:
            number = float(str(value))
        except ValueError:
            raise ValueError(f"{self.column} is {value!r}, which is not a number") from None
        if not np.isfinite(number):
            raise ValueError(f"{self.column} is {number}, which is not a finite number")
        return number

    def _class(self, value: object) -> int:
        index = self._index.get(str(value))
        # An int that is no name indexes the names, unless names are numbers themselves: then it is unknown.
        if index is None and isinstance(value, int) and not self._numeric and 0 <= value < len(self.names):
            return int(value)
        if index is None:
            raise ValueError(f"{self.column} is {value!r}, which is not one of {', '.join(self.names)}")
        return index

    def tensor(self, targets: pa.ChunkedArray) -> "torch.Tensor":
        """A column of `target` values: int64 (B,), float (B, classes) for multi-label, float (B,) for regression."""
        import torch

        values = torch.tensor(targets.to_pylist(), dtype=torch.float32)
        if self.kind == "multi-label":
            return values
        flat = values.reshape(len(targets), -1)[:, :1].squeeze(-1)
        return flat.long() if self.kind == "single-label" else flat

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """(B,) cross entropy; multi-label its binary form averaged over classes; regression the squared error."""
        from torch.nn import functional

        if self.kind == "single-label":
            return functional.cross_entropy(logits.float(), labels, reduction="none")
        if self.kind == "multi-label":
            return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").mean(-1)
        return functional.mse_loss(logits.float().squeeze(-1), labels, reduction="none")

    def metrics(self, device: "torch.device") -> "MulticlassMetrics | MultilabelMetrics | RegressionMetrics":
        """Fresh metric states."""
        from launcher.metrics.classification import MulticlassMetrics, MultilabelMetrics
        from launcher.metrics.regression import RegressionMetrics

        if self.kind == "regression":
            return RegressionMetrics(device)
        return (MulticlassMetrics if self.kind == "single-label" else MultilabelMetrics)(self.names, device)

    def predict(self, logits: "torch.Tensor") -> pa.Table:
        """`prediction` (class name, list of names, or number) and `scores` (JSON of name to probability)."""
        if self.kind == "regression":
            return pa.table({"prediction": pa.array(logits.float().squeeze(-1).tolist(), pa.float64())})
        single = self.kind == "single-label"
        scores = (logits.float().softmax(-1) if single else logits.float().sigmoid()).tolist()
        text = [json.dumps(dict(zip(self.names, row, strict=True)), ensure_ascii=False) for row in scores]
        if single:
            chosen = pa.array([self.names[int(np.argmax(row))] for row in scores], pa.string())
        else:
            above = [[n for n, s in zip(self.names, row, strict=True) if s > 0.5] for row in scores]
            chosen = pa.array(above, pa.list_(pa.string()))
        return pa.table({"prediction": chosen, "scores": pa.array(text, pa.string())})

    def text(self, label: object) -> str:
        """A label, as it stands in `tensor`, in words."""
        if isinstance(label, list):
            return ", ".join(n for n, on in zip(self.names, label, strict=True) if on) or "none"
        return self.names[int(str(label))] if self.kind == "single-label" else f"{float(str(label)):.4g}"


def distinct(column: pa.ChunkedArray) -> tuple[str, ...]:
    """The class names in a column of labels or lists of labels: ints by value, strings by alphabet, nulls left out."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    return tuple(str(value) for value in sorted(v for v in pc.unique(column).to_pylist() if v is not None))
