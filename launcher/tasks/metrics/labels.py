"""Labels of whole rows: one class, several classes, or a number. Their targets, losses, metrics and predictions.

Runs on the head (class names), in data workers (targets, without torch) and in train workers. Tasks that label whole
rows compose it, whatever their inputs are. Read `tags.py` for labels of words.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator

from launcher.errors import DataError
from launcher.formatting import list_names, show_value
from launcher.tasks.metrics.class_weights import count_classes, weight_tensor
from launcher.tasks.padding import floats_to_integers
from launcher.tasks.params import is_list
from launcher.tasks.results import MetricMode, RowResult

if TYPE_CHECKING:
    import torch

    from launcher.tasks.metrics.classification import MulticlassMetrics, MultilabelMetrics
    from launcher.tasks.metrics.regression import RegressionMetrics

Kind = Literal["single-label", "multi-label", "regression"]

_METRICS: dict[Kind, tuple[str, ...]] = {
    "single-label": ("accuracy", "macro_f1", "micro_f1", "macro_precision", "macro_recall", "roc_auc"),
    "multi-label": ("f1", "macro_f1", "macro_precision", "macro_recall", "exact_match", "roc_auc"),
    "regression": ("pearson", "spearman"),
}
_BINARY_METRICS = ("f1", "precision", "recall")
# With five classes the true one is always among the first five.
_MIN_TOP5_CLASSES = 6


def _check_class_names(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
        raise ValueError("labels needs at least two names, each once; null reads them from the training data")
    return names


ClassNames = Annotated[tuple[str, ...] | None, AfterValidator(_check_class_names)]
"""Class names in a job file."""


@dataclass(frozen=True)
class Labels:
    """Label of a whole row.

    Args:
        column: Label column, for messages.
        kind: Form of the label: one class, several classes, or a number.
        names: Class names in order; empty for regression.
        weights: Loss weight of each class, for single-label; empty weighs all alike.
        smoothing: Share of each target that the loss spreads over all classes, for single-label.
    """

    column: str
    kind: Kind
    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    @property
    def metric_modes(self) -> dict[str, MetricMode]:
        """Direction of each metric, the main metric first."""
        names = _METRICS[self.kind]
        # `metric_modes` is read before the names are inferred too: then only the metrics that any classes have are
        # listed.
        if self.kind == "single-label" and len(self.names) == 2:
            names += _BINARY_METRICS
        if self.kind == "single-label" and len(self.names) >= _MIN_TOP5_CLASSES:
            names += ("top5_accuracy",)
        modes: dict[str, MetricMode] = dict.fromkeys(names, "max")
        return modes | ({"mse": "min"} if self.kind == "regression" else {})

    def infer_names(
        self, pieces: Iterable[pa.Array], arrow_type: pa.DataType, known: tuple[str, ...] | None
    ) -> tuple[str, ...] | None:
        """Return the class names of a column of labels (`infer_names`); None for regression."""
        return None if self.kind == "regression" else infer_names(pieces, arrow_type, known, self.column)

    def config(self) -> dict[str, object]:
        """Return the entries of the model's config: number, names and kind of the labels."""
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
    def _has_numeric_names(self) -> bool:
        return any(name.lstrip("-").isdigit() for name in self.names)

    def target(self, value: object) -> list[float]:
        """Return a label as numbers: its class index, a 0/1 for each class, or the number itself.

        Raises:
            ValueError: The label is null, unknown, or not a number; the text says which.
        """
        # NaN is pandas' null; in a regression `_number` refuses it as not finite.
        if value is None or (value != value and self.kind != "regression"):
            raise ValueError(f"{self.column} is null")
        if self.kind == "multi-label":
            if not isinstance(value, list):
                raise ValueError(f"{self.column} is {show_value(value)}, which is not a list of labels")
            chosen = {self._class(v) for v in value}
            # Dense, 8 bytes a class and row: the loss needs a target for each class.
            return [float(i in chosen) for i in range(len(self.names))]
        return [float(self._class(value))] if self.kind == "single-label" else [self._number(value)]

    def find_invalid_target(self, pieces: Iterable[pa.Array], arrow_type: pa.DataType) -> tuple[int, str] | None:
        """Return the first row with an invalid class, and why; None for lists and numbers, which `encode` checks.

        Checks the distinct values of each chunk only, so a million rows take milliseconds.
        """
        types = (
            pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating
        )  # fmt: skip
        if self.kind != "single-label" or not any(fits(arrow_type) for fits in types):
            return None
        before = 0
        for piece in map(floats_to_integers, pieces):
            problems = []
            for value in pc.unique(piece):
                try:
                    self.target(value.as_py())
                except ValueError as problem:
                    # `pc.index` finds no null, so nulls are searched for as such.
                    row = pc.index(piece.is_null(), True) if not value.is_valid else pc.index(piece, value)
                    problems.append((before + int(row.as_py()), str(problem)))
            if problems:
                return min(problems)
            before += len(piece)
        return None

    def _number(self, value: object) -> float:
        try:
            # By its text, which also reads Decimal and numbers in strings, and refuses booleans.
            number = float(str(value))
        except ValueError:
            raise ValueError(f"{self.column} is {show_value(value)}, which is not a number") from None
        if not np.isfinite(number):
            raise ValueError(f"{self.column} is {number}, which is not a finite number")
        return number

    def _class(self, value: object) -> int:
        # pandas stores an integer column with nulls as floats: 3.0 is the class 3.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        index = None if value is None else self._index.get(str(value))
        # An int that is not a name indexes the names. If names are numbers themselves it is an unknown class instead.
        if index is None and isinstance(value, int) and not self._has_numeric_names and 0 <= value < len(self.names):
            return int(value)
        if index is None:
            raise ValueError(f"{self.column} is {show_value(value)}, which is not one of {list_names(self.names)}")
        return index

    def counts(self, pieces: Iterable[pa.Array], names: tuple[str, ...]) -> list[int]:
        """Return the number of rows of each class in a column."""
        # Counted while names are inferred, before the parameters have them: hence the copy with `names`.
        return count_classes(map(floats_to_integers, pieces), names, replace(self, names=names)._class)

    def sample_weights(self, labels: Sequence[Sequence[float]]) -> np.ndarray:
        """Return the weight of each row in its global batch, float64 (n,).

        Args:
            labels: Results of `target`; [] for a row without a label, which weighs 1.
        """
        return np.array([self.weights[int(row[0])] if row and self.weights else 1.0 for row in labels], np.float64)

    def for_evaluation(self) -> "Labels":
        """Return the same labels under plain cross entropy."""
        return replace(self, weights=(), smoothing=0.0)

    def tensor(self, targets: pa.ChunkedArray) -> "torch.Tensor":
        """Return results of `target` as a tensor.

        Returns:
            int64 (B,) for single-label, float32 (B, classes) for multi-label, float32 (B,) for regression.
        """
        import torch

        # float32 holds class indices exactly up to 2**24.
        values = torch.tensor(targets.to_pylist(), dtype=torch.float32)
        if self.kind == "multi-label":
            return values
        # `predict` has no targets: rows are empty then, and the slice keeps the result empty instead of failing.
        flat = values.reshape(len(targets), -1)[:, :1].squeeze(-1)
        return flat.long() if self.kind == "single-label" else flat

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Return the loss of each row in fp32, (B,).

        Cross entropy for single-label, its binary form averaged over the classes for multi-label, the squared error for
        regression. Divided by the sum of `sample_weights`, weighted and smoothed losses equal those of
        `torch.nn.CrossEntropyLoss`.
        """
        from torch.nn import functional

        if self.kind == "single-label":
            # In fp32, whatever the precision of training. With `reduction="none"` torch multiplies each loss by its
            # weight and does not divide: the loop divides by the sum over the global batch.
            weight = weight_tensor(self.weights, logits.device)
            return functional.cross_entropy(
                logits.float(), labels, weight, reduction="none", label_smoothing=self.smoothing
            )
        if self.kind == "multi-label":
            return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").mean(-1)
        return functional.mse_loss(logits.float().squeeze(-1), labels, reduction="none")

    def metrics(self, device: "torch.device") -> "MulticlassMetrics | MultilabelMetrics | RegressionMetrics":
        """Return new metric states on a device."""
        from launcher.tasks.metrics.classification import MulticlassMetrics, MultilabelMetrics
        from launcher.tasks.metrics.regression import RegressionMetrics

        if self.kind == "regression":
            return RegressionMetrics(device)
        return (MulticlassMetrics if self.kind == "single-label" else MultilabelMetrics)(self.names, device)

    @property
    def prediction_schema(self) -> pa.Schema:
        """Columns that `decode` returns."""
        if self.kind == "regression":
            return pa.schema({"prediction": pa.float64()})
        prediction = pa.string() if self.kind == "single-label" else pa.list_(pa.string())
        return pa.schema({"prediction": prediction, "scores": pa.string()})

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """Return `prediction` (class name, list of names, or number) and `scores` (JSON of name to probability)."""
        if self.kind == "regression":
            return pa.table({"prediction": logits.float().squeeze(-1).tolist()}, self.prediction_schema)
        is_single = self.kind == "single-label"
        # One copy to the host for the whole batch.
        scores = (logits.float().softmax(-1) if is_single else logits.float().sigmoid()).cpu().numpy()
        # JSON by hand: repr of a finite float is valid JSON, and json.dumps of each row takes ten times as long.
        keys = [f"{json.dumps(name, ensure_ascii=False)}: " for name in self.names]
        # repr of NaN is `nan`, which no JSON parser reads; json.dumps writes what Python's own parser reads back.
        number = repr if np.isfinite(scores).all() else json.dumps
        texts = ["{" + ", ".join(map(str.__add__, keys, map(number, row))) + "}" for row in scores.tolist()]
        if is_single:
            predictions = pa.array(self.names).take(pa.array(scores.argmax(-1)))
        else:
            predictions = pa.array([[self.names[i] for i in np.flatnonzero(row)] for row in scores > 0.5])
        return pa.table({"prediction": predictions.cast(self.prediction_schema.field(0).type), "scores": texts})

    def row_results(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[RowResult]:
        """Return truth and prediction of B rows in words."""
        predictions = self.decode(logits, samples).column("prediction").to_pylist()
        return [
            RowResult(self._label_text(label), _to_text(p))
            for label, p in zip(labels.tolist(), predictions, strict=True)
        ]

    def _label_text(self, label: object) -> str:
        if isinstance(label, list):
            return _to_text([name for name, is_set in zip(self.names, label, strict=True) if is_set])
        return self.names[int(str(label))] if self.kind == "single-label" else _to_text(float(str(label)))


def _to_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def infer_names(
    pieces: Iterable[pa.Array], arrow_type: pa.DataType, known: tuple[str, ...] | None, column: str
) -> tuple[str, ...]:
    """Return the class names of a column of labels or of lists of labels.

    Args:
        pieces: Labels of the training data, in chunks.
        arrow_type: Type of the column.
        known: Class names in the metadata of the files, indexed by int labels; None takes the distinct labels.
        column: Label column, for messages.

    Raises:
        DataError: The column does not hold classes, or fewer than two.
    """
    if pa.types.is_struct(arrow_type):
        raise DataError(
            f"task: column {column} of the training data is of type {arrow_type}; classes are ints or strings"
        )
    # Names of the files come first: a class that no training row has keeps its index.
    names = known or distinct(pieces)
    if pa.types.is_floating(arrow_type) and not known:
        fraction = next((value for value in names if not _INTEGER.fullmatch(value)), None)
        if fraction is not None:
            raise DataError(
                f"task: column {column} of the training data holds {fraction}; classes are whole numbers or strings; "
                "for amounts set kind: regression"
            )
    if len(names) < 2:
        only = f"only the label {names[0]!r}" if names else "no label"
        raise DataError(f"task: column {column} of the training data holds {only}; at least two classes are needed")
    if not known:
        check_placeholders(names, column)
    return names


_INTEGER = re.compile(r"-?\d+")
# What data sets write for "no label": -100 is the convention of torch and transformers, 255 that of masks and bytes.
_IGNORED_LABEL, _LAST_BYTE = "-100", "255"
_POSSIBLE_PLACEHOLDERS = ("-1", "-9", "-99", "-999", "99", "999", "9999")
_NULL_NAMES = ("nan", "none", "null", "<na>")


def check_placeholders(names: Sequence[str], column: str) -> None:
    """Refuse a class that conventionally means "no label", unless the job file lists it.

    Args:
        names: Class names inferred from the training data.
        column: Label column, for messages.

    Raises:
        DataError: There is such a class.
    """
    for name in names:
        # 255 is a class like any other among 256 of them, so it counts only where the other classes end before it.
        is_last_byte = name == _LAST_BYTE and _are_consecutive([other for other in names if other != name])
        if not name.strip() or name == _IGNORED_LABEL or is_last_byte:
            raise DataError(
                f"task: column {column} of the training data has the class {name!r}, which usually says that a row has "
                "no label; list the classes in task.labels, without it and with data.on_bad_row: skip, or with it if "
                "it is one"
            )


def class_name_notes(names: Sequence[str], column: str) -> list[str]:
    """Return notes for the plan on class names that look alike, or that may mean "no label"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        # NFKC also folds full-width letters and no-break spaces, which look the same on a screen.
        groups.setdefault(" ".join(unicodedata.normalize("NFKC", name).split()).casefold(), []).append(name)
    notes = [
        f"column {column} has the classes {', '.join(map(repr, alike))}, which differ in spaces and capitals alone: "
        "write them alike if they are one class"
        for alike in groups.values()
        if len(alike) > 1
    ]
    for name in names:
        others = [other for other in names if other != name]
        if (name in _POSSIBLE_PLACEHOLDERS and _are_consecutive(others)) or name.casefold() in _NULL_NAMES:
            notes.append(
                f"column {column} has the class {name!r}: if it says that a row has no label, leave it out of "
                "task.labels and set data.on_bad_row: skip"
            )
    return notes


def _are_consecutive(names: Sequence[str]) -> bool:
    """Return whether classes are 0 to n - 1, or 1 to n, so that a number outside of them stands out."""
    numbers = sorted(int(name) for name in names if _INTEGER.fullmatch(name))
    return len(names) > 1 and numbers in ([*range(len(names))], [*range(1, len(names) + 1)])


def distinct(pieces: Iterable[pa.Array]) -> tuple[str, ...]:
    """Return the class names in a column of labels or of lists: ints by value, strings alphabetically, no nulls."""
    values: set[str | int | bool | None] = set()
    for piece in pieces:
        # Distinct values of one chunk at a time: memory holds the classes, never the column.
        values.update(
            pc.unique(floats_to_integers(pc.list_flatten(piece) if is_list(piece.type) else piece)).to_pylist()
        )
    # Sorted, so that a class index depends on the set of values alone, not on the order of files or chunks.
    return tuple(str(value) for value in sorted(values - {None}))  # type: ignore[type-var]  # of one type
