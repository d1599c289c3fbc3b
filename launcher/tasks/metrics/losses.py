"""Losses as sums over a sample, which is what the loop divides by the global batch's weight. Runs in train workers."""

import torch
from torch.nn.functional import cross_entropy

from launcher.models.chat import IGNORED


def token_losses(
    logits_BTC: torch.Tensor, labels_BT: torch.Tensor, weight_C: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy of each sequence, summed over its labelled tokens.

    Args:
        logits_BTC: scores of C classes, any float type.
        labels_BT: classes, -100 where nothing is to be learned.
        weight_C: of each class; None weighs all alike.
        smoothing: share of each target that is spread over all classes.

    Returns:
        float32 (B,).
    """
    labelled = labels_BT != IGNORED
    losses = logits_BTC.new_zeros(labels_BT.shape, dtype=torch.float32)
    # Only labelled tokens are made float32: of a long prompt with a short answer, a fraction.
    chosen = cross_entropy(
        logits_BTC[labelled].float(), labels_BT[labelled], weight_C, reduction="none", label_smoothing=smoothing
    )
    return losses.masked_scatter(labelled, chosen).sum(-1)
