"""Optimizer states in files on a node's disk (`parallel.offload_path`), saved and loaded. Train workers.

DeepSpeed (0.19.8) copies these files beside its checkpoint, where neither its universal format nor another number of
workers finds them, and knows no other way back. Here a checkpoint holds the same states in the same places as that of
any ZeRO-3 run: it is read with or without a disk, by any number of workers.
"""

import ctypes
import mmap
import os
import resource
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any  # DeepSpeed ships no types

import torch

from launcher.errors import ClusterError
from launcher.train.checkpoint.universal import MOMENTS
from launcher.train.deepspeed_config import swap_buffers
from launcher.train.offload.swap_dir import NVMeSwapDir, check_free_space

# Of a weight in fp32: itself, two moments and the gradient.
_BYTES = 16
_MOMENTS = tuple(MOMENTS["adamw"])  # no other optimizer is offloaded
_INNER, _WEIGHTS = "optimizer_state_dict", "fp32_flat_groups"


def create_swap_dir(path: str | None, elements: int) -> NVMeSwapDir | None:
    """A directory for the states of this worker; None where the job offloads to no disk.

    Args:
        path: `parallel.offload_path`.
        elements: of the trained weights that are this worker's.

    Raises:
        ClusterError: the disk cannot be used, is full, or this node has no libaio or lets no memory be locked.
    """
    if path is None:
        return None
    from deepspeed.ops.op_builder import AsyncIOBuilder

    directory = NVMeSwapDir(path)
    try:
        if not AsyncIOBuilder().is_compatible():
            raise ClusterError(
                f"parallel.offload_path: {socket.gethostname()} has no libaio to compile DeepSpeed's kernel with; "
                "install libaio-dev (in rpm systems libaio-devel) on every node, or drop offload_path"
            )
        _refuse_without_locks(swap_buffers(elements))
        check_free_space(directory, elements * _BYTES * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ClusterError:
        directory.close()
        raise
    return directory


def _refuse_without_locks(size: int) -> None:
    """Refuse where DeepSpeed could not lock its buffers into memory: it would abort the process.

    Raises:
        ClusterError: says how much may be locked.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, max(size, mmap.PAGESIZE)) as memory:
        view = ctypes.c_char.from_buffer(memory)
        refused = libc.mlock(ctypes.byref(view), ctypes.c_size_t(len(memory)))
        del view  # the mapping cannot be closed while it is looked at; closing unlocks it
    if refused:
        may = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        raise ClusterError(
            f"parallel.offload_path: {socket.gethostname()} lets a process lock {may >> 10} KiB of memory, and the "
            f"buffers of offloaded states take {size >> 10}; raise the limit (ulimit -l), or drop offload_path"
        )


def is_swapped(engine: Any) -> bool:
    """Whether a DeepSpeed engine keeps states in files."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@contextmanager
def without_copies(engine: Any) -> Iterator[None]:
    """DeepSpeed saves and loads as if the states were in memory: it copies none of their files."""
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer  # the class's own again


def map_files(engine: Any, found: Mapping[str, Any]) -> None:
    """Put the files' content where `save_checkpoint` found empty tensors; mapped, so that it takes no memory.

    Args:
        engine: DeepSpeed's.
        found: what it would have saved, by file; changed. Valid until the next step writes to the files.
    """
    optimizer = engine.optimizer
    for tree in (tree[_INNER] for tree in found.values() if _INNER in tree):
        weights, states = list(tree[_WEIGHTS]), dict(tree[_INNER]["state"])
        for index, weight in enumerate(optimizer.fp32_partitioned_groups_flat):
            info = optimizer.optimizer_swapper.swap_params_info.get(weight.ds_id)
            if info is None:
                continue  # a small group, which stays in memory
            master, *moments = [
                torch.from_file(it.swap_path, shared=False, size=info.numel(), dtype=info.dtype())
                for it in info.tensors
            ]
            weights[index] = master
            if moments:
                names = [it.compute_tensor.ds_id.partition("-")[0] for it in info.tensors[1:]]
                states[index] = {**states[index], **dict(zip(names, moments, strict=True))}
        tree[_WEIGHTS] = weights
        tree[_INNER] = {**tree[_INNER], "state": states}


@contextmanager
def reading_back(engine: Any, universal: bool) -> Iterator[None]:
    """Inside, `load_checkpoint` brings the states of a ZeRO-3 checkpoint into the files.

    Args:
        engine: DeepSpeed's.
        universal: whether the checkpoint is in the universal format.
    """
    if not is_swapped(engine):
        yield
        return
    engine._load_zero_checkpoint = partial(_load, engine, universal)
    try:
        with without_copies(engine):
            yield
    finally:
        del engine._load_zero_checkpoint


def _load(engine: Any, universal: bool, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
    """In place of DeepSpeed's own method, which would copy into tensors that are empty."""
    optimizer = engine.optimizer
    optimizer.optimizer_swapper.purge_state()
    groups = _universal(optimizer, Path(load_dir, tag)) if universal else _shards(engine, load_dir, tag)
    for index, (weight, state) in enumerate(groups):
        _put(optimizer, index, weight, state)
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(weight)
        optimizer._unflatten_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    return True


def _shards(engine: Any, load_dir: str, tag: str) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """This worker's groups of weights, and their states, as it has saved them."""
    file = engine._get_zero_ckpt_name(load_dir, tag)
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)[_INNER]
    engine.optimizer._load_global_state_stage3(saved)
    states = saved[_INNER]["state"]
    for index, weight in enumerate(saved[_WEIGHTS]):
        yield weight.detach(), states.get(index, {})


def _universal(optimizer: Any, directory: Path) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """The same, cut out of whole parameters."""
    shared = torch.load(directory / "zero/optimizer_state.pt", map_location="cpu", weights_only=True)
    optimizer._load_global_state_stage3(shared)
    step = shared[_INNER]["state"][0]["step"]
    for group in optimizer.fp16_groups:
        flat = partial(_flat, optimizer, directory / "zero", group)
        yield flat("fp32"), {"step": step, **{name: flat(name) for name in _MOMENTS}}


def _flat(optimizer: Any, directory: Path, group: Any, name: str) -> torch.Tensor:
    """This worker's part of a group: shards of its parameters, one after the other."""
    folders = {weight: str(directory / optimizer.param_names[weight]) for weight in group}
    return torch.cat([optimizer.load_hp_checkpoint_state(at, name, param=weight) for weight, at in folders.items()])


def _put(optimizer: Any, index: int, weight: torch.Tensor, state: dict[str, Any]) -> None:
    """A group's weights and states into its files; into memory where it is a small one."""
    here, swapper = optimizer.fp32_partitioned_groups_flat[index], optimizer.optimizer_swapper
    moments = {name: state[name] for name in _MOMENTS if name in state}
    swapped = here.ds_id in swapper.swap_params_info
    # The CPU's kernel counts its steps in a plain int. Moments of a file are released below, those in memory are kept.
    kept = moments if swapped else {name: tensor.clone() for name, tensor in moments.items()}
    optimizer.optimizer.state[here] = {"step": int(state["step"]), **kept} if state else {}
    if not swapped:
        here.data.copy_(weight)
        return
    info = swapper._get_param_swap_info(here)  # which learns of the moments now
    for it, tensor in zip(info.tensors, (weight, *moments.values()), strict=True):
        whole = swapper._io_aligned_numel(info.numel())
        file = torch.from_file(it.swap_path, shared=True, size=whole, dtype=info.dtype())
        file[: info.numel()].copy_(tensor)
    info.release_memory()
