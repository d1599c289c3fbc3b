"""Optimizer states in files on a node's disk (`parallel.offload_path`): saving and loading. Runs in train workers.

DeepSpeed 0.19.8 copies its swap files next to a checkpoint, where neither its universal format nor another number of
workers finds them. Here a checkpoint has the same states in the same places as any ZeRO-3 run, so it can be loaded with
or without a disk, by any number of workers. `swap_dir.py` owns the directory, `checkpoint/state_dict.py` and
`engine.py` use this. All workarounds here are for DeepSpeed 0.19.8 and replace methods of one engine object.
"""

import ctypes
import mmap
import os
import resource
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any  # DeepSpeed ships no types

import torch

from launcher.errors import ClusterError
from launcher.train.checkpoint.universal import MOMENTS
from launcher.train.deepspeed_config import swap_buffer_bytes
from launcher.train.offload.swap_dir import NVMeSwapDir, check_free_space

# Per weight on the disk, in fp32: the weight, two moments and the gradient.
_BYTES_PER_WEIGHT = 16
# No other optimizer can be offloaded.
_MOMENTS = tuple(MOMENTS["adamw"])
# Keys of DeepSpeed's ZeRO-3 optimizer state (checkpoint/constants.py).
_INNER = "optimizer_state_dict"
_WEIGHTS = "fp32_flat_groups"


def create_swap_dir(path: str | None, elements: int) -> NVMeSwapDir | None:
    """Create this worker's directory for offloaded states.

    Args:
        path: Value of `parallel.offload_path`; None for no offloading to a disk.
        elements: Number of trained weights in this worker's shard.

    Returns:
        Locked directory; None if `path` is None.

    Raises:
        ClusterError: The disk cannot be used or is full, or the node lacks libaio or forbids locking memory.
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
        _check_lockable(swap_buffer_bytes(elements))
        # All workers of this node write to the same disk, and all start at about the same time.
        check_free_space(directory, elements * _BYTES_PER_WEIGHT * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # The directory is this worker's own by now, and nobody else would remove it before the next start.
    except ClusterError:
        directory.close()
        raise
    return directory


def _check_lockable(size: int) -> None:
    """Check that the process may lock `size` bytes of memory; DeepSpeed's kernel aborts the process if it may not.

    Raises:
        ClusterError: The limit is lower.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, max(size, mmap.PAGESIZE)) as memory:
        view = ctypes.c_char.from_buffer(memory)
        failed = libc.mlock(ctypes.byref(view), ctypes.c_size_t(len(memory)))
        # A mapping with a view cannot be closed; closing it unlocks the memory.
        del view
    if failed:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        raise ClusterError(
            f"parallel.offload_path: {socket.gethostname()} lets a process lock {limit >> 10} KiB of memory, and the "
            f"buffers of offloaded states take {size >> 10}; raise the limit (ulimit -l), or drop offload_path"
        )


