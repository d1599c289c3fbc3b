"""BatchNorm with statistics over one part of a global batch, or frozen ones. Runs in train workers.

Ordinary BatchNorm sees the micro-batch of one rank, so its result would depend on which rank has which samples. The
parts of a global batch (virtual ranks) are the same for any number of ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


class PartBatchNorm(_BatchNorm):
    """BatchNorm (Ioffe & Szegedy 2015, arXiv:1502.03167) with statistics over a micro-batch of a part.

    Statistics of smaller batches than the gradient's are ghost batch normalization (Hoffer et al. 2017,
    arXiv:1705.08741). The running statistics move once a step, by the mean of those of all parts.
    """

    part: int = -1
    """Part of the next forward pass; -1 for one that does not count. The engine sets it."""
    sums: torch.Tensor | None = None
    """Mean, unbiased variance and number of this step's micro-batches, summed for each part, float32 (V, 2C + 1)."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize an input (B, C, ...) per channel."""
        if not self.training:
            return super().forward(input)
        dtype = input.dtype if self.weight is None else self.weight.dtype
        mean, variance = (input.new_zeros(self.num_features, dtype=dtype) for _ in range(2))
        # With a momentum of 1 the statistics of the input replace these zeros.
        output = torch.batch_norm(
            input, self.weight, self.bias, mean, variance, True, 1.0, self.eps, torch.backends.cudnn.enabled
        )
        if self.sums is not None and self.part >= 0:
            # One number per channel has no unbiased variance.
            row = torch.cat([mean, variance.nan_to_num(0.0, 0.0, 0.0), mean.new_ones(1)])
            self.sums[self.part] += row.float()
        return output

    def move_running_statistics(self) -> None:
        """Move the running statistics by those of this step, whose `sums` are complete, and begin the next step."""
        assert self.sums is not None
        # One part after the other: a sum over the axis may take another order on another device.
        total = self.sums[0].clone()
        for part in self.sums[1:]:
            total += part
        self.sums.zero_()
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        mean, variance, count = total.split([self.num_features, self.num_features, 1])
        self.num_batches_tracked.add_(1)
        # A cumulative average (momentum None) syncs with the device here; the usual fixed momentum does not.
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            # A step whose rows were all skipped has no micro-batch, and moves nothing.
            moved = torch.where(count > 0, value / count.clamp(min=1), running.float())
            running.copy_(running.float().lerp(moved, rate))


def add_over_ranks(layers: Sequence[PartBatchNorm]) -> None:
    """Complete the sums of all parts, of which each rank has its own. Collective."""
    if not layers or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    sums = [layer.sums for layer in layers if layer.sums is not None]
    # One collective for all layers. It adds to zeros, as each part is of one rank, and so rounds nothing.
    merged = torch.cat(sums, 1)
    dist.all_reduce(merged)
    for own, complete in zip(sums, merged.split([own.shape[1] for own in sums], 1), strict=True):
        own.copy_(complete)


def find_batch_norms(model: torch.nn.Module) -> list[_BatchNorm]:
    """Return all BatchNorm layers of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def convert_to_part_batch_norm(model: torch.nn.Module) -> None:
    """Replace every BatchNorm that is trained by `PartBatchNorm`, in place; weights and statistics stay."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            if not all(p.requires_grad for p in child.parameters()):
                # Frozen (`model.freeze`): statistics stay pretrained too.
                continue
            layer = PartBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            layer.load_state_dict(child.state_dict())
            setattr(model, name, layer)
        else:
            convert_to_part_batch_norm(child)
