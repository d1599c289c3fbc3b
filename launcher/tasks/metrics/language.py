"""Metrics of language models: perplexity and token accuracy, with states that merge over workers. Train workers."""

import math

import torch
from torch.nn.functional import cross_entropy

from launcher.rundir.records import ClassRow, ConfusionMatrix


class LanguageMetrics:
    """Perplexity (exp of the mean loss per token) and the share of tokens that were the most likely one.

    Args:
        device: of the states.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens right
        self._seen = torch.zeros(0, dtype=torch.float64, device=device)  # how often each token is the right one

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count B rows: logits (B, T, V), labels (B, T), the token that follows or -100."""
        if len(self._seen) < logits.shape[-1]:
            self._seen = self._seen.new_zeros(logits.shape[-1])
        counted = labels != -100
        chosen, truth = logits[counted].float(), labels[counted]
        loss = cross_entropy(chosen, truth, reduction="sum").double()
        self._sums += torch.stack([loss, (chosen.argmax(-1) == truth).sum().double()])
        self._seen += torch.bincount(truth, minlength=len(self._seen)).double()

    def compute(self) -> dict[str, float]:
        """Merge the workers' states; returns the metrics, perplexity first."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
            size = torch.tensor([len(self._seen)], device=self._seen.device)
            torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)  # a worker may have had no row
            self._seen = torch.nn.functional.pad(self._seen, (0, int(size) - len(self._seen)))
            torch.distributed.all_reduce(self._seen)
        loss, right = self._sums.tolist()
        tokens = max(float(self._seen.sum()), 1.0)
        return {"perplexity": _exp(loss / tokens), "token_accuracy": right / tokens}

    def baseline(self) -> dict[str, float]:
        """Every token as likely as it is frequent, whatever stands before it."""
        shares = self._seen / self._seen.sum().clamp(min=1)
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
        return {"perplexity": _exp(float(entropy)), "token_accuracy": float(shares.max())}

    def confusion(self) -> ConfusionMatrix | None:
        """A vocabulary is too large for a matrix."""
        return None

    def classes(self) -> tuple[ClassRow, ...]:
        """A vocabulary is too large for a table."""
        return ()


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
