"""Base of the tasks whose truth is a column of labels, whatever their inputs are. Data workers and train workers.

`Targets` is what a label may be and everything that follows from it (loss, metrics, predictions). `TargetTask`
delegates to it, so that a task file only describes its inputs. Read `metrics/labels.py` and `metrics/tags.py` next.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
from pydantic import model_validator

from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task, with_replaced
from launcher.tasks.metrics.class_weights import ClassWeights, balanced_weights, complete_weights
from launcher.tasks.metrics.labels import ClassNames
from launcher.tasks.params import SmoothedParams, TaskParams, TrainingColumns
from launcher.tasks.results import MetricMode, RowResult, TaskMetrics
from launcher.tasks.samples import Batch, Outputs

if TYPE_CHECKING:
    import numpy as np
    import torch


class LabelParams(SmoothedParams):
    """Parameters of all tasks with a label column."""

    label: str = "label"
    """Column that holds the label: an int or string."""
    labels: ClassNames = None
    """Class names in order; int labels index them, unless their file names its numbers itself (a `ClassLabel` of
    `datasets`): then these names count. null reads them from the training data."""
    class_weights: ClassWeights = None
    """Weight of each class in the training loss, as torch's CrossEntropyLoss has it: {class: weight}, 1 for those not
    listed; `balanced` takes rows / (classes * rows of the class) of the training data. Evaluations are not weighted."""

    @model_validator(mode="after")
    def _check_single_label(self) -> "LabelParams":
        # Only some tasks have the parameter.
        kind = getattr(self, "kind", "single-label")
        for key in ("label_smoothing", "class_weights"):
            if kind != "single-label" and getattr(self, key):
                raise ValueError(f"{key} is for one class per row, and kind is {kind}; drop {key}")
        return self

    @property
    def ordered_weights(self) -> tuple[float, ...]:
        """Class weights in the order of the class names; () if there are none, or the names are not known yet."""
        if not isinstance(self.class_weights, dict) or self.labels is None:
            return ()
        return tuple(self.class_weights.get(name, 1.0) for name in self.labels)


class Targets(Protocol):
    """Meaning of a label column: `metrics.labels.Labels` for whole rows, `metrics.tags.Tags` for words."""

    @property
    def metric_modes(self) -> Mapping[str, MetricMode]:
        """Direction of each metric, the main metric first."""

    @property
    def prediction_schema(self) -> pa.Schema:
        """Columns that `decode` returns."""

    def infer_names(
        self, pieces: Iterable[pa.Array], arrow_type: pa.DataType, known: tuple[str, ...] | None
    ) -> tuple[str, ...] | None:
        """Return the class names of a column of training labels; None for targets without classes.

        Args:
            pieces: Values of the column, in chunks.
            arrow_type: Type of the column.
            known: Class names in the metadata of the files, or None.
        """

    def find_invalid_target(self, pieces: Iterable[pa.Array], arrow_type: pa.DataType) -> tuple[int, str] | None:
        """Return the first row whose label is invalid, and why, if the column alone shows it (`Task`)."""

    def counts(self, pieces: Iterable[pa.Array], names: tuple[str, ...]) -> list[int]:
        """Return how often each of these classes occurs in a column."""

    def sample_weights(self, labels: Sequence[Sequence[float]]) -> "np.ndarray":
        """Return the weight of each sample in its global batch, float64 (n,)."""

    def for_evaluation(self) -> "Targets":
        """Return the same targets under plain cross entropy: no class weights, no smoothing."""

    def config(self) -> dict[str, object]:
        """Return the entries of the model's config: number and names of the classes."""

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Return the loss of each sample, float32 (B,)."""

    def metrics(self, device: "torch.device") -> TaskMetrics:
        """Return new metric states on a device."""

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """Return the predictions of B rows, with the columns of `prediction_schema`."""

    def row_results(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[RowResult]:
        """Return truth and prediction of B rows in words."""


class TargetTask(Task):
    """Task that is defined by how it reads its inputs and by its `Targets`."""

    params: LabelParams
    targets: Targets

    def __init__(self, params: LabelParams, model: ModelSpec, seed: int, targets: Targets) -> None:
        self.params, self.model, self.seed, self.targets = params, model, seed, targets
        self.target_columns = (params.label,)
        self.column_kinds = {params.label: "number" if getattr(params, "kind", "") == "regression" else "class"}
        self.metric_modes = targets.metric_modes
        self.prediction_schema = targets.prediction_schema

    def infer_params(self, data: TrainingColumns) -> TaskParams:
        """Return the parameters with class names, unless the job file has them, and with a weight for each class."""
        params, column = self.params, self.params.label
        # Names before weights, which are listed by name.
        if not params.labels:
            names = self.targets.infer_names(data.pieces(column), data.type_of(column), data.class_names(column))
            params = params.model_copy(update={"labels": names})
        if params.class_weights is None or params.labels is None:
            return params
        if params.class_weights == "balanced":
            weights = balanced_weights(self.targets.counts(data.pieces(column), params.labels), params.labels)
        else:
            weights = complete_weights(params.class_weights, params.labels)
        return params.model_copy(update={"class_weights": weights})

    def for_evaluation(self) -> Task:
        targets = self.targets.for_evaluation()
        return self if targets == self.targets else with_replaced(self, targets=targets)

    def find_invalid_target(self, pieces: Iterable[pa.Array], arrow_type: pa.DataType) -> tuple[int, str] | None:
        return self.targets.find_invalid_target(pieces, arrow_type)

    def head(self) -> dict[str, object]:
        return self.targets.config()

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        return self.targets.sample_losses(outputs["logits"], batch.labels)

    def metrics(self, device: "torch.device") -> TaskMetrics:
        return self.targets.metrics(device)

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        return self.targets.decode(outputs["logits"], samples)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        logits, labels = outputs["logits"][chosen].cpu(), batch.labels[chosen].cpu()
        return self.targets.row_results(logits, labels, samples.take(pa.array(chosen)))
