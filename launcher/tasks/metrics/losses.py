"""Cross entropy of token labels, summed over each sample. Runs in train workers.

Losses are sums because the loop divides by the weight of the whole global batch, so that the curve does not depend on
how the batch is split.
"""

import torch
from torch.nn.functional import cross_entropy

from launcher.models.chat import IGNORED


def token_losses(
    logits_BTC: torch.Tensor, labels_BT: torch.Tensor, weight_C: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the cross entropy of each sequence, summed over its labelled tokens: float32 (B,).

    Arguments are those of `labelled_losses`.
    """
    return labelled_losses(logits_BTC, labels_BT, weight_C, smoothing).sum(-1)


def labelled_losses(
    logits_BTC: torch.Tensor, labels_BT: torch.Tensor, weight_C: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the cross entropy of each token, 0 where there is no label.

    Args:
        logits_BTC: Scores of C classes, any float type.
        labels_BT: Classes, int64; -100 where there is no label.
        weight_C: Weight of each class, float32; None weighs all alike.
        smoothing: Share of each target that is spread over all classes.

    Returns:
        float32 (B, T).
    """
    is_labelled = labels_BT != IGNORED
    losses = logits_BTC.new_zeros(labels_BT.shape, dtype=torch.float32)
    # Only labelled tokens are converted to float32: (B, T, V) in fp32 is the largest tensor of a step, and of a long
    # prompt with a short answer a fraction is labelled. The boolean index syncs with the device to learn its size.
    chosen_losses = cross_entropy(
        logits_BTC[is_labelled].float(), labels_BT[is_labelled], weight_C, reduction="none", label_smoothing=smoothing
    )
    return losses.masked_scatter(is_labelled, chosen_losses)
