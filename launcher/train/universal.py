"""Checkpoints that change their shape on the way in: other workers, or shards where there were none. Train workers.

DeepSpeed's universal format (arXiv:2406.18820) holds one file per parameter and optimizer state, `zero/NAME/fp32.pt`.
DeepSpeed writes and reads it for ZeRO's shards; without ZeRO every worker holds all, and the two functions here that
say "whole" stand in. `checkpoint.py` decides when a checkpoint takes this way.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

_MODEL_STATES = "mp_rank_00_model_states.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def from_shards(source: Path, target: Path, zero: int) -> None:
    """DeepSpeed's own conversion of ZeRO shards.

    Args:
        source: what `save_checkpoint` wrote.
        target: universal checkpoint to write.
        zero: stage of the source, 1 to 3.
    """
    from deepspeed.checkpoint import ds_to_universal

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


def from_whole(source: Path, target: Path, names: Sequence[str]) -> None:
    """A checkpoint without ZeRO as a universal one, for stages 1 and 2.

    Args:
        source: what `save_checkpoint` wrote.
        target: universal checkpoint to write.
        names: of the trained parameters, in the optimizer's order.
    """
    saved = torch.load(source / _MODEL_STATES, map_location="cpu", weights_only=False)
    optimizer = saved.pop("optimizer")
    for index, name in enumerate(names):
        state = optimizer["state"][index]
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        tensors = {"fp32": saved["module"][name], **{key: state[key] for key in _MOMENTS}}
        for key, tensor in tensors.items():
            torch.save({"param": tensor.clone()}, folder / f"{key}.pt")
        torch.save(state["step"].clone(), folder / "step.pt")
    shared = {"param_groups": optimizer["param_groups"], "ds_version": saved["ds_version"]}
    torch.save(shared, target / "zero" / "optimizer_state.pt")
    torch.save(saved, target / _MODEL_STATES)


def load_whole(source: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
    """A universal checkpoint of stage 1 or 2 into a model that is not sharded.

    Args:
        source: universal checkpoint.
        model: whose weights are replaced.
        optimizer: AdamW over the trained parameters themselves.
        names: of the trained parameters.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            folder, parameter = source / "zero" / name, parameters[name]
            parameter.copy_(_tensor(folder / "fp32.pt").view_as(parameter))
            moments = {key: _tensor(folder / f"{key}.pt").view_as(parameter).to(parameter) for key in _MOMENTS}
            step = torch.load(folder / "step.pt", weights_only=False)
            optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}


def load_buffers(source: Path, model: torch.nn.Module) -> None:
    """What is no parameter (BatchNorm's statistics): DeepSpeed leaves it out when it loads a universal checkpoint."""
    files = sorted(source.glob("*mp_rank_00_model_states.pt"))
    saved = torch.load(files[0], map_location="cpu", weights_only=False)["module"]
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def _tensor(file: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(file, map_location="cpu", weights_only=False)["param"]
    return tensor
