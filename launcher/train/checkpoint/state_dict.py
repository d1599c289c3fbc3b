"""State trees that DeepSpeed would save, without its copies and files. Runs in train workers.

`engine.py` asks for them, `writer.py` writes them, `reader.py` loads them with DeepSpeed's own `load_checkpoint`. All
workarounds here are for DeepSpeed 0.19.8 and replace methods of one engine object for the time of one call.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any  # trees of DeepSpeed's making

import torch

from launcher.train.offload.nvme import is_swapped, map_files, without_copies

if TYPE_CHECKING:
    import deepspeed


def collect_state(engine: "deepspeed.DeepSpeedEngine") -> dict[str, object]:
    """Return the trees of this rank by file name, under `state/`; the tensors are the training's own. Collective."""
    trees: dict[str, Any] = {}
    is_sharded = bool(engine.zero_optimization_partition_weights())
    with (
        tempfile.TemporaryDirectory() as empty,
        _collecting_files(engine, trees),
        _without_gathering(engine, is_sharded),
        without_copies(engine),
    ):
        engine.save_checkpoint(empty, tag="state", save_latest=False)  # collective: has barriers of its own
    if is_sharded:
        _clear_sharded_weights(engine, trees)
    if is_swapped(engine):
        map_files(engine, trees)
    return dict(trees)


@contextmanager
def _collecting_files(engine: "deepspeed.DeepSpeedEngine", trees: dict[str, Any]) -> Iterator[None]:
    """Collect in `trees` what `save_checkpoint` would write to files in the block."""
    files = engine.checkpoint_engine
    files.save = lambda state_dict, path: trees.update({f"state/{Path(path).name}": state_dict})
    files.makedirs = lambda *_, **__: None
    engine._copy_recovery_script = lambda _: None  # writes `zero_to_fp32.py`; a run exports its model instead
    try:
        yield
    finally:
        del files.save, files.makedirs, engine._copy_recovery_script  # uncovers the methods of the class


@contextmanager
def _without_gathering(engine: "deepspeed.DeepSpeedEngine", is_sharded: bool) -> Iterator[None]:
    """Skip the gathering of weights around a ZeRO-3 `save_checkpoint`, two thirds of its time.

    DeepSpeed (runtime/zero/stage3.py, checkpoint_event_prologue and _epilogue) releases all gathered weights and
    gathers the persistent ones again. Only the weights in the module's tree depend on that, and
    `_clear_sharded_weights` empties those.
    """
    optimizer = engine.optimizer
    if is_sharded:
        optimizer.checkpoint_event_prologue = optimizer.checkpoint_event_epilogue = lambda: None
    try:
        yield
    finally:
        if is_sharded:
            del optimizer.checkpoint_event_prologue, optimizer.checkpoint_event_epilogue


def _clear_sharded_weights(engine: "deepspeed.DeepSpeedEngine", trees: dict[str, Any]) -> None:
    """Replace sharded weights in the module's tree with empty tensors: their shards are in the optimizer's tree."""
    sharded = {n: p for n, p in engine.module.named_parameters(remove_duplicate=False) if hasattr(p, "ds_id")}
    for tree in trees.values():
        module = tree.get("module")
        if module is None:
            continue
        for name in sharded.keys() & module.keys():
            module[name] = torch.empty(0, dtype=sharded[name].dtype, device=sharded[name].device)
