"""An exponential moving average of the trained weights: what is evaluated and exported instead of them. Train workers.

Averaged weights generalise better where a run is short or noisy (Polyak & Juditsky 1992; Tarvainen & Valpola 2017,
arXiv:1703.01780). Each worker keeps the average of what it holds: whole weights, or its shards under ZeRO-3.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any  # attributes that no type knows

import torch
import torch.distributed as dist

FILE = "average.pt"


class EMA:
    """The average of some weights, in fp32.

    Args:
        decay: how much of it stays at each step, once there were many: of step t, min(decay, (1 + t) / (10 + t)), as
            TensorFlow's `ExponentialMovingAverage` has it, so that the first weights are soon forgotten.
        weights: by name.
        sharded: whether they are shards between uses (ZeRO-3).
    """

    def __init__(self, decay: float, weights: Sequence[tuple[str, torch.nn.Parameter]], sharded: bool) -> None:
        self._decay, self._weights, self._sharded = decay, list(weights), sharded
        self._average = [self._held(weight).float().clone() for _, weight in self._weights]

    def update(self, step: int) -> None:
        """Count the weights after `step` optimizer steps."""
        share = 1.0 - min(self._decay, (1 + step) / (10 + step))
        for average, (_, weight) in zip(self._average, self._weights, strict=True):
            average.lerp_(self._held(weight).float(), share)

    @contextmanager
    def swapped_in(self, release: Callable[[], None]) -> Iterator[None]:
        """The average stands where the weights are, inside the block.

        Args:
            release: forgets what was gathered of shards (a collective).
        """
        release()
        self._swap()
        try:
            yield
        finally:
            release()
            self._swap()

    def full_weights(self) -> dict[str, torch.Tensor]:
        """All of it by name, for any number of workers to read back; {} but on rank 0 (a collective)."""
        parts = {name: self._whole(i) for i, (name, _) in enumerate(self._weights)}
        return parts if dist.get_rank() == 0 else {}

    def load(self, directory: Path) -> None:
        """Read it back; a checkpoint that was written without one begins anew from its weights."""
        path = directory / FILE
        whole = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        for average, (name, weight) in zip(self._average, self._weights, strict=True):
            average.copy_(self._part(whole[name], average) if name in whole else self._held(weight))

    def _held(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """What this worker holds of a weight."""
        return _deepspeeds(weight).ds_tensor.data if self._sharded else weight.data

    def _swap(self) -> None:
        for average, (_, weight) in zip(self._average, self._weights, strict=True):
            held = self._held(weight)
            training = held.float().clone()  # half precision there and back is exact
            held.copy_(average)
            average.copy_(training)

    def _whole(self, index: int) -> torch.Tensor:
        average, (_, weight) = self._average[index], self._weights[index]
        if not self._sharded:
            return average
        parts = torch.empty(average.numel() * dist.get_world_size(), device=average.device)
        dist.all_gather_into_tensor(parts, average)
        shaped = _deepspeeds(weight)
        return parts[: shaped.ds_numel].view(shaped.ds_shape)

    def _part(self, whole: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
        """This worker's shard; the last one is padded."""
        if not self._sharded:
            return whole
        begin = average.numel() * dist.get_rank()
        mine = whole.flatten()[begin : begin + average.numel()]
        return torch.nn.functional.pad(mine, (0, average.numel() - mine.numel()))


def _deepspeeds(weight: torch.nn.Parameter) -> Any:
    """With the attributes that ZeRO-3 gives a weight."""
    return weight
