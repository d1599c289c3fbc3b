"""The Task protocol: all the launcher knows about one kind of fine-tuning. Runs in data workers and train workers.

A task is one file beside this one. The loop, the stream, evaluation, export and the report see this protocol only;
read `text_classification.py` for a whole task and `train/loop.py` for who calls it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel

from launcher.records import ClassRow, ConfusionMatrix
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:  # data workers encode without paying for torch
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ReadColumn = Callable[[str], pa.ChunkedArray]
"""A whole column of the training data, by name."""


class TaskParams(BaseModel):
    """Base of a task's own part of the job file."""

    model_config = {"frozen": True, "extra": "forbid", "use_attribute_docstrings": True, "validate_default": True}


@dataclass(frozen=True)
class Encoded:
    """Rows made ready for the model.

    Args:
        samples: one row per usable input row, the columns `collate` takes.
        kept: positions of those rows in the input table.
        lengths: cost of each sample, for length grouping (tokens, for text).
        weights: what each sample adds to the global batch's weight (1, or its number of labelled tokens).
        problems: (position, reason) of each row that cannot be used.
    """

    samples: pa.Table
    kept: "np.ndarray"
    lengths: "np.ndarray"
    weights: "np.ndarray"
    problems: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples on one device.

    Args:
        inputs: keyword arguments of the model's forward, labels not among them.
        labels: (B, ...) what the losses compare with.
        mask: (B,) 1.0 for a real sample, 0.0 for a filler that keeps workers in lockstep.
    """

    inputs: "Mapping[str, torch.Tensor]"
    labels: "torch.Tensor"
    mask: "torch.Tensor"

    def to(self, device: "torch.device") -> "Batch":
        """The same batch on another device; copies from pinned memory do not block."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


class TaskMetrics(Protocol):
    """Mergeable metric states of one pass over a split; fillers are never passed in."""

    def update(self, logits: "torch.Tensor", labels: "torch.Tensor") -> None:
        """Count B rows: logits (B, ...), labels (B, ...)."""

    def compute(self) -> dict[str, float]:
        """Merge the states of all workers (a collective) and return each metric, the main one first."""

    def baseline(self) -> dict[str, float]:
        """What a model would score that knows only the labels' frequencies; call after `compute`."""

    def confusion(self) -> ConfusionMatrix | None:
        """Counts by true and predicted class; call after `compute`."""

    def classes(self) -> tuple[ClassRow, ...]:
        """The per-class table; call after `compute`."""


class Task(Protocol):
    """One kind of fine-tuning. Built anew from its parameters in every process that needs it."""

    Params: ClassVar[type[TaskParams]]

    def __init__(self, params: TaskParams, model: ModelSpec, seed: int) -> None: ...

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Columns the model sees."""

    @property
    def target_columns(self) -> tuple[str, ...]:
        """Columns it learns to predict."""

    @property
    def main_metric(self) -> str:
        """The metric that decides which checkpoint is best unless the job file names one."""

    def metric_mode(self, metric: str) -> Literal["max", "min"] | None:
        """Whether more of a metric is better; None for a metric the task does not have."""

    def learn(self, read_column: ReadColumn) -> TaskParams:
        """The parameters, with what only the training data tells (class names) filled in."""

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """What turns inputs into tensors, exported with the model."""

    def encode(self, rows: pa.Table, with_targets: bool) -> Encoded:
        """Rows to samples; pure. In a data worker."""

    def collate(self, samples: pa.Table) -> Batch:
        """Samples to one padded micro-batch, `mask` all 1. In a train worker."""

    def check_model(self) -> dict[str, object]:
        """Facts about the model that need no weights (type, parameters, classes); raises ModelError."""

    def build_model(self) -> "PreTrainedModel":
        """The pretrained model with the task's head."""

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """(B,) loss of each sample, summed within the sample, never averaged."""

    def metrics(self, device: "torch.device") -> TaskMetrics:
        """Fresh metric states."""

    def predict(self, logits: "torch.Tensor") -> pa.Table:
        """B rows: `prediction` and the scores behind it."""

    def target_text(self, label: object) -> str:
        """A label, as it came out of `collate`, in words for the report."""

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Synthetic rows a model can learn, for the contract test."""
