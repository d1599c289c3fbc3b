"""Gradients in flat fp32 buffers, added in one order for any number of workers. Runs in train workers.

The gradient of a global batch is the sum over its parts (virtual ranks), and floating-point sums depend on their order.
Here it is always that of one binary tree over the parts: (0 + 1) + (2 + 3) and so on. A worker adds its own parts as a
binary counter does, and `all_reduce` adds the workers' sums in rank order. Used by `engine.py` without ZeRO and with
ZeRO 1, where DeepSpeed adds in another order, copies every gradient to buckets and back, and without ZeRO accumulates
in half precision. The last functions work around DeepSpeed 0.19.8.
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
"""Elements per collective: 25 MiB in fp32, the bucket size of DDP."""
_LEAF = -1
"""Height of the sum over the micro-batches of a part that is not complete."""


class FlatGradients:
    """Gradient sums of some weights, in fp32.

    Each gradient is added as soon as a backward pass has computed it, and freed: those of the whole model never exist
    together. A buffer holds the sum of 2**height parts; between two passes there are log2(parts) of them, and one more
    if parts have several micro-batches.

    Args:
        weights: Weights whose gradients a backward pass computes, in fp32 or half precision, on one device.
        parts: Number of parts that this worker adds in each step.
        world_size: Number of workers.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter], parts: int, world_size: int) -> None:
        self._weights, self._world_size = list(weights), world_size
        self._height = (parts - 1).bit_length()
        # The last addition is made in place, so two parts need one buffer, as one part does.
        self._top = max(0, self._height - 1)
        self._views: dict[int, list[torch.Tensor]] = {}
        self._flat_N = self._allocate(self._top)
        # Sums of the sparse gradients of embeddings, by weight and height.
        self._sparse: dict[int, dict[int, torch.Tensor]] = {}
        self._part = 0
        self._is_last = True
        self._seen: set[int] = set()
        self._complete: set[int] = set()
        for index, weight in enumerate(self._weights):
            weight.register_post_accumulate_grad_hook(partial(self._take, index))

    @property
    def views(self) -> list[torch.Tensor]:
        """Return the gradient of each weight, as a view of the buffer that `finish` completes."""
        return self._views[self._top]

    def begin(self, is_last: bool) -> None:
        """Announce a backward pass of the current part, and whether it is the last one of that part."""
        self._is_last = is_last

    def end_part(self) -> None:
        """Complete the current part, in which some weights may have had no gradient."""
        for index in range(len(self._weights)):
            if index not in self._complete:
                self._add(index, None)
        self._part += 1
        self._seen.clear()
        self._complete.clear()

    def clear(self) -> None:
        """Forget the gradients of this step."""
        self._part = 0
        self._seen.clear()
        self._complete.clear()
        self._sparse.clear()

    def finish(self) -> None:
        """Complete the sum of this worker's parts."""
        # Only where the number of workers does not divide the parts: the tree is filled up with parts of zeros.
        while self._part < 1 << self._height:
            self._is_last = True
            self.end_part()
        for index, sums in self._sparse.items():
            view = self.views[index].zero_()
            for total in sums.values():
                # Coalesced: each row is there once.
                view.index_copy_(0, total.indices()[0], total.values())
        self.clear()

    def all_reduce(self) -> None:
        """Add the sums of all workers, in a tree over the ranks. Collective.

        Sends as many bytes as a ring all-reduce, which adds each piece in another order.
        """
        size = self._world_size
        if size == 1:
            return
        if size == 2:
            # a + b is b + a, so any algorithm gives the same bits. Gloo moves several buckets at once faster than one
            # large buffer: 60 instead of 85 ms for 90 MB.
            works = [dist.all_reduce(bucket, async_op=True) for bucket in self._flat_N.split(_BUCKET_ELEMENTS)]
            for work in works:
                work.wait()
            return
        exchanges, gathers = [], []
        for bucket in self._flat_N.split(_BUCKET_ELEMENTS // size * size):
            received = torch.empty_like(bucket)
            exchanges.append((bucket, received, dist.all_to_all_single(received, bucket, async_op=True)))
            # One exchange ahead of the additions: the buffers of all of them would double the memory.
            if len(exchanges) == 2:
                gathers.append(self._add_and_gather(*exchanges.pop(0)))
        gathers += [self._add_and_gather(*exchange) for exchange in exchanges]
        for work in gathers:
            work.wait()

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scale the gradient down to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

        Returns:
            L2 norm before clipping, scalar on the device: no host-device sync.
        """
        # Without the padding, whose size depends on the number of workers, as the order of the sum may on the size.
        flat_N = self._flat_N[: sum(weight.numel() for weight in self._weights)]
        norm: torch.Tensor = torch.linalg.vector_norm(flat_N)
        if max_norm is not None:
            # The factor stays a tensor: an `if` on the norm would make the host wait for the device.
            flat_N.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _add_and_gather(self, bucket: torch.Tensor, received: torch.Tensor, exchange: dist.Work) -> dist.Work:
        """Add this rank's piece of a bucket over all ranks, and send it to them."""
        exchange.wait()
        sums = list(received.view(self._world_size, -1))
        while len(sums) > 1:
            # An odd one out waits for the next level.
            sums = [sums[i].add_(sums[i + 1]) if i + 1 < len(sums) else sums[i] for i in range(0, len(sums), 2)]
        work: dist.Work = dist.all_gather_into_tensor(bucket, sums[0], async_op=True)
        return work

    def _allocate(self, height: int) -> torch.Tensor:
        sizes = [weight.numel() for weight in self._weights]
        padding = -sum(sizes) % self._world_size
        flat_N = torch.zeros(sum(sizes) + padding, dtype=torch.float32, device=self._weights[0].device)
        pieces = flat_N.split([*sizes, padding])
        self._views[height] = [piece.view_as(w) for piece, w in zip(pieces, self._weights, strict=False)]
        return flat_N

    def _view(self, height: int, index: int) -> torch.Tensor:
        # The sum of all parts shares a buffer with that of the first half.
        height = min(height, self._top)
        if height not in self._views:
            self._allocate(height)
        return self._views[height][index]

    def _take(self, index: int, weight: torch.Tensor) -> None:
        """Add the gradient of a weight, which a backward pass has just computed, and free it."""
        gradient = weight.grad
        # Without one, autograd hands over the next gradient instead of adding it to the old one: one pass less.
        weight.grad = None
        self._add(index, gradient)

    def _add(self, index: int, gradient: torch.Tensor | None) -> None:
        """Add a gradient to the current part, and its sum to the tree if the part is complete."""
        # The carry of a binary counter: the number of trailing ones.
        height = (~self._part & (self._part + 1)).bit_length() - 1
        if index in self._sparse or (gradient is not None and gradient.is_sparse):
            self._add_sparse(index, gradient, height)
            return
        terms = [] if gradient is None else [gradient]
        if index in self._seen:
            terms.insert(0, self._view(_LEAF if height else 0, index))
        if self._is_last:
            self._complete.add(index)
            terms += [self._view(i, index) for i in range(height)]
            _add_to(self._view(height, index), terms)
        else:
            self._seen.add(index)
            _add_to(self._view(_LEAF if height else 0, index), terms)

    def _add_sparse(self, index: int, gradient: torch.Tensor | None, height: int) -> None:
        sums = self._sparse.setdefault(index, {})
        heights = [_LEAF, *range(height)] if self._is_last else [_LEAF]
        terms = [] if gradient is None else [gradient.coalesce()]
        terms += [sums.pop(i) for i in heights if i in sums]
        if self._is_last:
            self._complete.add(index)
        if terms:
            total = terms[0]
            for term in terms[1:]:
                total = (total + term).coalesce()
            sums[height if self._is_last else _LEAF] = total


def _add_to(total: torch.Tensor, terms: Sequence[torch.Tensor]) -> None:
    """Set `total`, which may be one of the terms, to their sum from left to right."""
    if not terms:
        total.zero_()
        return
    *others, last = terms
    if not others:
        if last is not total:
            total.copy_(last)
        return
    first, *others = others
    for other in others:
        first = first + other
    torch.add(first, last, out=total)


def use_sparse_embedding_update(model: torch.nn.Module) -> None:
    """Make embeddings return sparse gradients, of the rows that were read. For models on the CPU.

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
