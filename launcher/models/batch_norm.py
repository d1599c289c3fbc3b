"""BatchNorm with statistics over the micro-batches of all ranks, or frozen ones. Runs in train workers.

Ordinary BatchNorm sees the micro-batch of one rank, so its result would depend on which rank has which samples.
`torch.nn.SyncBatchNorm` runs on GPUs only and cannot mask fillers; this one runs anywhere and masks them.
"""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """BatchNorm (Ioffe & Szegedy 2015, arXiv:1502.03167) with statistics over the micro-batches of all ranks."""

    mask: torch.Tensor | None = None
    """1.0 for a real sample and 0.0 for a filler, (B,). The engine sets it before each forward pass in training."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize an input (B, C, ...) per channel. Two collectives in training, and as many in the backward pass."""
        # Evaluations use running statistics: no collective, so ranks may have different numbers of batches.
        if not self.training:
            return super().forward(input)
        mask = input.new_ones(len(input)) if self.mask is None else self.mask.to(input.dtype)
        weight = mask.view(-1, *[1] * (input.dim() - 1))
        axes = [0, *range(2, input.dim())]
        # Trap: sums and count have the dtype of the input. In fp16 a channel with more than 65504 elements overflows.
        total, count = _sum_over_ranks((input * weight).sum(axes), mask.sum() * input[0, 0].numel())
        # The count is of real samples of all ranks, so a rank with fillers only is no division by 0.
        mean = total / count.clamp(min=1)
        shape = (1, -1, *[1] * (input.dim() - 2))
        # Two passes: the mean of squares minus the squared mean, in one, would cancel catastrophically.
        centred = input - mean.view(shape)
        # `count` is merged already, so its second sum is dropped.
        squares, _ = _sum_over_ranks((centred * centred * weight).sum(axes), count)
        variance = squares / count.clamp(min=1)
        self._update_running_stats(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale.view(shape) + self.bias.view(shape)

    def _update_running_stats(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        # Counted per forward pass: each micro-batch moves the statistics, so accumulation steps change them.
        self.num_batches_tracked.add_(1)
        # A cumulative average (momentum None) syncs with the device here; the usual fixed momentum does not.
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        # Stays a tensor: `.item()` would sync with the device. float64, as count - 1 is count in half precision.
        count = count.double()
        unbiased = (count / (count - 1).clamp(min=1)).to(variance.dtype)
        self.running_var.lerp_(variance * unbiased, rate)


def _sum_over_ranks(total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both sums over all ranks. Collective; its backward is one too, on the gradients of `total`."""
    if not (dist.is_available() and dist.is_initialized()):
        return total, count
    # One collective for both. This all_reduce is the differentiable one: `dist.all_reduce` would cut the gradient that
    # flows through the statistics to the samples of other ranks.
    both = all_reduce(torch.cat([total, count.detach().view(1)]))
    return both[:-1], both[-1].detach()


def find_batch_norms(model: torch.nn.Module) -> list[_BatchNorm]:
    """Return all BatchNorm layers of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def convert_to_sync_batch_norm(model: torch.nn.Module) -> None:
    """Replace every BatchNorm that is trained by `SyncBatchNorm`, in place; weights and statistics stay."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            if not all(p.requires_grad for p in child.parameters()):
                # Frozen (`model.freeze`): statistics stay pretrained too.
                continue
            layer = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            layer.load_state_dict(child.state_dict())
            setattr(model, name, layer)
        else:
            convert_to_sync_batch_norm(child)
