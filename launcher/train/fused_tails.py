"""The same bits from torch's fused AdamW on a CPU, wherever a weight lies in its tensor. Runs in train workers.

The kernel updates 8 or 16 elements at a time, and what is left at the end of a tensor one by one, with another rounding
(torch 2.13, aten/src/ATen/native/cpu/FusedAdamKernel.cpp). Without ZeRO the end is that of each weight, with ZeRO 1
that of a worker's shard: another number of workers would change the last bits. The other implementations of torch.optim
have no such ends, and take six times as long. `engine.py` registers this.
"""

from typing import Any

import torch
from torch.optim.adamw import adamw

_BLOCK = 16
"""Elements of the widest vectors (AVX-512)."""


class FusedTails:
    """Hooks that update the last elements of each tensor once more, in a whole block.

    Args:
        optimizer: Fused AdamW whose weights are on a CPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._blocks: list[_Blocks] = []
        optimizer.register_step_pre_hook(self._save)
        optimizer.register_step_post_hook(self._update)

    def _save(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._blocks = [_Blocks(optimizer, group) for group in optimizer.param_groups]

    def _update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for blocks in self._blocks:
            blocks.update(optimizer)
        self._blocks = []


class _Blocks:
    """Last elements of the weights of a group and of their states before a step, each padded to a block."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        self._group = group
        self._weights = [w for w in group["params"] if w.grad is not None and w.numel() % _BLOCK]
        states = [optimizer.state[weight] for weight in self._weights]
        # The first step has no states yet: they begin with zeros.
        self._steps = [state["step"].clone() if state else torch.zeros(()) for state in states]
        self._values = {
            "weight": [_padded(weight.detach()) for weight in self._weights],
            "gradient": [_padded(weight.grad) for weight in self._weights],
        }
        for name in ("exp_avg", "exp_avg_sq"):
            pairs = zip(self._weights, states, strict=True)
            self._values[name] = [_padded(s[name]) if s else torch.zeros(_BLOCK) for _, s in pairs]

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the blocks, and write them over what the optimizer has made of their elements."""
        if not self._weights:
            return
        group, values = self._group, self._values
        beta1, beta2 = group["betas"]
        adamw(
            values["weight"], values["gradient"], values["exp_avg"], values["exp_avg_sq"], [], self._steps,
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        for i, weight in enumerate(self._weights):
            state = optimizer.state[weight]
            targets = {"weight": weight.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for name, target in targets.items():
                tail = _tail(target)
                tail.copy_(values[name][i][: len(tail)])


def _tail(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements behind the last whole block, as a view."""
    return tensor.view(-1)[tensor.numel() // _BLOCK * _BLOCK :]


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    tail = _tail(tensor)
    return torch.nn.functional.pad(tail, (0, _BLOCK - len(tail))).clone()
