"""Reward models: a number for each prompt with its completion, learned from pairs of a better and a worse one.

Runs wherever a task runs (`base.py` says where). Read `completions.py` next for the parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from launcher.models.chat import load_chat_tokenizer
from launcher.models.completions import CompletionWriter, decode_labels
from launcher.models.conversation import to_display_text
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task
from launcher.tasks.completions import (
    PAIR,
    RewardParams,
    cut_notes,
    encode_pairs,
    encode_single,
    example_completions,
)
from launcher.tasks.padding import text_inputs
from launcher.tasks.results import RowInputs, RowResult
from launcher.tasks.samples import Batch, Encoded, Outputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from launcher.tasks.metrics.preferences import PairMetrics


class Reward(Task):
    """Reward models of `AutoModelForSequenceClassification`, by the Bradley-Terry loss. A row is a pair.

    `predict` scores the completion in the column `chosen` and reads no rejected one.
    """

    Params = RewardParams
    params: RewardParams
    auto_model = "AutoModelForSequenceClassification"
    augments = False
    from_scratch = "decoder"

    def __init__(self, params: RewardParams, model: ModelSpec, seed: int) -> None:
        # Without dropout, unless the job asks for it, as in preference tuning: one noise would be on each side.
        model = model if model.dropout is not None else model.model_copy(update={"dropout": 0.0})
        self.params, self.model, self.seed = params, model, seed
        self.input_columns = (*((params.prompt,) if params.prompt else ()), params.chosen, *params.context_columns)
        self.target_columns = (params.rejected, *((params.margin,) if params.margin else ()))
        self.column_kinds = {params.rejected: "text"}
        self.metric_modes = {
            "reward_accuracy": "max", "reward_margin": "max", "chosen_reward": "max", "rejected_reward": "min",
        }  # fmt: skip
        self.prediction_schema = pa.schema({"prediction": pa.float32()})

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_chat_tokenizer(self.model, self.params.chat_template, required=True)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    @cached_property
    def _writer(self) -> CompletionWriter:
        return self.params.writer(self._tokenizer)

    def head(self) -> dict[str, object]:
        # The model reads its number at the last token that is not padding, which it finds by this id.
        return {"num_labels": 1, "pad_token_id": self._tokenizer.pad_token_id, "use_cache": False}

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        if with_targets:
            return encode_pairs(self.params, self._writer, rows, self.params.margin)
        return encode_single(self.params, replace(self._writer, columns=(self.params.chosen,)), rows)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad the sequences of B rows to (S, T): of pairs first all chosen, then all rejected ones, so S is 2 B."""
        import torch

        if "input_ids" not in samples.column_names:
            parts = [samples.column(f"{name}_ids").combine_chunks() for name in PAIR]
            sequences = pa.table({"input_ids": pa.concat_arrays(parts)})
        else:
            sequences = samples
        inputs = text_inputs(sequences, self._tokenizer.pad_token_id)
        margins = samples.column("margin").to_pylist() if "margin" in samples.column_names else [0.0] * len(samples)
        return Batch(inputs, torch.tensor(margins), torch.ones(len(samples)))

    def forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Return rewards, float32 (B,): chosen and rejected, or one alone for completions without a pair."""
        rewards = model(**batch.inputs).logits.float().squeeze(-1)
        return dict(zip(PAIR, rewards.split(len(batch.mask)), strict=False))

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        """Return the loss of Bradley and Terry's model (Ouyang et al. 2022, arXiv:2203.02155, equation 1).

        A margin is subtracted as in Llama 2 (Touvron et al. 2023, arXiv:2307.09288, equation 2).
        """
        from launcher.tasks.metrics.preferences import reward_losses

        return reward_losses(outputs["chosen"] - outputs["rejected"] - batch.labels)

    def metrics(self, device: "torch.device") -> "PairMetrics":
        from launcher.tasks.metrics.preferences import PairMetrics

        return PairMetrics()

    def update_metrics(self, metrics: Any, outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        metrics.update(outputs["chosen"], outputs["rejected"])

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        return pa.table({"prediction": outputs["chosen"].cpu().numpy()}, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        words = []
        for name in PAIR:
            labels = samples.column(f"{name}_labels").take(pa.array(chosen)).to_pylist()
            texts = decode_labels(self._tokenizer, labels)
            rewards = outputs[name][chosen].tolist()
            words.append([f"{name}, reward {r:.3g}: {text}" for text, r in zip(texts, rewards, strict=True)])
        return [RowResult(target, prediction) for target, prediction in zip(*words, strict=True)]

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        return cut_notes(self.params, self._writer, rows)

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        return RowInputs({name: to_display_text(row[name]) for name in self.input_columns})

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return prompts with an answer of the words w0..w99 (chosen) and one of w100..w199 (rejected)."""
        return example_completions(rows, seed)


TASK = Reward
