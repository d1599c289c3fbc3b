"""The task protocol: everything the launcher knows about one kind of fine-tuning.

A task is one file of this folder (`type: my-task` is `my_task.py`), or a class of your own that the job file names by
its import path (`type: my_package.module:MyTask`). Every process that needs it builds it from its parameters, so it
must not hold state that cannot be rebuilt:

| where | what is called |
| --- | --- |
| client and head | `infer_params`, `find_invalid_target`, `lost_labels`, `remarks`, `check_model` |
| data worker (no model, no torch) | `processor`, `encode` |
| train worker | `build_model`, `collate`, `forward`, `sample_losses` (or `coupled_losses`); in evaluations |
| | `for_evaluation`, `evaluation_forward`, `metrics`, `update_metrics`, `row_results`, `display_inputs`, |
| | `generation_prompts`, `predict`; for the export `processor` |
| predict worker | `encode` without targets, then `predict` |

A task has to define: `Params`, `auto_model`, `__init__` (which sets the attributes without a default), `processor`,
`encode`, `collate`, `sample_losses`, `metrics`, `decode`, `row_results` and `example_rows`. Everything else has the
default that most tasks need. Tasks whose truth is a column of labels derive from `targets.TargetTask` and define less.

A row of the data is the unit of order, weight and evaluation, and has one loss; it may consist of several sequences
(windows of a document, a chosen and a rejected answer) and of several inputs. All of them travel in one micro-batch.

Read `text_classification.py` next for a whole task and `train/loop.py` for the loop that calls it.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import pyarrow as pa

from launcher.errors import ModelError
from launcher.formatting import format_percent
from launcher.models.adapters import find_targets
from launcher.models.cells import CellSource
from launcher.models.pretrained import (
    add_embeddings,
    check_trained_rows,
    load_config,
    load_model,
    usable_positions,
    without_weights,
)
from launcher.models.weights import check_weights
from launcher.spec.model import ModelSpec
from launcher.tasks.params import ColumnKind, TaskParams, TrainingColumns
from launcher.tasks.results import MetricMode, RowInputs, RowResult, TaskMetrics
from launcher.tasks.samples import Batch, Encoded, LostLabels, Outputs

# Data workers encode without the cost of importing torch.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from launcher.models.pretrained import Processor


class Task(Protocol):
    """One kind of fine-tuning: its columns, model, loss and metrics."""

    Params: ClassVar[type[TaskParams]]
    """Model of the task's keys in the job file. Its defaults must be enough to build the task."""

    input_columns: tuple[str, ...]
    """Columns that the model reads."""
    target_columns: tuple[str, ...]
    """Columns that it learns to predict. `predict` does not read them."""
    column_kinds: Mapping[str, ColumnKind] = MappingProxyType({})
    """Kinds of these columns where they differ from the default: text for inputs and for the targets of a task that
    `generates`, number for other targets."""
    metric_modes: Mapping[str, MetricMode]
    """Direction of each metric other than `loss`: `max` if more is better. The first selects the best checkpoint,
    unless the job file names another."""
    prediction_schema: pa.Schema
    """Columns that `decode` and `predict` return: `prediction` (or `embedding`) in the task's natural form, scores."""
    pack_length: int | None = None
    """Length in tokens up to which samples are packed into one training sequence; None never packs. A task that packs
    has `params.PackedParams`: `packing` is switched off for models whose packed samples would attend to each other."""
    augments: bool = True
    """Whether `encode` may use `noise`. Samples of a task that never does are encoded once and cached."""
    generates: ClassVar[bool] = False
    """Whether the model generates text, so that every evaluation adds some generated samples to the report."""
    couples: bool = False
    """Whether the loss of a row depends on the other rows of its global batch (in-batch negatives). `forward` then
    returns what `coupled_losses` compares, and the loop computes it on the whole global batch in two passes."""
    normalizers: tuple[str, ...] = ()
    """Numeric columns of `Encoded.samples` that are summed over the global batch, for losses with terms that are
    divided by another number than the weight; see `Batch.totals`."""
    partner_columns: tuple[str, ...] = ()
    """Columns of `Encoded.samples` of which each training or evaluation sample also gets those of another row of its
    global batch, as `partner_<name>`: mismatched pairs that do not depend on how the batch is cut."""
    length_keys: ClassVar[tuple[str, ...]] = ("max_length",)
    """Parameters in tokens that may not exceed the positions of the model."""
    reference_model: ModelSpec | None = None
    """Model section of a frozen model that losses compare with; None for none. Train workers load it as `reference`,
    in eval mode, sharded under ZeRO-3; checkpoints and exports do not hold it."""
    reference: "torch.nn.Module | None" = None
    """Model of `reference_model`, once the engine has set it."""
    auto_model: ClassVar[str]
    """Name of the transformers Auto class that is fine-tuned, such as `AutoModelForSequenceClassification`."""
    from_scratch: ClassVar[Literal["encoder", "decoder", "image"]] = "encoder"
    """Processor to create under `model.from_config`: a tokenizer for an encoder or decoder, or an image processor."""

    params: TaskParams
    model: ModelSpec
    seed: int
    """Seed of newly initialised layers."""

    cell_source: CellSource = CellSource()
    """Directories from which file names in cells may be read; empty reads none. `build_task` sets it."""

    def __init__(self, params: TaskParams, model: ModelSpec, seed: int) -> None:
        """Store the arguments and set the attributes without a default. Must be cheap: load nothing here."""

    def columns(self, with_targets: bool = True) -> dict[str, ColumnKind]:
        """Return the kind of each column that is read.

        Args:
            with_targets: True to include the target columns.
        """
        targets = self.target_columns if with_targets else ()
        kinds: dict[str, ColumnKind] = dict.fromkeys(targets, "text" if self.generates else "number")
        # Inputs override targets: a column that is both is text, unless `column_kinds` says otherwise.
        kinds |= dict.fromkeys(self.input_columns, "text")
        return kinds | {name: kind for name, kind in self.column_kinds.items() if name in kinds}

    def prediction_inputs(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the columns that `predict` reads of data with these columns. The default is `input_columns`."""
        return self.input_columns

    def infer_params(self, data: TrainingColumns) -> TaskParams:
        """Return the parameters, completed by what only the training data knows (class names, class weights).

        Called once on the head; its result is stored with the run. Must return its own result unchanged when called
        again. The default infers nothing.
        """
        return self.params

    def find_invalid_target(self, pieces: Iterable[pa.Array], arrow_type: pa.DataType) -> tuple[int, str] | None:
        """Find the first invalid value of a target column without encoding the rows.

        Lets `check` refuse a bad label in the last of a million rows within seconds. The default finds none, which is
        always allowed: `encode` checks every row again.

        Args:
            pieces: Values of the whole column, in chunks.
            arrow_type: Type of the column.

        Returns:
            Row number and reason, or None.
        """
        return None

    def processor(self) -> "Processor":
        """Return the tokenizer or image processor, loaded once per process; the export saves it with the model."""

    def encode(self, rows: pa.Table, with_targets: bool, noise: "np.ndarray | None" = None) -> Encoded:
        """Turn n rows into samples. Runs in data workers.

        Must be pure: a sample depends on its row, the parameters and its noise only, never on the other rows. The
        launcher cuts the data into tables as it likes, caches samples and encodes them again after a failure.

        Args:
            rows: Table with `input_columns`, and `target_columns` if `with_targets`.
            with_targets: True to encode labels; False for `predict`, which does not read `target_columns`.
            noise: Augmentation seed of each row, int64 (n,), a function of the job's seed, epoch and row; None to not
                augment.
        """

    def lost_labels(self, rows: pa.Table) -> LostLabels:
        """Return the labels of some rows that `encode` drops without refusing the row. The default drops none."""
        return LostLabels()

    def collate(self, samples: pa.Table) -> Batch:
        """Pad B samples to one micro-batch, with `mask` all 1. Runs in train and predict workers.

        Packed samples (`pack_length`) arrive concatenated to one row, with their lengths in the column `segments` and
        without the columns that are no lists.

        Args:
            samples: Rows of `Encoded.samples`.
        """

    def head(self) -> dict[str, object]:
        """Return the entries that the task sets in the model's config (`num_labels`, `id2label`, ...)."""
        return {}

    def check_model(self) -> dict[str, object]:
        """Check that the model can do this task, without loading its weights.

        Returns:
            Facts for the plan: `model_type`, `parameters`, `find_batch_norms`, and where they apply `classes`,
            `trained`, `frozen`. `packs` is False if the task packs and the model would let packed samples attend to
            each other.

        Raises:
            ModelError: The model, its tokenizer or the job's settings of it do not fit the task.
        """
        from launcher.models.batch_norm import find_batch_norms  # imports torch
        from launcher.models.layers import freeze, frozen_modules
        from launcher.models.packing import keeps_samples_apart

        config = load_config(self.model, **self.head())
        model = without_weights(self.auto_model, self.model, config)
        check_weights(self.model, model)
        positions = usable_positions(model)
        for key in self.length_keys:
            length = getattr(self.params, key, None) or 0
            if positions is not None and length > positions:
                raise ModelError(f"task.{key}: {length} is more than the model's {positions} positions; lower it")
        add_embeddings(model, self.model, self.seed)
        if self.model.lora is not None:
            find_targets(self.model.lora, model)
        self._check_vocabulary(model)
        # transformers gives every configuration 2 labels, so the number means something only where the task sets it.
        classes = {"classes": config.num_labels} if "num_labels" in self.head() else {}
        facts: dict[str, object] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if self.model.freeze is not None:
            freeze(model, self.model.freeze)
            check_trained_rows(model, self.model)
            facts["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            facts["frozen"] = " ".join(frozen_modules(model))
        if self.pack_length is not None and not keeps_samples_apart(self.auto_model, config):
            facts["packs"] = False
        return {"model_type": config.model_type, **facts, "batch_norms": len(find_batch_norms(model)), **classes}

    def _check_vocabulary(self, model: "PreTrainedModel") -> None:
        """Refuse a tokenizer with a token, or a padding token, that has no embedding (an index error on a GPU)."""
        processor = self.processor()
        # `vocab_size` does not count added tokens (transformers 5.23), and the padding token may be one of them. More
        # embeddings than tokens are usual and allowed: many models round their number up.
        highest = max(getattr(processor, "vocab_size", 0) - 1, getattr(processor, "pad_token_id", None) or 0)
        embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None) if highest > 0 else None
        if isinstance(embeddings, int) and highest >= embeddings:
            raise ModelError(
                f"model.name: the tokenizer of {self.model.name} knows {highest + 1} tokens, but its model only "
                f"{embeddings}; put the files of one model together"
            )

    def build_model(self) -> "PreTrainedModel":
        """Load the model in fp32 with the task's head."""
        model = load_model(self.auto_model, self.model, load_config(self.model, **self.head()), self.seed)
        self.add_adapters(model)
        return model

    def build_reference(self) -> "PreTrainedModel":
        """Load the model of `reference_model` in fp32, frozen and in eval mode.

        Raises:
            ModelError: It cannot be loaded.
        """
        assert self.reference_model is not None
        config = load_config(self.reference_model, **self.head())
        model = load_model(self.auto_model, self.reference_model, config, self.seed)
        model.eval().requires_grad_(False)
        return model

    def exported_params(self) -> TaskParams:
        """Return the parameters for evaluations of the exported model, which `model` names then."""
        return self.params

    def add_adapters(self, model: "PreTrainedModel") -> None:
        """Modify the model in place before its first forward pass; also called on a meta model to measure memory.

        The default isolates packed samples from each other. LoRA is added elsewhere (`models/adapters.py`).
        """
        from launcher.models.packing import mask_packed_samples

        if self.pack_length is not None:
            mask_packed_samples(model, self.auto_model)

    def forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Run the model on a micro-batch. Collective under ZeRO-3, which gathers weights.

        Args:
            model: Model of `build_model`, wrapped in adapters and DeepSpeed's engine. Call it as
                often for each micro-batch.
            batch: Micro-batch on the model's device.
        """
        outputs: Outputs = model(**batch.inputs)
        return outputs

    def evaluation_forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Run the model on a micro-batch of an evaluation, in eval mode and without gradients.

        The default is `forward`. A task whose metrics compare generated text adds it here.
        """
        return self.forward(model, batch)

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        """Return the loss of each row, float32 (B,): summed over its tokens, never averaged.

        The loop divides the sum over a global batch by its weight, so that the curve does not depend on how the batch
        is split. Not called for a task that `couples` rows.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither sample_losses nor coupled_losses")

    def coupled_losses(self, outputs: Outputs) -> "torch.Tensor":
        """Return the loss of each row of a global batch, float32 (N,), where the task `couples` rows.

        Args:
            outputs: Outputs of `forward` for all N rows, float32 (N, ...) each, ordered by row.
        """
        raise NotImplementedError(f"{type(self).__name__} couples rows, but has no coupled_losses")

    def for_evaluation(self) -> "Task":
        """Return the task with the plain loss and weights of evaluations: no smoothing, no class weights."""
        return self

    def metrics(self, device: "torch.device") -> TaskMetrics:
        """Return new metric states on a device."""

    def update_metrics(self, metrics: Any, outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        """Add the rows of a batch to the metric states of this rank.

        Args:
            metrics: States of `metrics`; the default calls their `update(logits, labels)`.
            outputs: Outputs of `evaluation_forward`.
            batch: Micro-batch of B rows, no fillers.
            samples: Rows that were collated to the batch, with their row ids in the column `__row`.
        """
        metrics.update(outputs["logits"], batch.labels)

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        """Return the predictions of B rows, with the columns of `prediction_schema`.

        Args:
            outputs: Outputs of `forward`.
            samples: Rows that were collated to the batch.
        """

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        """Return truth and prediction of some rows of a batch in words, for the rows that the report displays.

        Args:
            outputs: Outputs of `evaluation_forward`.
            batch: Micro-batch of B rows.
            samples: Rows that were collated to the batch.
            chosen: Positions of the rows among the B.
        """

    def predict(self, model: "PreTrainedModel", samples: pa.Table) -> pa.Table:
        """Return predictions for samples that were encoded without targets, with the columns of `prediction_schema`.

        The default is one forward pass and `decode`; a task that `generates` replaces it.

        Args:
            model: Model in eval mode, on the device to use. Under ZeRO-3 all ranks call with the same samples.
            samples: B rows of `Encoded.samples`.
        """
        batch = self.collate(samples).to(model.device)
        return self.decode(self.forward(model, batch), samples)

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        """Return notes for the plan on what the user should know of the training data before paying for a run.

        Args:
            rows: Input and target columns of some rows spread over the training data, bad ones among them.
            unread: Names of the columns that the task does not read.
        """
        return ()

    def generation_prompts(self, rows: pa.Table) -> pa.Table:
        """Return the prompts that a task which `generates` completes for the report.

        Args:
            rows: Input columns of a few rows; the default returns them unchanged.
        """
        return rows

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        """Return the input columns of one row as the report displays them. The default displays texts."""
        return RowInputs({name: str(row[name]) for name in self.input_columns})

    def display_target(self, row: Mapping[str, object]) -> str | None:
        """Return the text that a task which `generates` should have generated; None, the default, for free text.

        Args:
            row: Input and target columns.
        """
        return None

    def document_text(self, row: Mapping[str, object], position: int) -> str:
        """Return a document of a row as the report displays it, for tasks that rank (`RankedDocument`)."""
        raise NotImplementedError(f"{type(self).__name__} ranks documents, but has no document_text")

    def export_files(self, config: "PretrainedConfig") -> Mapping[str, str]:
        """Return further text files of the exported model's directory, by relative path. The default has none.

        Args:
            config: Configuration of the exported model.
        """
        return {}

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return synthetic rows that a model can learn, a function of the seed; for `tests/tasks/test_contract.py`."""


def truncation_note(lengths: Sequence[int], max_length: int, key: str = "max_length") -> tuple[str, ...]:
    """Return a remark on what a limit of tokens cuts off; empty if it cuts nothing.

    Args:
        lengths: Tokens of each row in a sample of the data, before truncation.
        max_length: Tokens kept of each row.
        key: Parameter of the task that says so.
    """
    longer = [length for length in lengths if length > max_length]
    if not longer:
        return ()
    # A share of the tokens: of the rows, one token too many would count like a thousand.
    share = sum(length - max_length for length in longer) / sum(lengths)
    return (
        f"task.{key}: about {format_percent(share)} of the tokens are cut off, as {len(longer)} of the "
        f"{len(lengths)} rows looked at have more than {max_length} (up to {max(longer)}); raise it, or cut such rows "
        "into several",
    )


def with_replaced(task: Task, **attributes: object) -> Task:
    """Return a shallow copy of a task, with its loaded processor, that differs in some attributes."""
    # Trap: a `cached_property` lives in the `__dict__` that is copied. The loaded tokenizer is shared, as intended, but
    # whatever was computed from a replaced attribute would be stale.
    other = copy.copy(task)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other
