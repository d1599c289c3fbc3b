"""What a preference says, and all that follows from it: a pair of completions, or one with a judgement.

`Pairs` and `Judged` are samples, log-probabilities, losses, metrics and words of each. Data workers (without torch) and
train workers. `preference.py` delegates to them; `preferences.py` has the formulas.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import pyarrow as pa

from launcher.models.chat import IGNORED
from launcher.models.completions import CompletionWriter, decode_labels
from launcher.tasks.completions import PAIR, PreferenceParams, encode_judged, encode_pairs, mismatched
from launcher.tasks.padding import list_column, pad_lists
from launcher.tasks.results import MetricMode, RowResult, TaskMetrics
from launcher.tasks.samples import Batch, Encoded, Outputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from launcher.tasks.metrics.preferences import JudgedMetrics, PairMetrics

PAIR_MODES: dict[str, MetricMode] = {
    "reward_accuracy": "max", "reward_margin": "max", "chosen_reward": "max", "rejected_reward": "min",
}  # fmt: skip
"""Direction of the metrics of pairs (`PairMetrics`)."""
ReferenceOf: TypeAlias = "Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]]"
"""Opens the reference of a model, which may be the model itself without its adapters."""


class Judgements(Protocol):
    """Meaning of a row: samples, log-probabilities, metrics and words."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are learned."""

    @property
    def metric_modes(self) -> dict[str, MetricMode]:
        """Direction of each metric, the main metric first."""

    def encode(self, writer: CompletionWriter, rows: pa.Table) -> Encoded:
        """Return the samples of rows."""

    def collate(self, samples: pa.Table, pad_token_id: int) -> Batch:
        """Pad the sequences of B rows."""

    def forward(self, model: "torch.nn.Module", batch: Batch, reference_of: ReferenceOf) -> Outputs:
        """Return what losses and rewards are made of, (B,) each."""

    def metrics(self, device: "torch.device") -> TaskMetrics:
        """Return new metric states on a device."""

    def preferred(self, outputs: Outputs, samples: pa.Table) -> list[list[int]]:
        """Return the labels of each row's completion, of two the one with the larger reward."""

    def row_results(
        self, outputs: Outputs, samples: pa.Table, chosen: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
    ) -> list[RowResult]:
        """Return completions and rewards in words; arguments as of `Task.row_results`."""


