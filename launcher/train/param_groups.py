"""Parameter groups of the optimizer: weight decay, and the learning rate of each layer. Runs in train workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from launcher.errors import RunError
from launcher.models.layers import find_stack, parameter_depths
from launcher.spec.job import JobSpec
from launcher.spec.train import TrainSpec


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with the same weight decay and learning rate."""

    parameters: tuple[torch.nn.Parameter, ...]
    names: tuple[str, ...]
    weight_decay: float
    scale: float
    """Factor of the learning rate."""

    def as_dict(self) -> dict[str, object]:
        """Return the group in the form of torch's optimizers."""
        return {"params": list(self.parameters), "weight_decay": self.weight_decay}


def build_param_groups(model: torch.nn.Module, train: TrainSpec) -> list[ParamGroup]:
    """Group the trained parameters: matrices decay, vectors (biases, norms) do not; one pair of groups per depth.

    Without `layer_decay` all depths have the same learning rate, and there is one pair.

    Raises:
        ModelError: `layer_decay` is set, and the model's layers cannot be identified.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = dict.fromkeys((name for name, _ in trained), 1.0)
    if train.layer_decay is not None:
        stack = find_stack(model, "train.layer_decay")
        depth = parameter_depths(model, stack)
        scales = {name: train.layer_decay ** (stack.layers + 1 - depth[name]) for name in scales}
    groups = []
    # Sorted: checkpoints hold optimizer states by the position of group and weight, so every attempt and every rank
    # must build the same order.
    for scale in sorted(set(scales.values())):
        for is_matrix, decay in ((True, train.optimizer.weight_decay), (False, 0.0)):
            # By shape: names of biases and norms differ between architectures, but all of them are vectors.
            members = [(name, p) for name, p in trained if scales[name] == scale and (p.dim() >= 2) == is_matrix]
            # DeepSpeed drops empty groups (runtime/engine.py), and `engine.py` pairs its groups with these by position.
            if members:
                names, parameters = zip(*members, strict=True)
                groups.append(ParamGroup(parameters, names, decay, scale))
    return groups


def check_shardable(groups: Sequence[ParamGroup], workers: int) -> None:
    """Check that every shard of a universal checkpoint holds a part of every group.

    DeepSpeed 0.19.8 (load_hp_checkpoint_state_from_checkpoint_dir) reads the step count from the parameters of a shard,
    and raises an IndexError for a shard without any: the bias of a head with two classes, split over three workers.

    Raises:
        RunError: A group is too small; the same on all ranks.
    """
    for group in groups:
        elements = sum(p.numel() for p in group.parameters)
        # Shards start at even offsets (runtime/zero/stage_1_and_2.py, nccl_start_alignment_factor).
        shard = 2 * -(-elements // (2 * workers))
        if shard * (workers - 1) >= elements:
            raise RunError(
                f"the checkpoint cannot be split into shards for {workers} workers: {', '.join(group.names[:3])} have "
                f"{elements} elements in all, which is too few; set parallel.zero: 0 to resume"
            )


def bitsandbytes_optimizer(job: JobSpec) -> Callable[[object], torch.optim.Optimizer] | None:
    """Return a function that builds the 8-bit optimizer, which DeepSpeed does not know by name; None for all others."""
    optimizer = job.train.optimizer
    if optimizer.type != "adamw_8bit":
        return None
    # An optional dependency; `driver/prepare.py` has checked that it is installed.
    from bitsandbytes.optim.adamw import AdamW8bit

    betas = (optimizer.beta1, optimizer.beta2)
    # Without weight decay, which every parameter group has on its own.
    return partial(AdamW8bit, lr=job.train.learning_rate, betas=betas, eps=optimizer.eps)
