"""The lock of a killed kernel build does not block the next run; the lock of a running build stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.file_baton import FileBaton

from launcher.train.op_builders import remove_stale_locks


def test_only_locks_of_killed_builds_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_missing_build_directory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    remove_stale_locks()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which DeepSpeed finds")
def test_deepspeed_is_imported_with_the_cpu_accelerator() -> None:
    """Otherwise DeepSpeed tries every accelerator that it knows, and prints that there is none."""
    code = "import launcher.train.worker, os; print(os.environ['DS_ACCELERATOR'])"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert process.stdout == "cpu\n" and "Setting accelerator" not in process.stderr
