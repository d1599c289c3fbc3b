"""Causal language modelling and instruction tuning (GPT, Llama): the next token of texts or of answers.

Runs wherever a task runs. Read `conversations.py` next for its parameters, `models/chat.py` for how rows become tokens.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from launcher.models.chat import IGNORED, Writer, load_chat_tokenizer
from launcher.models.conversation import to_display_text
from launcher.models.generate import generate
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task, with_replaced
from launcher.tasks.conversations import CausalParams, check_lengths, learning_notes
from launcher.tasks.padding import list_column, pad_lists, positions
from launcher.tasks.params import ColumnKind, TrainingColumns
from launcher.tasks.results import RowInputs, RowResult
from launcher.tasks.samples import Batch, Encoded, Outputs, read_each

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from launcher.tasks.metrics.language import LanguageMetrics


class CausalLM(Task):
    """Fine-tuning of `AutoModelForCausalLM`. The weight of a sample is its number of learned tokens."""

    Params = CausalParams
    auto_model = "AutoModelForCausalLM"
    augments = False
    from_scratch = "decoder"
    generates = True

    def __init__(self, params: CausalParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns = (params.main_column, *params.context_columns)
        self.target_columns = (params.response,) if params.prompt and not params.messages else ()
        self.metric_modes = {"perplexity": "min", "token_accuracy": "max"}
        self.prediction_schema = pa.schema({"prediction": pa.string()})
        self.pack_length, self.smoothing = (params.max_length if params.packing else None), params.label_smoothing

    def columns(self, with_targets: bool = True) -> dict[str, ColumnKind]:
        return {**dict.fromkeys(self.params.optional_columns, "text"), **super().columns(with_targets)}

    def infer_params(self, data: TrainingColumns) -> CausalParams:
        return self.params.with_columns(data)

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_chat_tokenizer(self.model, self.params.chat_template, required=self.params.has_turns)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    @cached_property
    def _writer(self) -> Writer:
        return self.params.writer(self._tokenizer)

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        size = self.params.max_length

        def read(row: Mapping[str, object]) -> tuple[list[int], list[int]]:
            tokens, targets = self._writer.tokens(row, with_targets)
            check_lengths(tokens, targets if with_targets else None, size, self.input_columns[0])
            # Labels are shifted, so the last one kept may be the first token that was cut off. It is learned all the
            # same.
            return tokens[:size], targets[: len(tokens[:size])]

        pairs, valid_rows, problems = read_each(rows.to_pylist(), read)
        ids, labels = [tokens for tokens, _ in pairs], [targets for _, targets in pairs]
        samples = pa.table({"input_ids": list_column(ids), "labels": list_column(labels)})
        weights = np.array([sum(label != IGNORED for label in row) for row in labels], np.float64)
        lengths = np.array([len(row) for row in ids], np.int64)
        return Encoded(samples, np.array(valid_rows, np.int64), lengths, weights, problems)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad input_ids, position_ids and labels to (B, T); the label at t is the token at t + 1 (`Writer.tokens`)."""
        import torch

        ids = torch.from_numpy(pad_lists(samples.column("input_ids"), self._tokenizer.pad_token_id or 0))
        labels = torch.from_numpy(pad_lists(samples.column("labels"), IGNORED))
        # There is no attention mask: `mask_packed_samples` isolates samples where positions restart, and causal
        # attention never reaches the padding at the end.
        position_ids = torch.from_numpy(positions(samples))
        # Labels stay out of the inputs: transformers would shift them once more and average the loss per micro-batch.
        # Without `use_cache: False` a forward pass also returns the keys and values of all layers.
        inputs: dict[str, torch.Tensor | bool] = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
        return Batch(inputs, labels, torch.ones(len(samples)))

    def forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        from launcher.tasks.metrics.chunked_head import token_outputs

        return token_outputs(self.auto_model, model, batch.inputs, batch.labels, self.smoothing)

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        return outputs["losses"].sum(-1)

    def for_evaluation(self) -> Task:
        return with_replaced(self, smoothing=0.0) if self.smoothing else self

    def metrics(self, device: "torch.device") -> "LanguageMetrics":
        from launcher.tasks.metrics.language import LanguageMetrics

        return LanguageMetrics(device)

    def update_metrics(self, metrics: "LanguageMetrics", outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        metrics.update(outputs["losses"], outputs["predicted"], batch.labels)

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        """Return the most likely token at each learned position, given the true tokens before it (teacher forcing)."""
        rows = zip(outputs["predicted"].tolist(), samples.column("labels").to_pylist(), strict=True)
        # Not strict: predictions are padded to the longest row of the batch.
        ids = [[token for token, label in zip(row, labels, strict=False) if label != IGNORED] for row, labels in rows]
        return pa.table({"prediction": self._tokenizer.batch_decode(ids)}, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        truth = self._tokenizer.batch_decode([row[row != IGNORED] for row in batch.labels[chosen].cpu()])
        predicted = self.decode({"predicted": outputs["predicted"][chosen]}, samples.take(pa.array(chosen)))
        return list(map(RowResult, truth, predicted.column("prediction").to_pylist()))

    def predict(self, model: "PreTrainedModel", samples: pa.Table) -> pa.Table:
        """Return the text that the model generates after each prompt."""
        # The prompts of all rows in one batch: it costs as many forward passes as its longest answer has tokens.
        texts = generate(model, self._tokenizer, samples.column("input_ids").to_pylist(), self.params.max_new_tokens)
        return pa.table({"prediction": texts}, self.prediction_schema)

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        return learning_notes(self._writer, rows, self.params.max_length) + self.params.unread(unread)

    def generation_prompts(self, rows: pa.Table) -> pa.Table:
        """Return prompts as they are; of texts the first words, for the model to continue."""
        if self.params.has_turns:
            return rows
        name = self.input_columns[0]
        texts = rows.column(name).to_pylist()
        return pa.table({name: [" ".join(str(text).split()[:4]) if text else text for text in texts]})

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        return RowInputs({name: to_display_text(row[name]) for name in self.input_columns})

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return texts that count: each word of w0..w199 is followed by the next one."""
        rng = np.random.default_rng(seed)
        texts = [[(first + i) % 200 for i in range(n)] for first, n in rng.integers((0, 3), (200, 24), (rows, 2))]
        return pa.table({self.input_columns[0]: [" ".join(f"w{w}" for w in text) for text in texts]})


TASK = CausalLM
