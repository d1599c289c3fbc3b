"""Gradients without ZeRO: all of them in one buffer, reduced, measured and clipped as one tensor. Train workers.

DeepSpeed's own stage 0 copies every gradient into buckets and back for the all-reduce and walks over the weights one
by one to clip, and adds those of half-precision weights in half precision; `engine.py` uses this instead.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

_PIECE = 6_400_000
"""Numbers per all-reduce: 25 MiB, as DDP's buckets."""


class FlatGradients:
    """The gradients of some weights as views of one buffer.

    Args:
        weights: Weights that the optimizer steps, all of one dtype, on one device. Their `grad` is set, and must be set
            again (`clear`) whenever something has put it to None.
        halves: Weights of the model in half precision, of which `weights` are the fp32 masters: their gradients are
            added to the masters' as soon as a backward pass has made them.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter], halves: Sequence[torch.nn.Parameter] = ()) -> None:
        self._weights = list(weights)
        total = sum(weight.numel() for weight in self._weights)
        self._flat_N = torch.zeros(total, dtype=self._weights[0].dtype, device=self._weights[0].device)
        self._views = [
            part.view_as(weight)
            for part, weight in zip(self._flat_N.split([w.numel() for w in self._weights]), self._weights, strict=True)
        ]
        self.clear()
        for half, view in zip(halves, self._views if halves else (), strict=True):
            half.register_post_accumulate_grad_hook(partial(_move, view))

    def clear(self) -> None:
        """All gradients zero, and in their places."""
        self._flat_N.zero_()
        for weight, view in zip(self._weights, self._views, strict=True):
            weight.grad = view

    def all_reduce(self) -> None:
        """The same gradients on all workers (a collective)."""
        # Gloo moves several pieces at a time faster than one large one: 60 instead of 85 ms for 90 MB.
        works = [dist.all_reduce(piece, async_op=True) for piece in self._flat_N.split(_PIECE)]
        for work in works:
            work.wait()

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scale down to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

        Returns:
            The L2 norm before, a scalar on the device: nothing waits for it.
        """
        norm: torch.Tensor = torch.linalg.vector_norm(self._flat_N)
        if max_norm is not None:
            self._flat_N.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _move(total: torch.Tensor, half: torch.Tensor) -> None:
    """Add a gradient to its fp32 sum and free it."""
    assert half.grad is not None
    total.add_(half.grad)
    half.grad = None


def use_sparse_embedding_update(model: torch.nn.Module) -> None:
    """Let embeddings hand back the rows of the batch's words alone, which are added to the buffer in place.

    Their dense gradient has a row for each word of the vocabulary, nearly all zero: half of MiniLM's numbers, written
    and added at each micro-batch. For models on the CPU, whose gradients `FlatGradients` holds.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and not module.scale_grad_by_freq:
            module.sparse = True
