"""Gradients in one flat buffer, and fp32 master weights: training without ZeRO. Runs in train workers.

DeepSpeed's stage 0 copies every gradient to buckets and back for the all-reduce, clips with a pass over each weight,
and accumulates half-precision gradients in half precision. `engine.py` uses this instead. The functions for half
precision work around DeepSpeed 0.19.8.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    import deepspeed
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

_BUCKET_ELEMENTS = 6_400_000
"""Elements per all-reduce: 25 MiB in fp32, the bucket size of DDP."""


class FlatGradients:
    """Gradients of some weights as views of one buffer.

    Args:
        weights: Weights that the optimizer steps, all of one dtype and device. Their `grad` is set to the views; call
            `clear` after anything has set it to None.
        halves: Half-precision weights of the model, of which `weights` are the fp32 masters; their gradients are added
            to the masters' as soon as a backward pass has computed them. () in fp32.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter], halves: Sequence[torch.nn.Parameter] = ()) -> None:
        self._weights = list(weights)
        sizes = [weight.numel() for weight in self._weights]
        self._flat_N = torch.zeros(sum(sizes), dtype=self._weights[0].dtype, device=self._weights[0].device)
        self._views = [
            part.view_as(weight) for part, weight in zip(self._flat_N.split(sizes), self._weights, strict=True)
        ]
        self.clear()
        for half, view in zip(halves, self._views if halves else (), strict=True):
            # One weight at a time: the half-precision gradients of the whole model never exist together.
            half.register_post_accumulate_grad_hook(partial(_move_gradient, view))

    def clear(self) -> None:
        """Set all gradients to zero and reattach the views."""
        # Zeroed in place. Setting `grad` to None, as torch's `zero_grad` does, would detach the buffer: backward would
        # allocate new gradients, and the all-reduce would send zeros without an error.
        self._flat_N.zero_()
        for weight, view in zip(self._weights, self._views, strict=True):
            weight.grad = view

    def all_reduce(self) -> None:
        """Sum the gradients over all ranks. Collective."""
        # Gloo moves several buckets at once faster than one large buffer: 60 instead of 85 ms for 90 MB.
        works = [dist.all_reduce(bucket, async_op=True) for bucket in self._flat_N.split(_BUCKET_ELEMENTS)]
        for work in works:
            work.wait()

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scale the gradient down to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

        Returns:
            L2 norm before clipping, scalar on the device: no host-device sync.
        """
        norm: torch.Tensor = torch.linalg.vector_norm(self._flat_N)
        if max_norm is not None:
            # The factor stays a tensor: an `if` on the norm would make the host wait for the device.
            self._flat_N.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _move_gradient(total: torch.Tensor, half: torch.Tensor) -> None:
    """Add a half-precision gradient to its fp32 sum and free it."""
    assert half.grad is not None
    total.add_(half.grad)
    half.grad = None


def use_sparse_embedding_update(model: torch.nn.Module) -> None:
    """Make embeddings return sparse gradients, which are added to the buffer in place. For models on the CPU.

    A dense gradient has a row for each word of the vocabulary, nearly all zero: for MiniLM half of all gradients,
    written and added for each micro-batch. Requires that `FlatGradients` holds the gradients.
    """
    for module in model.modules():
        # torch has no sparse gradient of an embedding that scales by frequency, and raises in the backward pass. So it
        # does for frozen ones in which peft trains new tokens: it copies their rows into the weight first.
        if isinstance(module, torch.nn.Embedding) and not module.scale_grad_by_freq and module.weight.requires_grad:
            module.sparse = True


def undo_initial_step(optimizer: "FP16_UnfusedOptimizer") -> None:
    """Undo the step with zero gradients by which DeepSpeed allocates the optimizer's states.

    Otherwise Adam's step counter is 1 before the first step, and the weights have already decayed once
    (runtime/fp16/unfused_optimizer.py, initialize_optimizer_states).
    """
    optimizer.optimizer.state.clear()
    optimizer.refresh_fp32_params()


def step_master_weights(optimizer: "FP16_UnfusedOptimizer") -> None:
    """Step the fp32 master weights with their gradients, and round them to the model's weights."""
    optimizer.optimizer.step()
    with torch.no_grad():
        for masters, halves in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, half in zip(masters, halves, strict=True):
                # In place: the model, its hooks and DeepSpeed's groups refer to the same tensor.
                half.copy_(master)


@contextmanager
def unify_gradient_dtype(engine: "type[deepspeed.DeepSpeedEngine]") -> Iterator[None]:
    """Make ZeRO 1 in bf16 use the same optimizer as all other stages, for engines built in the block.

    With fp32 accumulation DeepSpeed (runtime/engine.py, _do_optimizer_sanity_check) chooses BF16_Optimizer there, whose
    checkpoints no other stage can load.
    """
    inner = engine._do_optimizer_sanity_check

    def choose(self: "deepspeed.DeepSpeedEngine", basic: torch.optim.Optimizer) -> str | None:
        # Called for its checks as well.
        wrapper = inner(self, basic)
        return "zero_optimization" if self.zero_optimization() else wrapper

    engine._do_optimizer_sanity_check = choose
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = inner
