"""Bytes that the addition of gradients sends, beside a ring all-reduce. Runs under torchrun; `run.py` starts it.

Counted by the kernel on the loopback device, so nothing else may use it meanwhile.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.train.flat_gradients import FlatGradients

_ELEMENTS = 22_713_216  # MiniLM-L6
_ROUNDS = 3


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(_ELEMENTS))
    gradients = FlatGradients([weight], 1, dist.get_world_size())
    flat_N = torch.zeros(_ELEMENTS)
    tree = _bytes_of(gradients.all_reduce)
    ring = _bytes_of(
        lambda: [work.wait() for work in [dist.all_reduce(b, async_op=True) for b in flat_N.split(6_400_000)]]
    )
    if dist.get_rank() == 0:
        size = dist.get_world_size()
        least = 2 * (size - 1) * 4 * _ELEMENTS
        print(json.dumps({"workers": size, "over_all_reduce": tree / ring, "over_least": tree / least}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _bytes_of(exchange: Callable[[], object]) -> float:
    """Return the bytes of one exchange over all ranks."""
    exchange()
    dist.barrier()
    begun = _sent()
    for _ in range(_ROUNDS):
        exchange()
    dist.barrier()
    return (_sent() - begun) / _ROUNDS


def _sent() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    main()
