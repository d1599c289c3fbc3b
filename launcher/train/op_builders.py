"""DeepSpeed's compiled kernels: which are built, and locks of killed builds. Runs in train workers, before the engine.

torch compiles a kernel under a lock *file*, which stays behind when the process is killed. The next process then waits
for it for ever, without a message (torch 2.13, torch/utils/file_baton.py).
"""

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

_LOG = logging.getLogger(__name__)


def prepare_op_builds() -> None:
    """Remove stale locks and skip unused kernels. Call it before `deepspeed.initialize`, which builds kernels."""
    # `from deepspeed.comm import torch` would return torch itself, which that package imports.
    backend = importlib.import_module("deepspeed.comm.torch")
    remove_stale_locks()
    # Workaround, DeepSpeed 0.19.8 (comm/torch.py, TorchBackend): on CPUs it compiles shared-memory all-reduces for
    # inference, more than a minute on all cores at the first start on a machine, and loads them at each start. Training
    # does not use them.
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def remove_stale_locks() -> None:
    """Remove the locks of kernel builds that no living process holds.

    The process that holds a lock keeps its file open. Without /proc, open files cannot be listed and all locks stay.
    """
    # Locks before open files: a build that starts in between is not in the list, so its lock is not removed.
    locks = list(_build_root().glob("**/lock"))
    held = set(_list_open_files()) if locks else set()
    for lock in locks:
        if held and str(lock) not in held:
            _LOG.warning("%s: left by a killed build; removed", lock)
            # Another worker of this host may have removed it.
            lock.unlink(missing_ok=True)


def _build_root() -> Path:
    return Path(os.path.realpath(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))


def _list_open_files() -> Iterator[str]:
    """Yield the open files of this user's processes; other users build in other directories."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield from (os.readlink(file) for file in (process / "fd").iterdir())
        except OSError:  # the process has ended, or belongs to another user
            continue
