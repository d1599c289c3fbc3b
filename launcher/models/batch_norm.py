"""BatchNorm under the promise: frozen statistics, or statistics over all workers. Runs in train workers.

Ordinary BatchNorm sees one worker's micro-batch, so its result would depend on how a global batch is cut.
`torch.nn.SyncBatchNorm` runs on GPUs only and cannot leave fillers out; this one does both.
"""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """BatchNorm (Ioffe & Szegedy 2015, arXiv:1502.03167) with statistics over the micro-batches of all workers."""

    mask: torch.Tensor | None = None
    """(B,) 1.0 for each sample that counts; set before a forward pass in training."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) to the same shape, normalised per channel."""
        if not self.training:
            return super().forward(input)
        mask = input.new_ones(len(input)) if self.mask is None else self.mask.to(input.dtype)
        weight = mask.view(-1, *[1] * (input.dim() - 1))
        axes = [0, *range(2, input.dim())]
        total, count = _over_workers((input * weight).sum(axes), mask.sum() * input[0, 0].numel())
        mean = total / count.clamp(min=1)
        shape = (1, -1, *[1] * (input.dim() - 2))
        centred = input - mean.view(shape)
        squares, _ = _over_workers((centred * centred * weight).sum(axes), count)  # the count is summed already
        variance = squares / count.clamp(min=1)
        self._remember(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale.view(shape) + self.bias.view(shape)

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        count = count.double()  # a tensor still: a number would make the host wait
        unbiased = (count / (count - 1).clamp(min=1)).to(variance.dtype)
        self.running_var.lerp_(variance * unbiased, rate)


def _over_workers(total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over all workers, with gradients through them."""
    if not (dist.is_available() and dist.is_initialized()):
        return total, count
    both = all_reduce(torch.cat([total, count.detach().view(1)]))
    return both[:-1], both[-1].detach()


def batch_norms(model: torch.nn.Module) -> list[_BatchNorm]:
    """All the BatchNorm layers of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def synchronize(model: torch.nn.Module) -> None:
    """Put `SyncBatchNorm` in the place of every BatchNorm that is trained; weights and statistics stay."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            if not all(p.requires_grad for p in child.parameters()):
                continue  # `model.freeze`: pretrained statistics as well as weights
            layer = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            layer.load_state_dict(child.state_dict())
            setattr(model, name, layer)
        else:
            synchronize(child)
