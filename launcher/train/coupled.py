"""Losses that couple the rows of a global batch (in-batch negatives, KTO's KL), computed in two passes.

GradCache (Gao et al. 2021, arXiv:2101.06983): the first pass computes the outputs of all micro-batches without
gradients and gathers them from all ranks; the loss of the global batch and its gradient with respect to the outputs are
then the same everywhere; the second pass repeats each micro-batch with gradients and propagates its part. So the loss
depends neither on the micro-batch nor on the number of workers. Runs in train workers; used by `loop.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from launcher.data.rank_batches import GlobalBatch, Part, collate
from launcher.tasks.base import Task
from launcher.tasks.samples import Outputs
from launcher.train.engine import Engine


@dataclass(frozen=True)
class GatheredOutputs:
    """Outputs of all N rows of a global batch, equal on all ranks.

    Args:
        outputs: Tensors (N, ...) by name, ordered by row id; floats are float32.
        own: Position among the N of each row of this rank, int64 (n,).
    """

    outputs: Mapping[str, torch.Tensor]
    own: torch.Tensor


def coupled_forward_backward(
    engine: Engine, task: Task, parts: Sequence[Part], global_batch: GlobalBatch, step: int
) -> torch.Tensor:
    """Accumulate this rank's gradient of a coupled loss; arguments as in `loop.forward_backward`. Collective.

    Returns:
        Sum of the losses of each part's rows, as in `loop.forward_backward`.
    """
    numbered = _number(parts)
    gathered = gather_batch_outputs(engine, task, parts, global_batch, step)
    leaves = {name: tensor.requires_grad_() for name, tensor in gathered.outputs.items() if tensor.is_floating_point()}
    losses_N = task.coupled_losses(gathered.outputs)
    # An output that only steers the loss (a label, a constant reference) has no gradient.
    gradients = torch.autograd.grad(losses_N.sum(), list(leaves.values()), allow_unused=True)
    own = {name: grad[gathered.own] for name, grad in zip(leaves, gradients, strict=True) if grad is not None}
    own_losses = losses_N.detach()[gathered.own]
    part_losses = empty_part_losses(engine, global_batch)
    begin = 0
    for part, number, samples in numbered:
        # The noise of the first pass: with another dropout mask the gradient would belong to other outputs.
        engine.seed(step, part.index, number)
        batch = collate(task, samples, global_batch).to(engine.device)
        outputs = engine.forward(task, batch, part.index)
        end = begin + len(row_ids(samples))
        # The gradient of this product is the chain rule. A filler has no rows and gets zeros; it runs all the same, as
        # the backward pass is a collective under ZeRO 2 and 3.
        terms = [(outputs[name][: end - begin].float() * grad[begin:end]).sum() for name, grad in own.items()]
        engine.backward(torch.stack(terms).sum(), global_batch.divisor, number == len(part.micro_batches))
        source = None if batch.source is None else batch.source[: end - begin]
        add_losses(part_losses[part.index], own_losses[begin:end], source)
        begin = end
    return part_losses


def gather_batch_outputs(
    engine: Engine, task: Task, parts: Sequence[Part], global_batch: GlobalBatch, step: int
) -> GatheredOutputs:
    """Run the first pass: compute the outputs of a global batch without gradients. Collective.

    Arguments as in `loop.forward_backward`.
    """
    numbered = _number(parts)
    outputs = []
    with torch.no_grad():
        for part, number, samples in numbered:
            engine.seed(step, part.index, number)
            # Without its part: BatchNorm counts the second pass alone.
            whole = engine.forward(task, collate(task, samples, global_batch).to(engine.device))
            outputs.append(without_fillers(whole, samples))
    rows = [row for _, _, samples in numbered for row in row_ids(samples)]
    # Collective: a rank that ran out of memory above never gets here, so such a step cannot be repeated in place.
    return gather_outputs(concatenate(outputs), rows)


def _number(parts: Sequence[Part]) -> list[tuple[Part, int, pa.Table]]:
    """Return each micro-batch with its part and its number there, from 1."""
    return [(part, i, samples) for part in parts for i, samples in enumerate(part.micro_batches, 1)]


def empty_part_losses(engine: Engine, global_batch: GlobalBatch) -> torch.Tensor:
    """Return zeros for the losses of each part by source, (V, sources); one source without a mixture."""
    return torch.zeros(engine.virtual_ranks, max(1, len(global_batch.source_weights)), device=engine.device)


def add_losses(losses_S: torch.Tensor, losses_B: torch.Tensor, source_B: torch.Tensor | None) -> None:
    """Add losses to the sums of their sources, in place. No host-device sync."""
    if source_B is None:
        losses_S += losses_B.sum()
    else:
        losses_S.index_add_(0, source_B, losses_B.to(losses_S.dtype))


def row_ids(samples: pa.Table) -> list[int]:
    """Return the row ids of a micro-batch without its fillers."""
    return [row for row in samples.column("__row").to_pylist() if row >= 0]


def without_fillers(outputs: Outputs, samples: pa.Table) -> dict[str, torch.Tensor]:
    """Return the outputs of the rows of a micro-batch, which holds rows or one filler, never both."""
    rows = len(row_ids(samples))
    return {name: tensor.detach()[:rows] for name, tensor in outputs.items()}


def concatenate(parts: Sequence[Outputs]) -> dict[str, torch.Tensor]:
    """Return the outputs of several micro-batches as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def gather_outputs(outputs: Outputs, rows: Sequence[int]) -> GatheredOutputs:
    """Gather the outputs of a global batch from all ranks. Collective.

    Args:
        outputs: Outputs of this rank's n rows, (n, ...) each; n differs between ranks, the other sizes do not.
        rows: Row ids of those rows.
    """
    names = sorted(outputs)
    device = outputs[names[0]].device
    ids = torch.tensor(rows, dtype=torch.int64, device=device)
    counts = [len(rows)]
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if world_size > 1:
        sizes = torch.zeros(world_size, dtype=torch.int64, device=device)
        sizes[rank] = len(rows)
        dist.all_reduce(sizes)
        # A host-device sync: the sizes decide how much is gathered.
        counts = sizes.tolist()

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if world_size == 1:
            return tensor.clone()
        # all_gather needs equal shapes, so each rank's part is padded to the largest.
        padding = [0, 0] * (tensor.dim() - 1) + [0, max(counts) - len(tensor)]
        own = pad(tensor, padding).contiguous()
        parts = [torch.empty_like(own) for _ in counts]
        dist.all_gather(parts, own)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    # By row id: sums over the batch then have one order for any number of ranks and any micro-batch.
    order = gather(ids).argsort(stable=True)
    begin = sum(counts[:rank])
    own = order.argsort()[begin : begin + len(rows)]
    return GatheredOutputs({name: gather(outputs[name])[order] for name in names}, own)
