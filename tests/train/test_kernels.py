"""A kernel's build that was killed does not make the next run wait; one under way is waited for."""

from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from launcher.train.kernels import forget_dead_builds


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
    forget_dead_builds()
    assert not dead.exists() and alive.exists()
    baton.release()


def test_no_folder_of_kernels_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    forget_dead_builds()
