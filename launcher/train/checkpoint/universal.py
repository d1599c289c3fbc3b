"""Conversion of checkpoints to another number of workers, or between sharded and whole states. Runs in train workers.

DeepSpeed's universal format (arXiv:2406.18820) has one file per parameter and optimizer state, `zero/NAME/fp32.pt`.
DeepSpeed converts and loads it with ZeRO only. Without ZeRO every rank holds all states, and `convert_from_full` and
`load_full` do the same. The format knows Adam's states only, so other optimizers' states are renamed on the way.
`reader.py` decides when a checkpoint is converted.
"""

import os
from argparse import Namespace
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import torch

_MODEL_STATES = "mp_rank_00_model_states.pt"
_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_PADDINGS = "group_paddings"
State = MutableMapping[str, object]
Moments = Mapping[str, str]
"""Name of an optimizer's state -> name in `_ADAM_MOMENTS` that it has in the universal format."""

# By `train.optimizer.type`. Checkpoints of other optimizers cannot be converted.
MOMENTS: Mapping[str, Moments] = {
    "adamw": {name: name for name in _ADAM_MOMENTS},
    "sgd": {"momentum_buffer": "exp_avg"},
}


def convert_from_shards(source: Path, target: Path, zero: int, moments: Moments) -> None:
    """Convert ZeRO shards with DeepSpeed's own converter.

    Args:
        source: Directory that `save_checkpoint` wrote.
        target: Directory of the universal checkpoint to write.
        zero: ZeRO stage of the source, 1 to 3.
        moments: Names of the optimizer's states.
    """
    from deepspeed.checkpoint import ds_to_universal

    if set(moments) != set(_ADAM_MOMENTS):
        # The converter knows Adam's states alone, by their names.
        source = _rename_shards(source, target.parent / "renamed", zero, moments)
    target.parent.mkdir(parents=True, exist_ok=True)
    ds_to_universal.main(
        # One worker runs in this process (ds_to_universal.py, _do_parallel_work). More would be forked off a process
        # that has threads, a CUDA context and a process group.
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            # Otherwise an assertion asks for a description that the client has saved. Stage 3 takes another path.
            inject_missing_state=zero < 3,
        )
    )


def _rename_shards(source: Path, target: Path, zero: int, moments: Moments) -> Path:
    """Write the shards under Adam's names, as DeepSpeed's converter expects; files without states become links."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if not file.name.endswith("_optim_states.pt"):
            os.symlink(file.resolve(), target / file.name)
            continue
        saved = torch.load(file, map_location="cpu", weights_only=True)
        shards = saved["optimizer_state_dict"]
        inner = shards["optimizer_state_dict" if zero == 3 else "base_optimizer_state"]
        flat = shards["fp32_flat_groups" if zero == 3 else "single_partition_of_fp32_groups"]
        paddings = shards.get(_PADDINGS, [0] * len(flat))
        # DeepSpeed saves the weights of a shard without its padding, and the states with it.
        sizes = [part.numel() + padding for part, padding in zip(flat, paddings, strict=True)]
        states = inner["state"]
        inner["state"] = {i: _with_adam_names(states.get(i, {}), size, moments) for i, size in enumerate(sizes)}
        torch.save(saved, target / file.name)
    return target


def _with_adam_names(state: Mapping[str, torch.Tensor], size: int, moments: Moments) -> State:
    """Return a flat shard's states under Adam's names; zeros where the optimizer has none or has not stepped yet."""
    # `torch.save` writes the storage of a view, here a single number.
    zeros = torch.zeros(1).expand(size)
    renamed = {adam: state[own] for own, adam in moments.items() if state.get(own) is not None}
    return {"step": torch.tensor(0.0), **dict.fromkeys(_ADAM_MOMENTS, zeros), **renamed}


def rename_moments(state: State, moments: Moments) -> None:
    """Rename states that were loaded from a universal checkpoint to the optimizer's own names, in place."""
    if set(moments) == set(_ADAM_MOMENTS):
        return
    renamed = {own: state[adam] for own, adam in moments.items()}
    state.clear()
    state.update(renamed)


def convert_from_full(source: Path, target: Path, names: Sequence[str], moments: Moments) -> None:
    """Convert a checkpoint without ZeRO for loading with stage 1 or 2.

    Args:
        source: Directory that `save_checkpoint` wrote.
        target: Directory of the universal checkpoint to write.
        names: Names of the trained parameters, in the optimizer's order.
        moments: Names of the optimizer's states.
    """
    saved = torch.load(source / _MODEL_STATES, map_location="cpu", weights_only=True)
    optimizer = saved.pop("optimizer")
    weights = [saved["module"][name] for name in names]
    # Half precision: the fp32 master weights, in the optimizer's order.
    if "fp32_groups" in optimizer:
        weights = [weight for group in optimizer["fp32_groups"] for weight in group]
        optimizer = optimizer["optimizer_state_dict"]
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        state = optimizer["state"].get(index, {})
        if "step" not in state:
            state = _with_adam_names(state, weight.numel(), moments)
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        tensors = {"fp32": weight.detach(), **{key: state[key].view_as(weight) for key in _ADAM_MOMENTS}}
        for key, tensor in tensors.items():
            # A clone: `torch.save` writes the whole storage of a view.
            torch.save({"param": tensor.clone()}, folder / f"{key}.pt")
        torch.save(state["step"].clone(), folder / "step.pt")
    shared = {"param_groups": optimizer["param_groups"], "ds_version": saved["ds_version"]}
    torch.save(shared, target / "zero" / "optimizer_state.pt")
    torch.save(saved, target / _MODEL_STATES)


def load_full(
    source: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str], moments: Moments
) -> None:
    """Load a universal checkpoint of stage 1 or 2 into a model without ZeRO.

    Args:
        source: Directory of the universal checkpoint.
        model: Model whose weights are replaced.
        optimizer: Optimizer of the trained parameters, or of their fp32 master weights.
        names: Names of the trained parameters, in the optimizer's order.
        moments: Names of the optimizer's states.
    """
    weights = dict(model.named_parameters())
    stepped = [weight for group in optimizer.param_groups for weight in group["params"]]
    with torch.no_grad():
        for name, parameter in zip(names, stepped, strict=True):
            folder = source / "zero" / name
            parameter.copy_(_load_tensor(folder / "fp32.pt").view_as(parameter))
            # The half-precision weight; the weight itself in fp32.
            weights[name].copy_(parameter)
            states = {key: _load_tensor(folder / f"{key}.pt").view_as(parameter).to(parameter) for key in _ADAM_MOMENTS}
            step = torch.load(folder / "step.pt", weights_only=True)
            # A step tensor for each weight: torch's optimizers add to it in place, for a shared one once per weight.
            optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **states}
            rename_moments(optimizer.state[parameter], moments)


def load_buffers(source: Path, model: torch.nn.Module) -> None:
    """Load a model's buffers (BatchNorm statistics), which DeepSpeed skips in a universal checkpoint."""
    # Any of them: buffers are equal on all ranks.
    files = sorted(source.glob(f"*{_MODEL_STATES}"))
    saved = torch.load(files[0], map_location="cpu", weights_only=True)["module"]
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def _load_tensor(file: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(file, map_location="cpu", weights_only=True)["param"]
    return tensor
