"""What tasks whose truth is a column of labels share, whatever they read. Data workers and train workers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
from pydantic import model_validator

from launcher.rundir.records import Mark
from launcher.spec.model import ModelSpec
from launcher.tasks.base import (
    MetricMode,
    RowResult,
    SmoothedParams,
    Task,
    TaskMetrics,
    TaskParams,
    TrainingColumns,
    with_replaced,
)
from launcher.tasks.metrics.class_weights import ClassWeights, balanced, completed
from launcher.tasks.metrics.labels import ClassNames

if TYPE_CHECKING:
    import numpy as np
    import torch


class LabelParams(SmoothedParams):
    """What their parts of the job file share."""

    label: str = "label"
    """Column that holds the label: an int or string."""
    labels: ClassNames = None
    """Class names in order; int labels index them, unless their file names its numbers itself (a `ClassLabel` of
    `datasets`): then these names count. null reads them from the training data."""
    class_weights: ClassWeights = None
    """Weight of each class in the training loss, as torch's CrossEntropyLoss has it: {class: weight}, 1 for those left
    out; `balanced` takes rows / (classes * rows of the class) of the training data. Evaluations are not weighted."""

    @model_validator(mode="after")
    def _one_class_each(self) -> "LabelParams":
        kind = getattr(self, "kind", "single-label")  # of tasks that have several
        for key in ("label_smoothing", "class_weights"):
            if kind != "single-label" and getattr(self, key):
                raise ValueError(f"{key} is for one class per row, and kind is {kind}; drop {key}")
        return self

    @property
    def ordered_weights(self) -> tuple[float, ...]:
        """The classes' weights in the order of their names; () before the names are known, or where there are none."""
        if not isinstance(self.class_weights, dict) or self.labels is None:
            return ()
        return tuple(self.class_weights.get(name, 1.0) for name in self.labels)


class Targets(Protocol):
    """What a label may be, and all that follows from it: `metrics.labels.Labels`, `metrics.tags.Tags`."""

    @property
    def metric_modes(self) -> Mapping[str, MetricMode]:
        """Whether more or less of each metric is better, the main metric first."""

    @property
    def prediction_schema(self) -> pa.Schema:
        """What `decode` gives."""

    def infer_params(
        self, pieces: Iterable[pa.Array], kind: pa.DataType, known: tuple[str, ...] | None
    ) -> tuple[str, ...] | None:
        """Class names of the training data's labels; None where there are none."""

    def find_invalid_target(self, pieces: Iterable[pa.Array], kind: pa.DataType) -> tuple[int, str] | None:
        """The first row whose label cannot be used, and why, where whole columns tell it at little cost."""

    def counts(self, pieces: Iterable[pa.Array], names: tuple[str, ...]) -> list[int]:
        """How often each of these classes occurs in the training data's column."""

    def sample_weights(self, labels: Sequence[Sequence[float]]) -> "np.ndarray":
        """float64 (n,), what each sample adds to the global batch's weight."""

    def plain(self) -> "Targets":
        """The same under plain cross entropy."""

    def config(self) -> dict[str, object]:
        """The model config's entries: number and names of the classes."""

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """(B,) loss of each sample."""

    def metrics(self, device: "torch.device") -> TaskMetrics:
        """Fresh metric states."""

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """B rows of what the logits say."""

    def answers(
        self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table
    ) -> list[tuple[str, str, tuple[Mark, ...]]]:
        """(truth, prediction, marks) of each row in words."""


class TargetTask(Task):
    """A task that is given by how it reads its inputs and by its `Targets`."""

    params: LabelParams
    targets: Targets

    def __init__(self, params: LabelParams, model: ModelSpec, seed: int, targets: Targets) -> None:
        self.params, self.model, self.seed, self.targets = params, model, seed, targets
        self.target_columns = (params.label,)
        self.column_kinds = {params.label: "number" if getattr(params, "kind", "") == "regression" else "class"}
        self.metric_modes, self.prediction_schema = targets.metric_modes, targets.prediction_schema

    def infer_params(self, data: TrainingColumns) -> TaskParams:
        """Class names, unless the job file gives them, and the classes' weights."""
        params, column = self.params, self.params.label
        if not params.labels:
            names = self.targets.infer_params(data.pieces(column), data.type_of(column), data.class_names(column))
            params = params.model_copy(update={"labels": names})
        if params.class_weights is None or params.labels is None:
            return params
        if params.class_weights == "balanced":
            weights = balanced(self.targets.counts(data.pieces(column), params.labels), params.labels)
        else:
            weights = completed(params.class_weights, params.labels)
        return params.model_copy(update={"class_weights": weights})

    def for_evaluation(self) -> Task:
        targets = self.targets.plain()
        return self if targets == self.targets else with_replaced(self, targets=targets)

    def find_invalid_target(self, pieces: Iterable[pa.Array], kind: pa.DataType) -> tuple[int, str] | None:
        return self.targets.find_invalid_target(pieces, kind)

    def head(self) -> dict[str, object]:
        return self.targets.config()

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        return self.targets.sample_losses(logits, labels)

    def metrics(self, device: "torch.device") -> TaskMetrics:
        return self.targets.metrics(device)

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        return self.targets.decode(logits, samples)

    def row_results(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[RowResult]:
        return [RowResult(*answer) for answer in self.targets.answers(logits, labels, samples)]
