"""What tasks whose truth is a column of labels share, whatever they read. Data workers and train workers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from launcher.metrics.labels import ClassNames
from launcher.records import Mark
from launcher.spec.model import ModelSpec
from launcher.tasks.base import MetricMode, Task, TaskMetrics, TaskParams, TrainingColumns, Verdict

if TYPE_CHECKING:
    import torch


class LabelParams(TaskParams):
    """What their parts of the job file share."""

    label: str = "label"
    """Column that holds the label: an int or string."""
    labels: ClassNames = None
    """Class names in order; int labels index them. null reads them from the training data."""


class Targets(Protocol):
    """What a label may be, and all that follows from it: `metrics.labels.Labels`, `metrics.tags.Tags`."""

    @property
    def metric_modes(self) -> Mapping[str, MetricMode]:
        """Whether more or less of each metric is better, the main metric first."""

    @property
    def prediction_schema(self) -> pa.Schema:
        """What `decode` gives."""

    def learn(self, column: pa.ChunkedArray, known: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Class names of the training data's labels; None where there are none."""

    def first_bad(self, column: pa.ChunkedArray) -> tuple[int, str] | None:
        """The first row whose label cannot be used, and why, where whole columns tell it at little cost."""

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


class LabelledTask(Task):
    """A task that is given by how it reads its inputs and by its `Targets`."""

    params: LabelParams
    targets: Targets

    def __init__(self, params: LabelParams, model: ModelSpec, seed: int, targets: Targets) -> None:
        self.params, self.model, self.seed, self.targets = params, model, seed, targets
        self.target_columns = (params.label,)
        self.metric_modes, self.prediction_schema = targets.metric_modes, targets.prediction_schema

    def learn(self, data: TrainingColumns) -> TaskParams:
        """Class names, unless the job file gives them."""
        if self.params.labels:
            return self.params
        column = self.params.label
        names = self.targets.learn(data.column(column), data.class_names(column))
        return self.params.model_copy(update={"labels": names})

    def first_bad(self, column: pa.ChunkedArray) -> tuple[int, str] | None:
        return self.targets.first_bad(column)

    def head(self) -> dict[str, object]:
        return self.targets.config()

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        return self.targets.sample_losses(logits, labels)

    def metrics(self, device: "torch.device") -> TaskMetrics:
        return self.targets.metrics(device)

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        return self.targets.decode(logits, samples)

    def verdicts(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[Verdict]:
        return [Verdict(*answer) for answer in self.targets.answers(logits, labels, samples)]
