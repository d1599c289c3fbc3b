"""The Task protocol: all the launcher knows about one kind of fine-tuning. Runs in data workers and train workers.

A task is one file beside this one. The loop, the stream, evaluation, export and the report see this protocol only;
read `text_classification.py` for a whole task and `train/loop.py` for who calls it. A task that derives from `Task`
inherits the answers most tasks give.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, Field, model_validator

from launcher.errors import ModelError
from launcher.formatting import format_percent
from launcher.models.cells import CellSource
from launcher.models.pretrained import load_config, load_model, usable_positions, without_weights
from launcher.models.weights import check_layers, check_weights
from launcher.rundir.records import ClassRow, ConfusionMatrix, Mark
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:  # data workers encode without paying for torch
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from launcher.models.pretrained import Processor


MetricMode = Literal["max", "min"]
ColumnKind = Literal["text", "class", "number"]
"""What a task reads a column as: of a file without types (CSV), a text keeps every character, a class is an integer
only where that loses nothing, and a number is what it looks like."""


class TaskParams(BaseModel):
    """Base of a task's own part of the job file."""

    one_of: ClassVar[tuple[str, ...]] = ()
    """Keys that exclude each other."""

    model_config = {
        "frozen": True,
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "validate_default": True,
        "allow_inf_nan": False,
    }

    @model_validator(mode="after")
    def _at_most_one(self) -> "TaskParams":
        given = [name for name in self.one_of if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both given, but a row is one of them; keep one")
        return self


class SmoothedParams(TaskParams):
    """Of tasks that learn classes by cross entropy."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is spread over all classes while training (Szegedy et al. 2016, arXiv:1512.00567);
    validation and test losses stay plain, so that runs with different shares can be compared."""


class TrainingColumns(Protocol):
    """What a task may look at before training begins: whole columns of the training data."""

    @property
    def names(self) -> Sequence[str]:
        """All columns of the training data."""

    def type_of(self, name: str) -> pa.DataType:
        """Of a column."""

    def pieces(self, name: str) -> Iterator[pa.Array]:
        """The values of a column, a part at a time."""

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of a column's integer classes, where the files tell them (a `ClassLabel` of `datasets`)."""


@dataclass(frozen=True)
class Encoded:
    """Rows made ready for the model.

    Args:
        samples: one row per usable input row, the columns `collate` takes.
        kept: positions of those rows in the input table.
        lengths: cost of each sample, for length grouping and packing (tokens, for text).
        weights: what each sample adds to the global batch's weight (1, or its number of labelled tokens).
        problems: (position, reason) of each row that cannot be used.
    """

    samples: pa.Table
    valid_rows: "np.ndarray"
    lengths: "np.ndarray"
    weights: "np.ndarray"
    problems: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class LostLabels:
    """Labels that can be read but not kept: rows with them are used, and these are neither learned nor scored.

    Args:
        labels: Number of labels of such a kind in the rows looked at.
        lost: (position, reason) of each that is lost.
        kind: Plural of what they are.
        remedy: What the user can do.
    """

    labels: int = 0
    lost: tuple[tuple[int, str], ...] = ()
    kind: str = "labels"
    remedy: str = ""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B sequences on one device: a sample each, or several where samples are packed.

    Args:
        inputs: keyword arguments of the model's forward, labels not among them; tensors (B, ...), or flags.
        labels: (B, ...) what the losses compare with.
        mask: (B,) 1.0 for a real sample, 0.0 for a filler that keeps workers in lockstep.
    """

    inputs: "Mapping[str, torch.Tensor | bool]"
    labels: "torch.Tensor"
    mask: "torch.Tensor"

    def to(self, device: "torch.device") -> "Batch":
        """The same batch on another device; copies from pinned memory do not block."""
        inputs = {n: v if isinstance(v, bool) else v.to(device, non_blocking=True) for n, v in self.inputs.items()}
        return Batch(inputs, self.labels.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


@dataclass(frozen=True)
class RowResult:
    """What was right and what the model said about one row, for people to read.

    Args:
        target: the truth in words.
        prediction: the model's answer in words.
        marks: places in the row's first shown text that were found, missed or wrong.
    """

    target: str
    prediction: str
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class RowInputs:
    """A row's inputs for people to look at.

    Args:
        texts: by column; marks point into the first.
        image: a picture file's content (PNG, JPEG, WebP), or None.
    """

    texts: dict[str, str]
    image: bytes | None = None


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

    input_columns: tuple[str, ...]
    """Columns the model sees."""
    target_columns: tuple[str, ...]
    """Columns it learns to predict."""
    column_kinds: Mapping[str, ColumnKind] = MappingProxyType({})
    """What these columns hold; of those that are not named here, inputs are texts, and so are the targets of a task
    that `writes`; those of other tasks are numbers."""
    metric_modes: Mapping[str, MetricMode]
    """Whether more (`max`) or less (`min`) is better, for each metric beside `loss`; the first decides which
    checkpoint is best unless the job file names one."""
    prediction_schema: pa.Schema
    """Columns that `predict` gives: `prediction` in the task's natural form, and the scores behind it."""
    pack_length: int | None = None
    """Length that samples packed into one training sequence may have together; None never packs. A task that may
    pack has the parameter `packing`, which is turned off for models in which packed samples would see each other."""
    augments: bool = True
    """Whether `encode` may look at its `noise`; samples of a task that never does are encoded once and kept."""
    generates: ClassVar[bool] = False
    """Whether it generates, so that its predictions for a few rows belong into the report at every evaluation."""
    auto_model: ClassVar[str]
    """Name of the Auto class of transformers that the task fine-tunes."""
    from_scratch: ClassVar[Literal["encoder", "decoder", "image"]] = "encoder"
    """What `model.from_config` needs made beside the weights: a tokenizer of this kind, or an image processor."""

    params: TaskParams
    model: ModelSpec
    seed: int
    """Of the layers that are new."""

    places: CellSource = CellSource()
    """Where the files may lie that cells of the data name; `build_task` knows."""

    def __init__(self, params: TaskParams, model: ModelSpec, seed: int) -> None: ...

    def columns(self, with_targets: bool = True) -> dict[str, ColumnKind]:
        """Return what each column that is read holds.

        Args:
            with_targets: Whether the labels are wanted.
        """
        targets = self.target_columns if with_targets else ()
        kinds: dict[str, ColumnKind] = dict.fromkeys(targets, "text" if self.generates else "number")
        kinds |= dict.fromkeys(self.input_columns, "text")
        return kinds | {name: kind for name, kind in self.column_kinds.items() if name in kinds}

    def infer_params(self, data: TrainingColumns) -> TaskParams:
        """The parameters, with what only the training data tells (class names) filled in."""
        return self.params

    def find_invalid_target(self, pieces: Iterable[pa.Array], kind: pa.DataType) -> tuple[int, str] | None:
        """The first row of a target column, in pieces of a type, that is bad, and why; None where reading tells."""
        return None

    def processor(self) -> "Processor":
        """What turns inputs into tensors (tokenizer, image processor), exported with the model."""

    def encode(self, rows: pa.Table, with_targets: bool, noise: "np.ndarray | None" = None) -> Encoded:
        """Rows to samples; pure. In a data worker.

        Args:
            rows: input columns, and target columns if `with_targets`.
            with_targets: whether the labels are wanted.
            noise: int64 (n,), a seed for each row's augmentation, the same on any cluster; None does not augment.
        """

    def lost_labels(self, rows: pa.Table) -> LostLabels:
        """Return what `encode` would leave out of the labels of rows."""
        return LostLabels()

    def collate(self, samples: pa.Table) -> Batch:
        """Samples to one padded micro-batch, `mask` all 1. In a train worker.

        Packed samples (`pack_length`) arrive joined end to end, their lengths in the column `segments`.
        """

    def head(self) -> dict[str, object]:
        """What the task sets in the model's config: number and names of the classes."""
        return {}

    def check_model(self) -> dict[str, object]:
        """Return facts about the model that need no weights (type, parameters, classes); raises ModelError.

        `packs` is False where the task packs and the model would let packed samples see each other.
        """
        from launcher.models.batch_norm import batch_norms  # which imports torch
        from launcher.models.layers import freeze, frozen_modules
        from launcher.models.packing import keeps_samples_apart

        config = load_config(self.model, **self.head())
        model = without_weights(self.auto_model, self.model, config)
        check_weights(self.model, model)
        wanted, has = getattr(self.params, "max_length", 0), usable_positions(model)
        if has is not None and wanted > has:
            raise ModelError(f"task.max_length: {wanted} is more than the model's {has} positions; lower it")
        if self.model.lora is not None:
            check_layers(self.model.lora.target_modules or (), model)
        self._check_processor(model)
        classes = {"classes": config.num_labels} if self.head() else {}
        facts: dict[str, object] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if self.model.freeze is not None:
            freeze(model, self.model.freeze)
            facts["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            facts["frozen"] = " ".join(frozen_modules(model))
        if self.pack_length is not None and not keeps_samples_apart(self.auto_model, config):
            facts["packs"] = False
        return {"model_type": config.model_type, **facts, "batch_norms": len(batch_norms(model)), **classes}

    def _check_processor(self, model: "PreTrainedModel") -> None:
        """A tokenizer's words must all have an embedding, and so must its padding."""
        processor = self.processor()
        highest = max(getattr(processor, "vocab_size", 0) - 1, getattr(processor, "pad_token_id", None) or 0)
        embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None) if highest > 0 else None
        if isinstance(embeddings, int) and highest >= embeddings:
            raise ModelError(
                f"model.name: the tokenizer of {self.model.name} knows {highest + 1} tokens, but its model only "
                f"{embeddings}; put the files of one model together"
            )

    def build_model(self) -> "PreTrainedModel":
        """The model with the task's head: `forward(**inputs).logits` is (B, ...)."""
        model = load_model(self.auto_model, self.model, load_config(self.model, **self.head()), self.seed)
        self.add_adapters(model)
        return model

    def add_adapters(self, model: "PreTrainedModel") -> None:
        """Change a model in place before it runs, on shapes alone where memory is estimated."""
        from launcher.models.packing import mask_packed_samples

        if self.pack_length is not None:
            mask_packed_samples(model)

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """(B,) loss of each sequence, summed within it, never averaged."""

    def for_evaluation(self) -> "Task":
        """The task as evaluations see it: with another loss and other weights where those of training are shaped."""
        return self

    def metrics(self, device: "torch.device") -> TaskMetrics:
        """Fresh metric states."""

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """B rows of what the logits say, as `prediction_schema` has it."""

    def row_results(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[RowResult]:
        """The truth and the model's answer for each of B rows, in words for the report."""

    def predict(self, model: "PreTrainedModel", samples: pa.Table) -> pa.Table:
        """Predictions for samples encoded without targets: one forward pass, unless the task generates."""
        batch = self.collate(samples).to(model.device)
        return self.decode(model(**batch.inputs).logits, samples)

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        """Return what a person should know of the training data before spending hours, told from some of its rows.

        Args:
            rows: Input and target columns of rows that are spread over the training data; bad ones may be among them.
            unread: Names of its other columns.
        """
        return ()

    def generation_prompts(self, rows: pa.Table) -> pa.Table:
        """What a task that `writes` predicts for the report, made of a few rows' input columns."""
        return rows

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        """The input columns of one row, to look at."""
        return RowInputs({name: str(row[name]) for name in self.input_columns})

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Synthetic rows a model can learn, for the contract test."""


def truncation_note(lengths: Sequence[int], max_length: int) -> tuple[str, ...]:
    """Return the remark on what `task.max_length` cuts off; none where it cuts nothing.

    Args:
        lengths: Tokens of each row that was looked at, before any is cut off.
        max_length: Tokens that are kept of each row.
    """
    longer = [length for length in lengths if length > max_length]
    if not longer:
        return ()
    share = sum(length - max_length for length in longer) / sum(lengths)
    return (
        f"task.max_length: about {format_percent(share)} of the tokens are cut off, as {len(longer)} of the "
        f"{len(lengths)} rows looked at have more than {max_length} (up to {max(longer)}); raise it, or cut such rows "
        "into several",
    )


def with_replaced(task: Task, **attributes: object) -> Task:
    """A copy of a task, with what it has loaded, that differs in some attributes."""
    other = copy.copy(task)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other
