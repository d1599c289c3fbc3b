"""Parameter groups of the optimizer: who is decayed, and how fast each depth learns. Runs in train workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from launcher.errors import RunError
from launcher.models.layers import depths, find_stack
from launcher.spec.job import JobSpec
from launcher.spec.train import TrainSpec


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are treated alike."""

    parameters: tuple[torch.nn.Parameter, ...]
    names: tuple[str, ...]
    weight_decay: float
    scale: float
    """Of the learning rate."""

    def as_dict(self) -> dict[str, object]:
        """As torch's optimizers take it."""
        return {"params": list(self.parameters), "weight_decay": self.weight_decay}


def parameter_groups(model: torch.nn.Module, train: TrainSpec) -> list[ParamGroup]:
    """Weight matrices are decayed, biases, norms and other vectors are not; with `layer_decay` so for each depth.

    Raises:
        ModelError: the model's layers cannot be told.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = dict.fromkeys((name for name, _ in trained), 1.0)
    if train.layer_decay is not None:
        stack = find_stack(model, "train.layer_decay")
        depth = depths(model, stack)
        scales = {name: train.layer_decay ** (stack.layers + 1 - depth[name]) for name in scales}
    groups = []
    for scale in sorted(set(scales.values())):
        for is_matrix, decay in ((True, train.optimizer.weight_decay), (False, 0.0)):
            members = [(name, p) for name, p in trained if scales[name] == scale and (p.dim() >= 2) == is_matrix]
            if members:
                names, parameters = zip(*members, strict=True)
                groups.append(ParamGroup(parameters, names, decay, scale))
    return groups


def check_shardable(groups: Sequence[ParamGroup], workers: int) -> None:
    """Refuse to deal a universal checkpoint to shards of which one would hold nothing of a group.

    DeepSpeed 0.19.8 (load_hp_checkpoint_state_from_checkpoint_dir) looks for the step among the parameters of the
    shard, and ends in an IndexError where it has none: the bias of a head with two classes, dealt to three workers.

    Raises:
        RunError: there is such a group; the same on all workers.
    """
    for group in groups:
        numbers = sum(p.numel() for p in group.parameters)
        shard = 2 * -(-numbers // (2 * workers))  # shards begin at even places
        if shard * (workers - 1) >= numbers:
            raise RunError(
                f"the checkpoint cannot be dealt to {workers} workers in shards: {', '.join(group.names[:3])} have "
                f"{numbers} numbers in all, which is too few; set parallel.zero: 0 to go on"
            )


def bitsandbytes_optimizer(job: JobSpec) -> Callable[[object], torch.optim.Optimizer] | None:
    """Return the builder of an optimizer that DeepSpeed does not know by name, or None; see `deepspeed_config.py`."""
    chosen = job.train.optimizer
    if chosen.type != "adamw_8bit":
        return None
    from bitsandbytes.optim import AdamW8bit  # `driver/prepare.py` has looked whether it is installed

    return partial(AdamW8bit, lr=job.train.learning_rate, betas=(chosen.beta1, chosen.beta2), eps=chosen.eps)
