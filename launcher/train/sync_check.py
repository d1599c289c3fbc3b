"""Check that all workers hold the same weights (`train.sync_check_steps`). Runs in train workers; used by `loop.py`."""

import hashlib

import numpy as np
import torch
import torch.distributed as dist

from launcher.errors import WeightDivergenceError
from launcher.train.engine import Engine

# Integers of a weight's bits, by the bytes of an element.
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
_DIGEST_ELEMENTS = 1 << 20
"""Elements of a weight that `digest_weights` converts at a time."""


def check_sync(engine: Engine, step: int) -> None:
    """Check that all ranks hold the same weights. Collective; a host-device sync per weight.

    Args:
        engine: Engine of this rank.
        step: Number of optimizer steps completed.

    Raises:
        WeightDivergenceError: They differ; names the ranks.
    """
    if engine.world_size == 1:
        return
    # A tensor on the device, as NCCL gathers nothing else. A copy, as torch warns about read-only memory.
    local = torch.from_numpy(np.frombuffer(digest_weights(engine), dtype=np.int64).copy()).to(engine.device)
    gathered = [torch.empty_like(local) for _ in range(engine.world_size)]
    dist.all_gather(gathered, local)
    digests = [tuple(digest.tolist()) for digest in gathered]
    # Without a majority, as with two ranks, the first digest counts as right. The rank named may be the wrong one.
    most_common = max(digests, key=digests.count)
    diverged = [str(rank) for rank, digest in enumerate(digests) if digest != most_common]
    if diverged:
        raise WeightDivergenceError(
            f"after step {step} rank {', '.join(diverged)} of {engine.world_size} holds other weights than the rest: "
            "the workers have diverged; check that all nodes run the same versions and healthy hardware"
        )


def digest_weights(engine: Engine) -> bytes:
    """Return a SHA-256 of the weights that every rank holds whole: under ZeRO-3 only the small ones."""
    digest = hashlib.sha256()
    for name, tensor in engine.model.named_parameters():
        if engine.zero == 3 and not getattr(tensor, "ds_persist", False):
            continue
        digest.update(name.encode())
        # A sum of the raw bits, weighted by position, detects any flipped bit and moves 8 bytes to the CPU. In chunks:
        # as int64, a large embedding would take four times its own memory.
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for number, chunk in enumerate(bits.flatten().split(_DIGEST_ELEMENTS)):
            begin = number * _DIGEST_ELEMENTS + 1
            positions = torch.arange(begin, begin + len(chunk), device=bits.device)
            total += (chunk.to(torch.int64) * positions).sum()
        digest.update(int(total.item()).to_bytes(8, "little", signed=True))
    return digest.digest()
