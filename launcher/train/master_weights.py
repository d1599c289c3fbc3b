"""Half precision on DeepSpeed 0.19.8, where it needs help: fp32 masters without ZeRO, and ZeRO 1. Train workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import deepspeed
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer


def undo_initial_step(optimizer: "FP16_UnfusedOptimizer") -> None:
    """Undo the step that DeepSpeed makes with zero gradients to allocate the optimizer's states.

    Adam's counter would stand at 1 before the first step, and weights would already have decayed once.
    """
    optimizer.optimizer.state.clear()
    optimizer.refresh_fp32_params()


def step_master_weights(optimizer: "FP16_UnfusedOptimizer") -> None:
    """Step the fp32 masters by the gradients they hold, and round them to the model's weights."""
    optimizer.optimizer.step()
    with torch.no_grad():
        for masters, halves in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, half in zip(masters, halves, strict=True):
                half.copy_(master)


@contextmanager
def unify_gradient_dtype(engine: "type[deepspeed.DeepSpeedEngine]") -> Iterator[None]:
    """Let ZeRO 1 in bf16 use the same optimizer as every other stage and precision.

    With fp32 accumulation DeepSpeed takes another one there (BF16_Optimizer), whose checkpoints no other stage reads.
    """
    chosen = engine._do_optimizer_sanity_check

    def choose(self: "deepspeed.DeepSpeedEngine", basic: torch.optim.Optimizer) -> str | None:
        found = chosen(self, basic)
        return "zero_optimization" if self.zero_optimization() else found

    engine._do_optimizer_sanity_check = choose
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = chosen
