"""Sums that do not depend on their order. Runs in train workers."""

import torch

_STEP = 2.0**-22
"""Far below a digit that anybody reads. Sums of its multiples are exact in float64 up to 2**31."""


def rounded(sums: torch.Tensor) -> torch.Tensor:
    """Return the sums of a micro-batch, float64, rounded so that adding many of them, in any order, rounds nothing.

    So a metric has the same bits for any number of workers, which have the same micro-batches, in another order.
    """
    return torch.round(sums / _STEP) * _STEP
