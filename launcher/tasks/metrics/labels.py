"""Labels of a row as a whole: one class, several, or a number. Targets, losses, metrics and predictions of such heads.

Runs in data workers (targets; no torch) and train workers. Tasks that label whole rows compose it, whatever they read.
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
from launcher.rundir.records import Mark
from launcher.tasks.metrics.class_weights import count_classes, weight_tensor
from launcher.tasks.padding import whole_numbers

if TYPE_CHECKING:
    import torch

    from launcher.tasks.metrics.classification import MulticlassMetrics, MultilabelMetrics
    from launcher.tasks.metrics.regression import RegressionMetrics

Kind = Literal["single-label", "multi-label", "regression"]

_MODES: dict[Kind, tuple[str, ...]] = {
    "single-label": ("accuracy", "macro_f1", "micro_f1", "macro_precision", "macro_recall", "roc_auc"),
    "multi-label": ("f1", "macro_f1", "macro_precision", "macro_recall", "exact_match", "roc_auc"),
    "regression": ("pearson", "spearman"),
}
_BINARY = ("f1", "precision", "recall")
# As many classes as make the right one among the first five worth telling.
_TOP5_CLASSES = 6


def check_names(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Class names as a job file gives them.

    Raises:
        ValueError: fewer than two, or one of them twice.
    """
    if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
        raise ValueError("labels needs at least two names, each once; null reads them from the training data")
    return names


ClassNames = Annotated[tuple[str, ...] | None, AfterValidator(check_names)]
"""Class names in a job file."""


