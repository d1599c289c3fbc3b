"""Exponential moving average (EMA) of the trained weights, which is evaluated and exported. Runs in train workers.

Averaged weights generalise better after a short or noisy training (Polyak & Juditsky 1992; Tarvainen & Valpola 2017,
arXiv:1703.01780). Each rank keeps the average of the weights it holds: whole ones, or its shards under ZeRO-3.
`engine.py` updates it after each step and swaps it in for evaluations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

EMA_FILE = "average.pt"


class EMA:
    """Average of some weights, in fp32.

    Args:
        decay: Weight of the old average at each step. At step t it is min(decay, (1 + t) / (10 + t)), as in
            TensorFlow's `ExponentialMovingAverage`, so that the initial weights lose their influence quickly.
        weights: Names and weights.
        sharded: True if the weights are shards between uses (ZeRO-3).
    """

    def __init__(self, decay: float, weights: Sequence[tuple[str, torch.nn.Parameter]], sharded: bool) -> None:
        self._decay = decay
        # Untyped: ZeRO-3 adds ds_tensor, ds_numel and ds_shape to a weight.
        self._weights: list[tuple[str, Any]] = list(weights)
        self._is_sharded = sharded
        # Clones: `float` of an fp32 weight returns the weight itself, which each step changes.
        self._average = [self._local(weight).float().clone() for _, weight in self._weights]

    def update(self, step: int) -> None:
        """Add the current weights to the average, after `step` optimizer steps."""
        fraction = 1.0 - min(self._decay, (1 + step) / (10 + step))
        for average, (_, weight) in zip(self._average, self._weights, strict=True):
            average.lerp_(self._local(weight).float(), fraction)

    @contextmanager
    def swapped_in(self, release: Callable[[], None]) -> Iterator[None]:
        """Exchange weights and average inside the block.

        Args:
            release: Function that drops gathered copies of sharded weights, which would be outdated. Collective.
        """
        # ZeRO-3 keeps small weights gathered between uses (param_persistence_threshold). Forward passes would go on
        # with these copies after their shards are exchanged, without an error.
        release()
        weights = self._swap_in()
        try:
            yield
        finally:
            # The same for the copies that the block has gathered from the averages.
            release()
            self._swap_out(weights)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Return the whole average by name on rank 0, for any number of workers to load; {} elsewhere. Collective."""
        # One collective per weight. All ranks hold the same names in the same order, that of `named_parameters`.
        full = {name: self._gather(i) for i, (name, _) in enumerate(self._weights)}
        return full if dist.get_rank() == 0 else {}

    def load(self, directory: Path) -> None:
        """Load the average; from a checkpoint without one, start with the current weights."""
        path = directory / EMA_FILE
        full = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        for average, (name, weight) in zip(self._average, self._weights, strict=True):
            average.copy_(self._own_shard(full[name], average) if name in full else self._local(weight))

    def _local(self, weight: Any) -> torch.Tensor:
        """Return the part of a weight that this rank holds."""
        local: torch.Tensor = weight.ds_tensor.data if self._is_sharded else weight.data
        return local

    def _swap_in(self) -> list[torch.Tensor | None]:
        """Put the averages in place of the weights.

        Returns:
            Copy of each weight in half precision; None for weights in fp32, which are kept in place of their average.
        """
        copies: list[torch.Tensor | None] = []
        for average, (_, weight) in zip(self._average, self._weights, strict=True):
            local = self._local(weight)
            if local.dtype == average.dtype:
                _exchange(local, average)
                copies.append(None)
            else:
                # The average must not pass through the weight, which would round it at every evaluation.
                copies.append(local.clone())
                local.copy_(average)
        return copies

    def _swap_out(self, copies: list[torch.Tensor | None]) -> None:
        """Put the weights back that `_swap_in` has returned."""
        for average, (_, weight), copy in zip(self._average, self._weights, copies, strict=True):
            if copy is None:
                _exchange(self._local(weight), average)
            else:
                self._local(weight).copy_(copy)

    def _gather(self, index: int) -> torch.Tensor:
        """Return the whole average of one weight. Collective under ZeRO-3."""
        average = self._average[index]
        if not self._is_sharded:
            return average
        # ZeRO-3 pads a weight so that all shards have the same size; the padding is at the end of the last one.
        padded = torch.empty(average.numel() * dist.get_world_size(), device=average.device)
        dist.all_gather_into_tensor(padded, average)
        weight = self._weights[index][1]
        return padded[: weight.ds_numel].view(weight.ds_shape)

    def _own_shard(self, full: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of a whole average; the last one is padded."""
        if not self._is_sharded:
            return full
        begin = average.numel() * dist.get_rank()
        shard = full.flatten()[begin : begin + average.numel()]
        return torch.nn.functional.pad(shard, (0, average.numel() - shard.numel()))


def _exchange(left: torch.Tensor, right: torch.Tensor) -> None:
    """Exchange the values of two tensors of one type, with the memory of one of them."""
    copy = left.clone()
    left.copy_(right)
    right.copy_(copy)
