"""A kernel's build that was killed does not make the next run wait; one under way is waited for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.file_baton import FileBaton

from launcher.train.op_builders import remove_stale_locks


def test_the_lock_of_a_killed_build_goes_and_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    dead, alive = tmp_path / "cpu_adam" / "lock", tmp_path / "py" / "shm" / "lock"
    for lock in (dead, alive):
        lock.parent.mkdir(parents=True)
    dead.touch()
    baton = FileBaton(str(alive))
    assert baton.try_acquire()
    remove_stale_locks()
    assert not dead.exists() and alive.exists()
    baton.release()


def test_no_folder_of_kernels_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    remove_stale_locks()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which DeepSpeed finds")
def test_deepspeed_is_told_of_the_cpu_before_it_looks_for_others() -> None:
    """Else it tries every accelerator it knows, and prints that it found none."""
    code = "import launcher.train.worker, os; print(os.environ['DS_ACCELERATOR'])"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "cpu\n" and "Setting accelerator" not in done.stderr