@dataclass(frozen=True)
class Pairs(Judgements):
    """Pairs of a chosen and a rejected completion.

    Args:
        params: Parameters of the task.
        smoothing: Probability that a preference is the wrong way round.
    """

    params: PreferenceParams
    smoothing: float = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        return self.params.completion_columns

    @property
    def metric_modes(self) -> dict[str, MetricMode]:
        return {**PAIR_MODES, "log_ratio": "max"} if self.params.has_reference else PAIR_MODES

    def encode(self, writer: CompletionWriter, rows: pa.Table) -> Encoded:
        return encode_pairs(self.params, writer, rows)

    def collate(self, samples: pa.Table, pad_token_id: int) -> Batch:
        """Pad to (2 B, T): first all chosen, then all rejected sequences."""
        ids = [row for name in PAIR for row in samples.column(f"{name}_ids").to_pylist()]
        labels = [row for name in PAIR for row in samples.column(f"{name}_labels").to_pylist()]
        return _batch(ids, labels, pad_token_id, len(samples))

    def forward(self, model: "torch.nn.Module", batch: Batch, reference_of: ReferenceOf) -> Outputs:
        import torch

        ids, labels = batch.inputs["input_ids"], batch.labels
        outputs = _by_name((labels != IGNORED).sum(-1).float(), "_tokens")
        if self.params.has_reference:
            # Before the policy: adapters that are switched off and on again are not part of its graph yet.
            with torch.no_grad(), reference_of(model) as reference:
                outputs |= _by_name(log_probabilities(reference, ids, labels), "_reference")
        return outputs | _by_name(log_probabilities(model, ids, labels))

    def losses(self, outputs: Outputs, totals: Mapping[str, float]) -> "torch.Tensor":
        """Return the loss of each row, float32 (B,).

        Args:
            outputs: Outputs of `forward`.
            totals: Sums over the global batch (`Batch.totals`).
        """
        from launcher.tasks.metrics import preferences

        params, beta = self.params, self.params.strength
        chosen, rejected = self.scores(outputs)
        if params.loss == "dpo":
            return preferences.dpo_losses(chosen - rejected, beta, self.smoothing)
        if params.loss == "simpo":
            return preferences.simpo_losses(chosen - rejected, beta, params.gamma)
        if params.loss == "ipo":
            margin = chosen / outputs["chosen_tokens"] - rejected / outputs["rejected_tokens"]
            return preferences.ipo_losses(margin, beta)
        # The likelihood is averaged over the chosen tokens of the global batch; the loop divides all by its rows.
        share = totals["weight"] / totals["chosen_tokens"]
        return preferences.odds_ratio_losses(chosen, rejected, beta) - outputs["chosen"] * share

    def scores(self, outputs: Outputs) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return what rewards are multiples of: log-ratios to the reference, or mean log-probabilities of a token."""
        if self.params.has_reference:
            chosen, rejected = (outputs[name] - outputs[f"{name}_reference"] for name in PAIR)
        else:
            chosen, rejected = (outputs[name] / outputs[f"{name}_tokens"] for name in PAIR)
        return chosen, rejected

    def metrics(self, device: "torch.device") -> "PairMetrics":
        from launcher.tasks.metrics.preferences import PairMetrics

        return PairMetrics(self.params.has_reference)

    def update(self, metrics: "PairMetrics", outputs: Outputs) -> None:
        """Add the rows of a batch to the metric states."""
        chosen, rejected = self.scores(outputs)
        ratio = (chosen + rejected) / 2 if self.params.has_reference else None
        metrics.update(self.params.strength * chosen, self.params.strength * rejected, ratio)

    def preferred(self, outputs: Outputs, samples: pa.Table) -> list[list[int]]:
        chosen, rejected = self.scores(outputs)
        pairs = zip(*(samples.column(f"{name}_labels").to_pylist() for name in PAIR), strict=True)
        return [first if wins else second for (first, second), wins in zip(pairs, chosen > rejected, strict=True)]

    def row_results(
        self, outputs: Outputs, samples: pa.Table, chosen: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
    ) -> list[RowResult]:
        rewards = {name: self.params.strength * score for name, score in zip(PAIR, self.scores(outputs), strict=True)}
        return pair_results(rewards, samples, chosen, tokenizer)


@dataclass(frozen=True)
class Judged(Judgements):
    """Single completions, each desirable or undesirable, for KTO.

    Args:
        params: Parameters of the task.
    """

    params: PreferenceParams

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.params.completion_columns, self.params.label)

    @property
    def metric_modes(self) -> dict[str, MetricMode]:
        return {
            "reward_accuracy": "max", "reward_margin": "max", "desirable_reward": "max", "undesirable_reward": "min",
            "kl": "min",
        }  # fmt: skip

    def encode(self, writer: CompletionWriter, rows: pa.Table) -> Encoded:
        return encode_judged(self.params, writer, rows)

    def collate(self, samples: pa.Table, pad_token_id: int) -> Batch:
        """Pad to (B, T); targets have the judgements, and mismatched sequences where samples have partners."""
        import torch

        ids, labels = (samples.column(name).to_pylist() for name in ("input_ids", "labels"))
        targets = {"desirable": torch.tensor(samples.column("desirable").to_pylist())}
        if "partner_labels" in samples.column_names:
            sequences = mismatched(self.params, samples)
            targets["mismatched_ids"] = _pad([sequence.ids for sequence in sequences], pad_token_id)
            targets["mismatched_labels"] = _pad([sequence.labels for sequence in sequences], IGNORED)
        return _batch(ids, labels, pad_token_id, len(samples), targets)

    def forward(self, model: "torch.nn.Module", batch: Batch, reference_of: ReferenceOf) -> Outputs:
        import torch

        ids, labels = batch.inputs["input_ids"], batch.labels
        ratio = log_probabilities(model, ids, labels)
        mismatched_ratio = torch.zeros_like(ratio)
        # The pass with gradients propagates those of the first pass (`train/coupled.py`), in which constants have none.
        # All ranks skip these forward passes together, which are collectives under ZeRO-3.
        if not torch.is_grad_enabled():
            others = batch.targets["mismatched_ids"], batch.targets["mismatched_labels"]
            mismatched_ratio = log_probabilities(model, *others)
            with reference_of(model) as reference:
                ratio = ratio - log_probabilities(reference, ids, labels)
                mismatched_ratio = mismatched_ratio - log_probabilities(reference, *others)
        return {"log_ratio": ratio, "mismatched": mismatched_ratio, "desirable": batch.targets["desirable"]}

    def losses(self, outputs: Outputs) -> "torch.Tensor":
        """Return the loss of each row of a global batch, float32 (N,)."""
        from launcher.tasks.metrics.preferences import kto_losses

        weights = self.params.desirable_weight, self.params.undesirable_weight
        rows = outputs["log_ratio"], outputs["mismatched"], outputs["desirable"]
        return kto_losses(*rows, self.params.strength, weights)

    def metrics(self, device: "torch.device") -> "JudgedMetrics":
        from launcher.tasks.metrics.preferences import JudgedMetrics

        return JudgedMetrics(self.params.strength)

    def update(self, metrics: "JudgedMetrics", outputs: Outputs) -> None:
        """Add the rows of a batch to the metric states."""
        metrics.update(outputs["log_ratio"], outputs["mismatched"], outputs["desirable"])

    def preferred(self, outputs: Outputs, samples: pa.Table) -> list[list[int]]:
        return samples.column("labels").to_pylist()  # type: ignore[no-any-return]  # pyarrow ships no types

    def row_results(
        self, outputs: Outputs, samples: pa.Table, chosen: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
    ) -> list[RowResult]:
        rows = samples.take(pa.array(chosen))
        texts = decode_labels(tokenizer, rows.column("labels").to_pylist())
        rewards = (self.params.strength * outputs["log_ratio"][chosen]).tolist()
        words = ("desirable" if judgement else "undesirable" for judgement in rows.column("desirable").to_pylist())
        return [
            RowResult(f"{word}: {text}", f"reward {reward:.3g}")
            for word, text, reward in zip(words, texts, rewards, strict=True)
        ]


def pair_results(
    rewards: Outputs, samples: pa.Table, chosen: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[RowResult]:
    """Return both completions of some rows in words, with their rewards (B,) by name."""
    words = []
    for name in PAIR:
        texts = decode_labels(tokenizer, samples.column(f"{name}_labels").take(pa.array(chosen)).to_pylist())
        pairs = zip(texts, rewards[name][chosen].tolist(), strict=True)
        words.append([f"{name}, reward {reward:.3g}: {text}" for text, reward in pairs])
    return [RowResult(target, prediction) for target, prediction in zip(*words, strict=True)]


def log_probabilities(
    model: "torch.nn.Module", ids_ST: "torch.Tensor | bool", labels_ST: "torch.Tensor"
) -> "torch.Tensor":
    """Return the log-probability of each sequence's completion, summed over its tokens, float32 (S,)."""
    from launcher.tasks.metrics.chunked_head import token_outputs

    # There is no attention mask: causal attention never reaches the padding at the end.
    inputs = {"input_ids": ids_ST, "use_cache": False}
    return -token_outputs("AutoModelForCausalLM", model, inputs, labels_ST)["losses"].sum(-1)


def prompt_batch(samples: pa.Table, pad_token_id: int) -> Batch:
    """Pad prompts without completions to (B, T)."""
    ids = samples.column("input_ids").to_pylist()
    return _batch(ids, [[IGNORED] * len(row) for row in ids], pad_token_id, len(samples))


def _batch(
    ids: list[list[int]],
    labels: list[list[int]],
    pad_token_id: int,
    rows: int,
    targets: "Mapping[str, torch.Tensor] | None" = None,
) -> Batch:
    import torch

    inputs: dict[str, torch.Tensor | bool] = {"input_ids": _pad(ids, pad_token_id), "use_cache": False}
    return Batch(inputs, _pad(labels, IGNORED), torch.ones(rows), targets or {})


def _pad(rows: list[list[int]], value: int) -> "torch.Tensor":
    import torch

    return torch.from_numpy(pad_lists(list_column(rows), value))


def _by_name(values: "torch.Tensor", suffix: str = "") -> "dict[str, torch.Tensor]":
    """Return values of all chosen, then all rejected sequences, (2 B,), as two tensors (B,) by name."""
    return {f"{name}{suffix}": half for name, half in zip(PAIR, values.chunk(2), strict=True)}