def is_swapped(engine: Any) -> bool:
    """Return True if a DeepSpeed engine keeps states in files."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@contextmanager
def overridden(target: Any, **methods: Callable[..., object]) -> Iterator[None]:
    """Replace methods of one object inside the block."""
    for name, method in methods.items():
        setattr(target, name, method)
    try:
        yield
    finally:
        for name in methods:
            # Uncovers the method of the class.
            delattr(target, name)


def without_copies(engine: Any) -> AbstractContextManager[None]:
    """Make DeepSpeed save and load in the block as if the states were in memory, without copying swap files."""
    return overridden(engine, zero_nvme_offload_optimizer=lambda: False)


def map_files(engine: Any, trees: Mapping[str, Any]) -> None:
    """Replace the empty tensors that `save_checkpoint` found with the swap files, memory-mapped.

    Mapping needs no memory, but the tensors are valid only until the next optimizer step writes to the files.

    Args:
        engine: DeepSpeed engine.
        trees: Trees to save, by file name; changed in place.
    """
    optimizer = engine.optimizer
    for tree in (tree[_INNER] for tree in trees.values() if _INNER in tree):
        weights = list(tree[_WEIGHTS])
        states = dict(tree[_INNER]["state"])
        for index, weight in enumerate(optimizer.fp32_partitioned_groups_flat):
            info = optimizer.optimizer_swapper.swap_params_info.get(weight.ds_id)
            # DeepSpeed keeps a group below 1 MiB in memory (runtime/swap_tensor/utils.py, MIN_AIO_BYTES).
            if info is None:
                continue
            master, *moments = [
                # Not shared: a write to the mapping could never reach the file.
                torch.from_file(swapped.swap_path, shared=False, size=info.numel(), dtype=info.dtype())
                for swapped in info.tensors
            ]
            weights[index] = master
            if moments:
                names = [swapped.compute_tensor.ds_id.partition("-")[0] for swapped in info.tensors[1:]]
                states[index] = {**states[index], **dict(zip(names, moments, strict=True))}
        tree[_WEIGHTS] = weights
        tree[_INNER] = {**tree[_INNER], "state": states}


@contextmanager
def reading_back(engine: Any, universal: bool) -> Iterator[None]:
    """Make `load_checkpoint` in the block write the states of a ZeRO-3 checkpoint to the swap files.

    Args:
        engine: DeepSpeed engine.
        universal: True if the checkpoint is in the universal format.
    """
    if not is_swapped(engine):
        yield
        return
    with overridden(engine, _load_zero_checkpoint=partial(_load_states, engine, universal)), without_copies(engine):
        yield


def _load_states(engine: Any, universal: bool, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
    """Load the optimizer's states. Replaces DeepSpeed's method, which copies into tensors that are empty here."""
    optimizer = engine.optimizer
    # Forgets the moments of earlier steps; `_put_group` registers those of the checkpoint.
    optimizer.optimizer_swapper.purge_state()
    groups = _universal_groups(optimizer, Path(load_dir, tag)) if universal else _own_groups(engine, load_dir, tag)
    for index, (weight, state) in enumerate(groups):
        _put_group(optimizer, index, weight, state)
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(weight)
        optimizer._unflatten_partitioned_parameters(index)
    # As DeepSpeed does after loading (runtime/zero/stage3.py): the epilogue of the load gathers these weights again,
    # from the shards that have just changed.
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    return True


def _own_groups(engine: Any, load_dir: str, tag: str) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield weights and states of each group from the shard that this rank has saved."""
    file = engine._get_zero_ckpt_name(load_dir, tag)
    # Mapped: one group after the other is read, as the states may not fit into memory.
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)[_INNER]
    engine.optimizer._load_global_state_stage3(saved)
    states = saved[_INNER]["state"]
    for index, weight in enumerate(saved[_WEIGHTS]):
        yield weight.detach(), states.get(index, {})


def _universal_groups(optimizer: Any, directory: Path) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield weights and states of each group, cut out of whole parameters."""
    shared = torch.load(directory / "zero/optimizer_state.pt", map_location="cpu", weights_only=True)
    optimizer._load_global_state_stage3(shared)
    step = shared[_INNER]["state"][0]["step"]
    for group in optimizer.fp16_groups:
        flat = partial(_flat_shard, optimizer, directory / "zero", group)
        yield flat("fp32"), {"step": step, **{name: flat(name) for name in _MOMENTS}}


def _flat_shard(optimizer: Any, directory: Path, group: Any, name: str) -> torch.Tensor:
    """Return this rank's shard of one state of a group: the shards of its parameters, concatenated."""
    folders = {weight: str(directory / optimizer.param_names[weight]) for weight in group}
    return torch.cat([optimizer.load_hp_checkpoint_state(at, name, param=weight) for weight, at in folders.items()])


def _put_group(optimizer: Any, index: int, weight: torch.Tensor, state: dict[str, Any]) -> None:
    """Write a group's weights and states to its swap files; a small group's to memory."""
    master = optimizer.fp32_partitioned_groups_flat[index]
    swapper = optimizer.optimizer_swapper
    moments = {name: state[name] for name in _MOMENTS if name in state}
    is_on_disk = master.ds_id in swapper.swap_params_info
    # Moments on the disk are released below; those that stay in memory must not refer to the mapped checkpoint.
    states = moments if is_on_disk else {name: tensor.clone() for name, tensor in moments.items()}
    # DeepSpeed's CPU kernel (ops/adam/cpu_adam.py) counts steps in an int, torch's optimizers in a tensor.
    optimizer.optimizer.state[master] = {"step": int(state["step"]), **states} if state else {}
    if not is_on_disk:
        master.data.copy_(weight)
        return
    # Registers the moments, which the optimizer's state has only now.
    info = swapper._get_param_swap_info(master)
    for swapped, tensor in zip(info.tensors, (weight, *moments.values()), strict=True):
        # DeepSpeed reads whole aligned blocks: the file may be longer than its tensor. A shared mapping writes to it.
        aligned = swapper._io_aligned_numel(info.numel())
        file = torch.from_file(swapped.swap_path, shared=True, size=aligned, dtype=info.dtype())
        file[: info.numel()].copy_(tensor)
    info.release_memory()
