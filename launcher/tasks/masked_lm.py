"""Masked language modelling (BERT, RoBERTa): hidden tokens of plain texts, to adapt an encoder to their language.

Runs wherever a task runs (`base.py` says where). Read `models/masking.py` next for the masks. The exported model is a
`model.name` for the other text tasks (task-adaptive pretraining, Gururangan et al. 2020, arXiv:2004.10964).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from launcher.errors import ModelError
from launcher.formatting import as_text
from launcher.models.chat import IGNORED
from launcher.models.masking import Masker, filled_texts, token_texts
from launcher.models.pretrained import load_tokenizer
from launcher.rundir.records import SpanMark
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task, truncation_note
from launcher.tasks.padding import pad_lists, text_inputs
from launcher.tasks.params import PackedParams
from launcher.tasks.results import RowResult
from launcher.tasks.samples import Batch, Encoded, Outputs, read_each

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from launcher.tasks.metrics.language import LanguageMetrics


class MaskedParams(PackedParams):
    """`task:` with `type: masked-lm`."""

    text: str = "text"
    """Column with the texts."""
    max_length: int = Field(default=128, ge=4)
    """Tokens kept of each row, and the length of a packed sequence; the rest is cut off."""
    mask_fraction: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of each row's tokens that is predicted, at least one: 80 % of these are hidden, 10 % replaced by any token
    and 10 % kept. Training draws others in each epoch; an evaluation's are a function of the row's text."""


class MaskedLM(Task):
    """Fine-tuning of `AutoModelForMaskedLM`. The weight of a sample is its number of predicted tokens."""

    Params = MaskedParams
    params: MaskedParams
    auto_model = "AutoModelForMaskedLM"
    target_columns = ()

    def __init__(self, params: MaskedParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns = (params.text,)
        self.metric_modes = {"perplexity": "min", "token_accuracy": "max"}
        fields = {"prediction": pa.string(), "tokens": pa.list_(pa.string()), "scores": pa.list_(pa.float64())}
        self.prediction_schema = pa.schema(fields)
        self.pack_length = params.max_length if params.packing else None

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        tokenizer = load_tokenizer(self.model)
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"model.name: the tokenizer of {self.model.name} has no mask token, so no token can be hidden; give a "
                "model that was pretrained with masks, such as BERT"
            )
        return tokenizer

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    @cached_property
    def _masker(self) -> Masker:
        return Masker(self._tokenizer, self.params.mask_fraction, self.params.max_length)

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        column = self.params.text
        texts, valid_rows, problems = read_each(rows.column(column).to_pylist(), lambda cell: as_text(cell, column))
        seeds = None if noise is None else noise[valid_rows]
        # Only evaluations and `predict` display the places of masks.
        masked = self._masker.encode(texts, seeds, chooses=with_targets, has_places=noise is None)
        positions = np.array(valid_rows, np.int64)
        unusable = np.delete(positions, masked.usable)
        problems += tuple((int(i), f"{column} has no token to predict") for i in unusable)
        weights = masked.counts.astype(np.float64)
        return Encoded(masked.samples, positions[masked.usable], masked.lengths, weights, tuple(sorted(problems)))

    def collate(self, samples: pa.Table) -> Batch:
        """Pad the inputs and labels to (B, T); labels are -100 where no token is predicted."""
        import torch

        labels = torch.from_numpy(pad_lists(samples.column("labels"), IGNORED))
        return Batch(text_inputs(samples, self._tokenizer.pad_token_id), labels, torch.ones(len(samples)))

    def forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        from launcher.tasks.metrics.chunked_head import token_outputs

        return token_outputs(self.auto_model, model, batch.inputs, batch.labels)

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        return outputs["losses"].sum(-1)

    def metrics(self, device: "torch.device") -> "LanguageMetrics":
        from launcher.tasks.metrics.language import LanguageMetrics

        return LanguageMetrics(device)

    def update_metrics(self, metrics: "LanguageMetrics", outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        metrics.update(outputs["losses"], outputs["predicted"], batch.labels)

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        """Return each text with its masks filled, and the most likely token for each mask with its probability."""
        chosen = list(map(np.flatnonzero, pad_lists(samples.column("labels"), IGNORED) != IGNORED))
        predicted, confidence = (outputs[name].cpu() for name in ("predicted", "confidence"))
        tokens = [ids[where].tolist() for ids, where in zip(predicted, chosen, strict=True)]
        columns = {
            "prediction": filled_texts(self._tokenizer, samples, tokens),
            "tokens": [token_texts(self._tokenizer, row) for row in tokens],
            "scores": [scores[where].tolist() for scores, where in zip(confidence, chosen, strict=True)],
        }
        return pa.table(columns, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        rows = samples.take(pa.array(chosen))
        own = {name: outputs[name][chosen] for name in ("predicted", "confidence")}
        predicted = self.decode(own, rows).column("tokens").to_pylist()
        results = []
        for row, tokens in zip(rows.to_pylist(), predicted, strict=True):
            truth = token_texts(self._tokenizer, [label for label in row["labels"] if label != IGNORED])
            # Not strict: a slow tokenizer knows no places.
            cells = zip(row["starts"], row["ends"], truth, tokens, strict=False)
            marks = [SpanMark(start=s, end=e, label=p, kind="found" if t == p else "wrong") for s, e, t, p in cells]
            results.append(RowResult(" ".join(truth), " ".join(tokens), tuple(marks)))
        return results

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        texts = [text for text in rows.column(self.params.text).to_pylist() if text]
        # Without truncation, or nothing could be said of what is cut off.
        lengths = [len(self._tokenizer(str(text))["input_ids"]) for text in texts]
        return truncation_note(lengths, self.params.max_length)

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return texts of two alternating words each, so that each hidden word stands next to its neighbours."""
        runs = np.random.default_rng(seed).integers((0, 4), (20, 12), (rows, 2))
        return pa.table({self.params.text: [" ".join([f"w{first} w{first + 1}"] * n) for first, n in runs]})


TASK = MaskedLM
