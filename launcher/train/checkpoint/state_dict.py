"""State trees that DeepSpeed would save, without its copies and files. Runs in train workers.

`engine.py` asks for them, `writer.py` writes them, `reader.py` loads them with DeepSpeed's own `load_checkpoint`. All
workarounds here are for DeepSpeed 0.19.8 and replace methods of one engine object for the time of one call.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any  # trees of DeepSpeed's making

import torch

from launcher.errors import TrainingError
from launcher.train.offload.nvme import is_swapped, map_files, overridden, without_copies

if TYPE_CHECKING:
    import deepspeed


def collect_state(engine: "deepspeed.DeepSpeedEngine") -> dict[str, object]:
    """Return the trees of this rank by file name, under `state/`; the tensors are the training's own. Collective."""
    trees: dict[str, Any] = {}
    is_sharded = bool(engine.zero_optimization_partition_weights())
    # ZeRO-3 (runtime/zero/stage3.py) releases all gathered weights before a save and gathers the persistent ones again
    # after it, two thirds of the time. Only the weights in the module's tree depend on that, which
    # `_clear_sharded_weights` empties.
    no_gathering = dict.fromkeys(("checkpoint_event_prologue", "checkpoint_event_epilogue"), _do_nothing)
    with (
        tempfile.TemporaryDirectory() as empty,
        overridden(
            engine.checkpoint_engine,
            # DeepSpeed hands each file's tree to its checkpoint engine, which would write it with `torch.save`.
            save=lambda state_dict, path: trees.update({f"state/{Path(path).name}": state_dict}),
            makedirs=_do_nothing,
        ),
        # It would copy `zero_to_fp32.py` into each checkpoint; a run exports its model instead.
        overridden(engine, _copy_recovery_script=_do_nothing),
        overridden(engine.optimizer, **(no_gathering if is_sharded else {})),
        without_copies(engine),
    ):
        # Collective: it has barriers of its own.
        engine.save_checkpoint(empty, tag="state", save_latest=False, exclude_frozen_parameters=True)
    for tree in trees.values():
        if "module" in tree:
            tree["module"] = _without_frozen(engine.module, tree["module"])
    if is_sharded:
        _clear_sharded_weights(engine, trees)
    if is_swapped(engine):
        map_files(engine, trees)
    return dict(trees)


def _without_frozen(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return the trained weights and the buffers of a module's tree.

    Frozen weights are those of the model that the job names, which every attempt loads again. DeepSpeed has left most
    of them out, but not the second name of a tied weight, nor the scales of quantized ones.
    """
    trained = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    kept = trained | {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in state.items() if name in kept}


def load_trained(src: dict[str, Any], dst: torch.nn.Module) -> None:
    """Load the weights of a module's tree, in which frozen ones may be missing.

    Args:
        src: Weights and buffers by name; checkpoints of older versions have the frozen weights too.
        dst: Module, which has its frozen weights already.

    Raises:
        TrainingError: A trained weight is missing.
    """
    frozen = {name for name, weight in dst.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    missing = set(dst.load_state_dict(src, strict=False).missing_keys)
    lost = sorted(missing & {name for name, _ in dst.named_parameters()} - frozen)
    if lost:
        raise TrainingError(
            f"the checkpoint has nothing for {lost[0]} and {len(lost) - 1} more weights; it is of another model, "
            "remove it"
        )


def _do_nothing(*_: object, **__: object) -> None:
    """Replace a method of DeepSpeed."""


def _clear_sharded_weights(engine: "deepspeed.DeepSpeedEngine", trees: dict[str, Any]) -> None:
    """Replace sharded weights in the module's tree with empty tensors: their shards are in the optimizer's tree."""
    sharded = {n: p for n, p in engine.module.named_parameters(remove_duplicate=False) if hasattr(p, "ds_id")}
    for tree in trees.values():
        module = tree.get("module")
        if module is None:
            continue
        for name in sharded.keys() & module.keys():
            module[name] = torch.empty(0, dtype=sharded[name].dtype, device=sharded[name].device)
