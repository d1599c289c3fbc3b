"""Checkpoints that change their shape on the way in: other workers, or shards where there were none. Train workers.

DeepSpeed's universal format (arXiv:2406.18820) holds one file per parameter and optimizer state, `zero/NAME/fp32.pt`.
DeepSpeed writes and reads it for ZeRO's shards; without ZeRO every worker holds all, and the two functions here that
say "whole" stand in. The format knows Adam's states alone, so those of another optimizer travel under their names.
`train/checkpoint/reader.py` decides when a checkpoint takes this way.
"""

import os
from argparse import Namespace
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import torch

_MODEL_STATES = "mp_rank_00_model_states.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")
State = MutableMapping[str, object]
Moments = Mapping[str, str]
"""An optimizer's own names of its states, and under which of `_MOMENTS` each travels."""

# By `train.optimizer.type`; what is missing here cannot change its shape.
MOMENTS: Mapping[str, Moments] = {"adamw": {name: name for name in _MOMENTS}, "sgd": {"momentum_buffer": "exp_avg"}}


def convert_from_shards(source: Path, target: Path, zero: int, moments: Moments) -> None:
    """DeepSpeed's own conversion of ZeRO shards.

    Args:
        source: what `save_checkpoint` wrote.
        target: universal checkpoint to write.
        zero: stage of the source, 1 to 3.
        moments: of the optimizer.
    """
    from deepspeed.checkpoint import ds_to_universal

    if set(moments) != set(_MOMENTS):
        source = _under_adams_names(source, target.parent / "renamed", zero, moments)
    target.parent.mkdir(parents=True, exist_ok=True)
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=zero < 3,
        )
    )


def _under_adams_names(source: Path, target: Path, zero: int, moments: Moments) -> Path:
    """The same shards with the states that DeepSpeed's conversion wants; all but the optimizer's files are links."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if not file.name.endswith("_optim_states.pt"):
            os.symlink(file.resolve(), target / file.name)
            continue
        saved = torch.load(file, map_location="cpu", weights_only=True)
        shards = saved["optimizer_state_dict"]
        inner, flat = ("optimizer_state_dict", "fp32_flat_groups") if zero == 3 else _FLAT_BELOW_3
        state, paddings = shards[inner]["state"], shards.get(_PADDINGS, [0] * len(shards[flat]))
        # Weights are saved without what fills a shard up, states with it.
        sizes = [part.numel() + padding for part, padding in zip(shards[flat], paddings, strict=True)]
        shards[inner]["state"] = {i: _renamed(state.get(i, {}), size, moments) for i, size in enumerate(sizes)}
        torch.save(saved, target / file.name)
    return target


_PADDINGS = "group_paddings"
_FLAT_BELOW_3 = ("base_optimizer_state", "single_partition_of_fp32_groups")


def _renamed(state: Mapping[str, torch.Tensor], size: int, moments: Moments) -> State:
    """A flat shard's states by Adam's names; zeros where the optimizer has none, or has not stepped yet."""
    nothing = torch.zeros(1).expand(size)
    found = {there: state[here] for here, there in moments.items() if state.get(here) is not None}
    return {"step": torch.tensor(0.0), **dict.fromkeys(_MOMENTS, nothing), **found}


def rename_moments(state: State, moments: Moments) -> None:
    """Give an optimizer, that was loaded from a universal checkpoint, its states under its own names."""
    if set(moments) == set(_MOMENTS):
        return
    found = {here: state[there] for here, there in moments.items()}
    state.clear()
    state.update(found)


def convert_from_full(source: Path, target: Path, names: Sequence[str], moments: Moments) -> None:
    """A checkpoint without ZeRO as a universal one, for stages 1 and 2.

    Args:
        source: what `save_checkpoint` wrote.
        target: universal checkpoint to write.
        names: of the trained parameters, in the optimizer's order.
        moments: of the optimizer.
    """
    saved = torch.load(source / _MODEL_STATES, map_location="cpu", weights_only=True)
    optimizer = saved.pop("optimizer")
    weights = [saved["module"][name] for name in names]
    if "fp32_groups" in optimizer:  # half precision: the masters of the weights, in the optimizer's order
        weights = [weight for group in optimizer["fp32_groups"] for weight in group]
        optimizer = optimizer["optimizer_state_dict"]
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        state = optimizer["state"].get(index, {})
        if "step" not in state:
            state = _renamed(state, weight.numel(), moments)
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        tensors = {"fp32": weight.detach(), **{key: state[key].view_as(weight) for key in _MOMENTS}}
        for key, tensor in tensors.items():
            torch.save({"param": tensor.clone()}, folder / f"{key}.pt")
        torch.save(state["step"].clone(), folder / "step.pt")
    shared = {"param_groups": optimizer["param_groups"], "ds_version": saved["ds_version"]}
    torch.save(shared, target / "zero" / "optimizer_state.pt")
    torch.save(saved, target / _MODEL_STATES)


def load_full(
    source: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str], moments: Moments
) -> None:
    """A universal checkpoint of stage 1 or 2 into a model that is not sharded.

    Args:
        source: universal checkpoint.
        model: whose weights are replaced.
        optimizer: Optimizer of the trained parameters themselves, or of their fp32 masters.
        names: of the trained parameters.
        moments: of the optimizer.
    """
    halves = dict(model.named_parameters())
    stepped = [weight for group in optimizer.param_groups for weight in group["params"]]
    with torch.no_grad():
        for name, parameter in zip(names, stepped, strict=True):
            folder = source / "zero" / name
            parameter.copy_(_tensor(folder / "fp32.pt").view_as(parameter))
            halves[name].copy_(parameter)  # itself, where there are no masters
            states = {key: _tensor(folder / f"{key}.pt").view_as(parameter).to(parameter) for key in _MOMENTS}
            step = torch.load(folder / "step.pt", weights_only=True)
            optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **states}
            rename_moments(optimizer.state[parameter], moments)


def load_buffers(source: Path, model: torch.nn.Module) -> None:
    """What is no parameter (BatchNorm's statistics): DeepSpeed leaves it out when it loads a universal checkpoint."""
    files = sorted(source.glob("*mp_rank_00_model_states.pt"))
    saved = torch.load(files[0], map_location="cpu", weights_only=True)["module"]
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def _tensor(file: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(file, map_location="cpu", weights_only=True)["param"]
    return tensor