@dataclass(frozen=True)
class Labels:
    """What a row's label may be.

    Args:
        column: the column that holds it, for messages.
        kind: one class, several, or a number.
        names: class names in order; empty for regression.
        weights: of each class in the loss, for single-label; empty weighs all alike.
        smoothing: share of each target that the loss spreads over all classes, for single-label.
    """

    column: str
    kind: Kind
    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    @property
    def metric_modes(self) -> "dict[str, Literal['max', 'min']]":
        """Whether more or less of each metric is better, the main metric first."""
        names = _MODES[self.kind]
        if self.kind == "single-label":
            names += _BINARY if len(self.names) == 2 else ("top5_accuracy",) * (len(self.names) >= _TOP5_CLASSES)
        modes: dict[str, Literal["max", "min"]] = dict.fromkeys(names, "max")
        return modes | ({"mse": "min"} if self.kind == "regression" else {})

    def infer_params(
        self, pieces: Iterable[pa.Array], kind: pa.DataType, known: tuple[str, ...] | None
    ) -> tuple[str, ...] | None:
        """Class names, as `infer_names` has them; None for numbers."""
        return None if self.kind == "regression" else infer_names(pieces, kind, known, self.column)

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
        if value is None or (value != value and self.kind != "regression"):
            raise ValueError(f"{self.column} is null")
        if self.kind == "multi-label":
            if not isinstance(value, list):
                raise ValueError(f"{self.column} is {show_value(value)}, which is not a list of labels")
            chosen = {self._class(v) for v in value}
            return [float(i in chosen) for i in range(len(self.names))]
        return [float(self._class(value))] if self.kind == "single-label" else [self._number(value)]

    def find_invalid_target(self, pieces: Iterable[pa.Array], kind: pa.DataType) -> tuple[int, str] | None:
        """The first row whose class cannot be used, and why; None where there is none, or labels are no classes."""
        types = (
            pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating
        )  # fmt: skip
        if self.kind != "single-label" or not any(fits(kind) for fits in types):
            return None
        before = 0
        for piece in map(whole_numbers, pieces):
            found = []
            for value in pc.unique(piece):
                try:
                    self.target(value.as_py())
                except ValueError as problem:
                    row = pc.index(piece.is_null(), True) if not value.is_valid else pc.index(piece, value)
                    found.append((before + int(row.as_py()), str(problem)))
            if found:
                return min(found)
            before += len(piece)
        return None

    def _number(self, value: object) -> float:
        try:
            number = float(str(value))
        except ValueError:
            raise ValueError(f"{self.column} is {show_value(value)}, which is not a number") from None
        if not np.isfinite(number):
            raise ValueError(f"{self.column} is {number}, which is not a finite number")
        return number

    def _class(self, value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        index = None if value is None else self._index.get(str(value))
        # An int that is no name indexes the names, unless names are numbers themselves: then it is unknown.
        if index is None and isinstance(value, int) and not self._numeric and 0 <= value < len(self.names):
            return int(value)
        if index is None:
            raise ValueError(f"{self.column} is {show_value(value)}, which is not one of {list_names(self.names)}")
        return index

    def counts(self, pieces: Iterable[pa.Array], names: tuple[str, ...]) -> list[int]:
        """Rows of each class in a column that comes in pieces."""
        return count_classes(map(whole_numbers, pieces), names, replace(self, names=names)._class)

    def sample_weights(self, labels: Sequence[Sequence[float]]) -> np.ndarray:
        """float64 (n,), what each row adds to the global batch's weight, from `target` values; [] where not known."""
        return np.array([self.weights[int(row[0])] if row and self.weights else 1.0 for row in labels], np.float64)

    def plain(self) -> "Labels":
        """The same labels under plain cross entropy."""
        return replace(self, weights=(), smoothing=0.0)

    def tensor(self, targets: pa.ChunkedArray) -> "torch.Tensor":
        """A column of `target` values: int64 (B,), float (B, classes) for multi-label, float (B,) for regression."""
        import torch

        values = torch.tensor(targets.to_pylist(), dtype=torch.float32)
        if self.kind == "multi-label":
            return values
        flat = values.reshape(len(targets), -1)[:, :1].squeeze(-1)
        return flat.long() if self.kind == "single-label" else flat

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """(B,) cross entropy; multi-label its binary form averaged over classes; regression the squared error.

        Divided by the sum of their `weigh`, weighted and smoothed losses are what `torch.nn.CrossEntropyLoss` gives.
        """
        from torch.nn import functional

        if self.kind == "single-label":
            weight = weight_tensor(self.weights, logits.device)
            return functional.cross_entropy(
                logits.float(), labels, weight, reduction="none", label_smoothing=self.smoothing
            )
        if self.kind == "multi-label":
            return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").mean(-1)
        return functional.mse_loss(logits.float().squeeze(-1), labels, reduction="none")

    def metrics(self, device: "torch.device") -> "MulticlassMetrics | MultilabelMetrics | RegressionMetrics":
        """Fresh metric states."""
        from launcher.tasks.metrics.classification import MulticlassMetrics, MultilabelMetrics
        from launcher.tasks.metrics.regression import RegressionMetrics

        if self.kind == "regression":
            return RegressionMetrics(device)
        return (MulticlassMetrics if self.kind == "single-label" else MultilabelMetrics)(self.names, device)

    @property
    def prediction_schema(self) -> pa.Schema:
        """What `decode` gives."""
        if self.kind == "regression":
            return pa.schema({"prediction": pa.float64()})
        chosen = pa.string() if self.kind == "single-label" else pa.list_(pa.string())
        return pa.schema({"prediction": chosen, "scores": pa.string()})

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """`prediction` (class name, list of names, or number) and `scores` (JSON of name to probability)."""
        if self.kind == "regression":
            return pa.table({"prediction": logits.float().squeeze(-1).tolist()}, self.prediction_schema)
        single = self.kind == "single-label"
        scores = (logits.float().softmax(-1) if single else logits.float().sigmoid()).cpu().numpy()
        # Python's own notation of a double is JSON's; a tenth of the time json.dumps takes for each row.
        keys = [f"{json.dumps(name, ensure_ascii=False)}: " for name in self.names]
        number = repr if np.isfinite(scores).all() else json.dumps
        text = ["{" + ", ".join(map(str.__add__, keys, map(number, row))) + "}" for row in scores.tolist()]
        if single:
            chosen = pa.array(self.names).take(pa.array(scores.argmax(-1)))
        else:
            chosen = pa.array([[self.names[i] for i in np.flatnonzero(row)] for row in scores > 0.5])
        return pa.table({"prediction": chosen.cast(self.prediction_schema.field(0).type), "scores": text})

    def answers(
        self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table
    ) -> list[tuple[str, str, tuple[Mark, ...]]]:
        """(truth, prediction, no marks) of each row in words."""
        predictions = self.decode(logits, samples).column("prediction").to_pylist()
        return [(self._text(label), _words(p), ()) for label, p in zip(labels.tolist(), predictions, strict=True)]

    def _text(self, label: object) -> str:
        if isinstance(label, list):
            return ", ".join(n for n, on in zip(self.names, label, strict=True) if on) or "none"
        return self.names[int(str(label))] if self.kind == "single-label" else f"{float(str(label)):.4g}"


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def infer_names(
    pieces: Iterable[pa.Array], kind: pa.DataType, known: tuple[str, ...] | None, name: str
) -> tuple[str, ...]:
    """Class names of a column of labels or of lists of labels.

    Args:
        pieces: the training data's labels, a part at a time.
        kind: their type.
        known: the names the files tell, indexed by int labels; None takes the distinct labels, ints by value, strings
            by alphabet, nulls left out.
        name: of the column, for messages.

    Raises:
        DataError: there are fewer than two.
    """
    if pa.types.is_struct(kind):
        raise DataError(f"task: column {name} of the training data is of type {kind}; classes are ints or strings")
    names = known or distinct(pieces)
    if pa.types.is_floating(kind) and not known:
        fraction = next((value for value in names if not _INTEGER.fullmatch(value)), None)
        if fraction is not None:
            raise DataError(
                f"task: column {name} of the training data holds {fraction}; classes are whole numbers or strings; for "
                "amounts set kind: regression"
            )
    if len(names) < 2:
        only = f"only the label {names[0]!r}" if names else "no label"
        raise DataError(f"task: column {name} of the training data holds {only}; at least two classes are needed")
    if not known:
        check_marks(names, name)
    return names


_INTEGER = re.compile(r"-?\d+")
# What data sets write for "no label": torch's and transformers' own mark, and that of masks and bytes.
_IGNORED, _LAST_BYTE = "-100", "255"
_PERHAPS = ("-1", "-9", "-99", "-999", "99", "999", "9999")
_NULLS = ("nan", "none", "null", "<na>")


def check_marks(names: Sequence[str], column: str) -> None:
    """Refuse a class that by all conventions is no class, unless the job file names it.

    Args:
        names: Class names that were found in the training data.
        column: Column, for the message.

    Raises:
        DataError: There is such a class.
    """
    for name in names:
        is_last_byte = name == _LAST_BYTE and _counted([other for other in names if other != name])
        if not name.strip() or name == _IGNORED or is_last_byte:
            raise DataError(
                f"task: column {column} of the training data has the class {name!r}, which usually says that a row has "
                "no label; list the classes in task.labels, without it and with data.on_bad_row: skip, or with it if "
                "it is one"
            )


def remarks(names: Sequence[str], column: str) -> list[str]:
    """Return what a person should know of class names before training: which look alike, which may be none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(unicodedata.normalize("NFKC", name).split()).casefold(), []).append(name)
    notes = [
        f"column {column} has the classes {', '.join(map(repr, alike))}, which differ in spaces and capitals alone: "
        "write them alike if they are one class"
        for alike in groups.values()
        if len(alike) > 1
    ]
    for name in names:
        others = [other for other in names if other != name]
        if (name in _PERHAPS and _counted(others)) or name.casefold() in _NULLS:
            notes.append(
                f"column {column} has the class {name!r}: if it says that a row has no label, leave it out of "
                "task.labels and set data.on_bad_row: skip"
            )
    return notes


def _counted(names: Sequence[str]) -> bool:
    """Return whether classes are 0 to n - 1, or 1 to n."""
    found = sorted(int(name) for name in names if _INTEGER.fullmatch(name))
    return len(names) > 1 and found in ([*range(len(names))], [*range(1, len(names) + 1)])


def distinct(pieces: Iterable[pa.Array]) -> tuple[str, ...]:
    """Return class names among labels or lists of them: ints by value, strings by alphabet, nulls left out."""
    found: set[str | int | bool | None] = set()
    for piece in pieces:
        is_list = pa.types.is_list(piece.type) or pa.types.is_large_list(piece.type)
        found.update(pc.unique(whole_numbers(pc.list_flatten(piece) if is_list else piece)).to_pylist())
    return tuple(str(value) for value in sorted(found - {None}))  # type: ignore[type-var]  # of one type
