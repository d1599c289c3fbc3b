"""What DeepSpeed would write as a checkpoint, as trees of the training's own tensors. Train workers."""

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
    """The trees by their file, below `state/` (a collective)."""
    found: dict[str, Any] = {}
    sharded = bool(engine.zero_optimization_partition_weights())
    with (
        tempfile.TemporaryDirectory() as nothing,
        _instead_of_files(engine, found),
        _as_it_lies(engine, sharded),
        without_copies(engine),
    ):
        engine.save_checkpoint(nothing, tag="state", save_latest=False)
    if sharded:
        _without_whole(engine, found)
    if is_swapped(engine):
        map_files(engine, found)
    return dict(found)


@contextmanager
def _instead_of_files(engine: "deepspeed.DeepSpeedEngine", found: dict[str, Any]) -> Iterator[None]:
    """Collect what DeepSpeed would write in `found`; `train/checkpoint/writer.py` writes it."""
    files = engine.checkpoint_engine
    files.save = lambda state_dict, path: found.update({f"state/{Path(path).name}": state_dict})
    files.makedirs = lambda *_, **__: None
    engine._copy_recovery_script = lambda _: None  # its `zero_to_fp32.py`; a run exports its model
    try:
        yield
    finally:
        del files.save, files.makedirs, engine._copy_recovery_script  # the class's own again


@contextmanager
def _as_it_lies(engine: "deepspeed.DeepSpeedEngine", sharded: bool) -> Iterator[None]:
    """Without gathering anything, which under ZeRO-3 takes two thirds of the time.

    DeepSpeed lets go of all weights that are whole and gathers them again, one by one. Nothing that is saved depends
    on it but the weights' places, which `_without_whole` empties.
    """
    optimizer = engine.optimizer
    if sharded:
        optimizer.checkpoint_event_prologue = optimizer.checkpoint_event_epilogue = lambda: None
    try:
        yield
    finally:
        if sharded:
            del optimizer.checkpoint_event_prologue, optimizer.checkpoint_event_epilogue


def _without_whole(engine: "deepspeed.DeepSpeedEngine", found: dict[str, Any]) -> None:
    """A sharded weight has an empty place among the module's: its shards are the optimizer's."""
    sharded = {n: p for n, p in engine.module.named_parameters(remove_duplicate=False) if hasattr(p, "ds_id")}
    for tree in found.values():
        module = tree.get("module")
        if module is None:
            continue
        for name in sharded.keys() & module.keys():
            module[name] = torch.empty(0, dtype=sharded[name].dtype, device=sharded[name].device)
