"""One rank of the doctor's all-reduces: an actor on a node, or on one GPU of it. Runs on every node.

Travels by value like `probes.py`; the groups are formed by `network.py`.
"""

import statistics
import time
from typing import Any  # torch.distributed's store, and plain JSON-like values

_LATENCY_ROUNDS = 30
_FIRST_BYTES = 2**18
_ROUNDS = 3


class Rank:
    """Joins one group after the other and times all-reduces as training does them."""

    def __init__(self) -> None:
        import torch.distributed  # the slow part: it happens while the driver waits for all ranks to be ready

        self._store: Any = None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def ready(self) -> str:
        """The device it works on."""
        return self._device

    def open(self, timeout_s: float) -> tuple[str, int]:
        """Begin a group as its rank 0: the address where the others meet it."""
        from datetime import timedelta

        import ray
        import torch.distributed as dist

        address = ray.util.get_node_ip_address()
        patience = timedelta(seconds=timeout_s)
        # The system finds a free port, and nobody can take it in between.
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)  # type: ignore[attr-defined]
        return address, self._store.port

    def join(self, meeting: tuple[str, int], rank: int, world: int, timeout_s: float) -> None:
        """Become a rank of the group. Raises what torch raises when the others cannot be reached."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        patience = timedelta(seconds=timeout_s)
        if rank > 0:
            self._store = dist.TCPStore(*meeting, is_master=False, timeout=patience)  # type: ignore[attr-defined]
        backend = "nccl" if self._device == "cuda" else "gloo"
        if dist.is_initialized():  # a group that never became whole
            dist.destroy_process_group()
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=world, timeout=patience)
        dist.all_reduce(torch.ones(1, device=self._device))  # NCCL connects at the first use only

    def measure(self, budget_s: float, max_bytes: int) -> dict[str, Any]:
        """Times of small and of growing messages, until a message takes a good part of the time there is."""
        latencies = [self._once(4) for _ in range(3 + _LATENCY_ROUNDS)][3:]
        size, seconds = _FIRST_BYTES, 0.0
        while True:
            seconds = self._agreed(min(self._once(size) for _ in range(_ROUNDS)))
            # The next size takes about four times as long, three times over.
            if size * 4 > max_bytes or seconds * 4 * _ROUNDS > budget_s:
                break
            size *= 4
        return {"num_bytes": size, "seconds": seconds, "latency_s": statistics.median(latencies)}

    def leave(self) -> None:
        """Out of the group, if in one."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

    def _once(self, num_bytes: int) -> float:
        """Seconds of one all-reduce of float32 values."""
        import torch
        import torch.distributed as dist

        tensor = torch.zeros(num_bytes // 4, device=self._device)
        dist.barrier()
        self._wait()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        self._wait()
        return time.perf_counter() - start

    def _agreed(self, seconds: float) -> float:
        """The slowest rank's time: all ranks must come to the same decision."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def _wait(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
