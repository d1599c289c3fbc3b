"""State trees that DeepSpeed would save, without its copies and files. Runs in train workers.

`engine.py` asks for them, `writer.py` writes them, `reader.py` loads them with DeepSpeed's own `load_checkpoint`. All
workarounds here are for DeepSpeed 0.19.8 and replace methods of one engine object for the time of one call.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any  # trees of DeepSpeed's making

import torch

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
        engine.save_checkpoint(empty, tag="state", save_latest=False)
    if is_sharded:
        _clear_sharded_weights(engine, trees)
    if is_swapped(engine):
        map_files(engine, trees)
    return dict(trees)


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
