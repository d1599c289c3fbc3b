"""Reward models: a number for each prompt with its completion, learned from pairs of a better and a worse one.

Runs wherever a task runs (`base.py` says where). Read `completions.py` next for the parameters.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from launcher.spec.model import ModelSpec
from launcher.tasks.completions import (
    PAIR,
    CompletionTask,
    RewardParams,
    encode_pairs,
    encode_single,
)
from launcher.tasks.metrics.judgements import PAIR_MODES, pair_results
from launcher.tasks.padding import text_inputs
from launcher.tasks.results import RowResult
from launcher.tasks.samples import Batch, Encoded, Outputs

if TYPE_CHECKING:
    import torch

    from launcher.tasks.metrics.preferences import PairMetrics


class Reward(CompletionTask):
    """Reward models of `AutoModelForSequenceClassification`, by the Bradley-Terry loss. A row is a pair.

    `predict` scores the completion in the column `chosen` and reads no rejected one.
    """

    Params = RewardParams
    params: RewardParams
    auto_model = "AutoModelForSequenceClassification"

    def __init__(self, params: RewardParams, model: ModelSpec, seed: int) -> None:
        super().__init__(params, model, seed)
        self.input_columns = (*((params.prompt,) if params.prompt else ()), params.chosen, *params.context_columns)
        self.target_columns = (params.rejected, *((params.margin,) if params.margin else ()))
        self.column_kinds = {params.rejected: "text"}
        self.metric_modes = PAIR_MODES
        self.prediction_schema = pa.schema({"prediction": pa.float32()})

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
        return pair_results(outputs, samples, chosen, self._tokenizer)


TASK = Reward
