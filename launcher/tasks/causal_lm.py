"""Causal language modelling and instruction tuning (GPT): the next token, of texts or of answers. All workers."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from launcher.models.chat import IGNORED, Writer, load_chat_tokenizer
from launcher.models.conversation import readable
from launcher.models.generate import generate
from launcher.spec.model import ModelSpec
from launcher.tasks.base import (
    Batch,
    ColumnKind,
    Encoded,
    RowInputs,
    RowResult,
    Task,
    TaskParams,
    TrainingColumns,
    with_replaced,
)
from launcher.tasks.conversations import BESIDE, CausalParams, remarks
from launcher.tasks.padding import list_column, pad_lists, positions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from launcher.tasks.base import TaskMetrics


class CausalLM(Task):
    """Fine-tunes `AutoModelForCausalLM`; the weight of a sample is its number of learned tokens."""

    Params = CausalParams
    auto_model = "AutoModelForCausalLM"
    augments = False
    from_scratch = "decoder"
    generates = True

    def __init__(self, params: CausalParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns = (params.messages or params.prompt or params.text or "text", *params.beside)
        self.target_columns = (params.response,) if params.prompt and not params.messages else ()
        self.metric_modes = {"perplexity": "min", "token_accuracy": "max"}
        self.prediction_schema = pa.schema({"prediction": pa.string()})
        self.pack_length, self.smoothing = params.max_length if params.packing else None, params.label_smoothing

    def columns(self, with_targets: bool = True) -> dict[str, ColumnKind]:
        return {**dict.fromkeys(self.params.looked_for, "text"), **super().columns(with_targets)}

    def infer_params(self, data: TrainingColumns) -> TaskParams:
        """Return the parameters with the columns that are read beside prompts and conversations."""
        return self.params.with_columns(data)

    @cached_property  # once per process
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        p = self.params
        return load_chat_tokenizer(self.model, p.chat_template, required=bool(p.messages or p.prompt))

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    @cached_property
    def _writer(self) -> Writer:
        p = self.params
        form: Literal["text", "chat", "answer"] = "chat" if p.messages else "answer" if p.prompt else "text"
        beside = {key: getattr(p, key) or "" for key in BESIDE}
        return Writer(self._tokenizer, form, self.input_columns[0], p.response, p.answer_roles, **beside)

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        kept, problems, ids, labels, size = [], [], [], [], self.params.max_length
        for i, row in enumerate(rows.to_pylist()):
            try:
                tokens, targets = self._writer.tokens(row, with_targets)
                if with_targets and max(targets[:size], default=IGNORED) == IGNORED:
                    what = f"nothing to learn among its first {size} of {len(tokens)} tokens (task.max_length)"
                    raise ValueError(f"{self.input_columns[0]} has {what}")
                ids.append(tokens[:size] if with_targets else tokens[-size:])  # the end of a prompt matters most
                labels.append(targets[: len(ids[-1])])
                kept.append(i)
            except ValueError as problem:
                problems.append((i, str(problem)))
        samples = pa.table({"input_ids": list_column(ids), "labels": list_column(labels)})
        weights = np.array([sum(label != IGNORED for label in row) for row in labels], np.float64)
        lengths = np.array([len(row) for row in ids], np.int64)
        return Encoded(samples, np.array(kept, np.int64), lengths, weights, tuple(problems))

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        return remarks(self._writer, rows.to_pylist(), self.params.max_length) + self.params.unread(unread)

    def collate(self, samples: pa.Table) -> Batch:
        """input_ids and position_ids (B, T), which begin anew with each packed sample; labels (B, T)."""
        import torch

        ids = torch.from_numpy(pad_lists(samples.column("input_ids"), self._tokenizer.pad_token_id or 0))
        labels = torch.from_numpy(pad_lists(samples.column("labels"), IGNORED))
        # Positions that begin anew tell `mask_packed_samples` where to cut the attention; padding behind needs no mask.
        places = torch.from_numpy(positions(samples))
        return Batch({"input_ids": ids, "position_ids": places, "use_cache": False}, labels, torch.ones(len(samples)))

    def sample_losses(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        from launcher.tasks.metrics.losses import token_losses

        return token_losses(logits, labels, smoothing=self.smoothing)

    def for_evaluation(self) -> Task:
        return with_replaced(self, smoothing=0.0) if self.smoothing else self

    def metrics(self, device: "torch.device") -> "TaskMetrics":
        from launcher.tasks.metrics.language import LanguageMetrics

        return LanguageMetrics(device)

    def decode(self, logits: "torch.Tensor", samples: pa.Table) -> pa.Table:
        """The most likely token wherever one is learned, given the true ones before it."""
        said = zip(logits.argmax(-1).tolist(), samples.column("labels").to_pylist(), strict=True)
        ids = [[token for token, label in zip(row, labels, strict=False) if label != IGNORED] for row, labels in said]
        return pa.table({"prediction": self._tokenizer.batch_decode(ids)}, self.prediction_schema)

    def row_results(self, logits: "torch.Tensor", labels: "torch.Tensor", samples: pa.Table) -> list[RowResult]:
        truth = self._tokenizer.batch_decode([row[row != IGNORED] for row in labels])
        return list(map(RowResult, truth, self.decode(logits, samples).column("prediction").to_pylist()))

    def generation_prompts(self, rows: pa.Table) -> pa.Table:
        """Prompts as they are; of texts the first words, for the model to go on with."""
        name = self.input_columns[0]
        is_text = not (self.params.messages or self.params.prompt)
        return pa.table({name: [_opening(cell) for cell in rows.column(name).to_pylist()]}) if is_text else rows

    def predict(self, model: "PreTrainedModel", samples: pa.Table) -> pa.Table:
        """What the model writes behind each prompt."""
        texts = generate(model, self._tokenizer, samples.column("input_ids").to_pylist(), self.params.max_new_tokens)
        return pa.table({"prediction": texts}, self.prediction_schema)

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        return RowInputs({name: readable(row[name]) for name in self.input_columns})

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Texts that count: each word is the one after the last, w0..w199."""
        rng = np.random.default_rng(seed)
        texts = [[(first + i) % 200 for i in range(n)] for first, n in rng.integers((0, 3), (200, 24), (rows, 2))]
        return pa.table({self.input_columns[0]: [" ".join(f"w{w}" for w in text) for text in texts]})


def _opening(text: object) -> object:
    """Return the first words of a text."""
    return " ".join(str(text).split()[:4]) if text else text


TASK = CausalLM
