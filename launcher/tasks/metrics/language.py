"""Metrics of language models: perplexity and token accuracy. Runs in train workers."""

import math

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from launcher.models.chat import IGNORED
from launcher.tasks.metrics.losses import labelled_losses
from launcher.tasks.results import TaskMetrics, rounded


class LanguageMetrics(TaskMetrics):
    """Perplexity (exp of the mean loss per token) and the share of tokens that were predicted as the most likely one.

    Has neither a confusion matrix nor a table of classes: a vocabulary is too large for them.

    Args:
        device: Device of the states.
    """

    def __init__(self, device: torch.device) -> None:
        # Loss and correct tokens. float64: a float32 sum of 1e8 tokens would lose the ones.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._label_counts_V = torch.zeros(0, dtype=torch.float64, device=device)

    def update(self, losses: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows: losses (B, T), 0 without a label; predicted tokens (B, T); labels (B, T), a token or -100."""
        is_labelled = labels != IGNORED
        # The boolean index syncs with the device.
        truth = labels[is_labelled]
        self._sums += rounded(torch.stack([losses.double().sum(), (predicted[is_labelled] == truth).sum().double()]))
        counts = torch.bincount(truth, minlength=len(self._label_counts_V)).double()
        # As long as the largest label so far: the vocabulary is not known here.
        counts[: len(self._label_counts_V)] += self._label_counts_V
        self._label_counts_V = counts

    def update_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows of which the whole logits are known: logits (B, T, V); labels (B, T)."""
        self.update(labelled_losses(logits, labels), logits.argmax(-1), labels)

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, perplexity first. Collective."""
        if dist.is_initialized():
            # All of these reduce in place: a second call of `compute` would add the sums of all ranks once more.
            dist.all_reduce(self._sums)
            # A rank without rows has counts of length 0, and all_reduce needs the same shape on all ranks.
            size = torch.tensor([len(self._label_counts_V)], device=self._label_counts_V.device)
            dist.all_reduce(size, dist.ReduceOp.MAX)
            self._label_counts_V = pad(self._label_counts_V, (0, int(size) - len(self._label_counts_V)))
            dist.all_reduce(self._label_counts_V)
        loss, correct = self._sums.tolist()
        tokens = max(float(self._label_counts_V.sum()), 1.0)
        return {"perplexity": _exp(loss / tokens), "token_accuracy": correct / tokens}

    def baseline(self) -> dict[str, float]:
        """Return the scores of unigram frequencies: each token as likely as it is frequent in the labels."""
        shares = self._label_counts_V / self._label_counts_V.sum().clamp(min=1)
        # The clamp gives 0 * log(1e-300) = 0 for a token that never occurs, instead of NaN.
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
        return {"perplexity": _exp(float(entropy)), "token_accuracy": float(shares.max())}


def _exp(value: float) -> float:
    # `exp` overflows a float64 at 709.
    return math.exp(min(value, 700.0))
