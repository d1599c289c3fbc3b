"""DeepSpeed's compiled kernels: which are built, and what a killed build leaves. Train workers, before an engine.

torch compiles a kernel under a lock *file*, which outlives a process that is killed; whoever comes later waits for it
for ever, without a word (torch 2.13, torch/utils/file_baton.py).
"""

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

_LOG = logging.getLogger(__name__)


def prepare_op_builds() -> None:
    """Before an engine is made, which builds what it lacks."""
    # `from deepspeed.comm import torch` would give torch itself, which that package imports.
    backend = importlib.import_module("deepspeed.comm.torch")
    remove_stale_locks()
    # With a group of CPUs DeepSpeed (0.19.8) compiles all-reduces for its inference, a minute or more on all cores at
    # the first start on a machine, and loads them at each start; training calls none of them.
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def remove_stale_locks() -> None:
    """Remove the locks of kernel builds that no living process holds.

    The holder keeps the file open; where open files cannot be listed (no /proc), all locks stay.
    """
    locks = list(_root().glob("**/lock"))
    held = set(_open_files()) if locks else set()  # after the locks: a build that begins meanwhile is not looked at
    for lock in locks:
        if held and str(lock) not in held:
            _LOG.warning("%s: left by a build that was killed; removed", lock)
            lock.unlink(missing_ok=True)  # another worker of this host may have been quicker


def _root() -> Path:
    return Path(os.path.realpath(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))


def _open_files() -> Iterator[str]:
    """What the processes that we may look into have open; other users' builds are in other folders."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield from (os.readlink(file) for file in (process / "fd").iterdir())
        except OSError:  # it ended, or is another user's
            continue
