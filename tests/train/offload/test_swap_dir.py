"""Directories for offloaded states: one per process, and none left by killed processes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import ClusterError
from launcher.train.offload.swap_dir import NVMeSwapDir, check_free_space, check_offload_path

_HOLD = """
import sys, time
from launcher.train.offload.swap_dir import NVMeSwapDir
directory = NVMeSwapDir(sys.argv[1])
(directory.path / "0.tensor.swp").write_bytes(b"states")
print(directory.path, flush=True)
time.sleep(600)
"""


def test_directories_of_killed_processes_are_removed_and_those_in_use_stay(tmp_path: Path) -> None:
    first = NVMeSwapDir(str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    other = Path(process.stdout.readline().strip())
    second = NVMeSwapDir(str(tmp_path))
    assert {first.path, other, second.path} == set(tmp_path.iterdir())
    assert (other / "0.tensor.swp").read_bytes() == b"states"
    process.send_signal(signal.SIGKILL)
    process.wait()
    third = NVMeSwapDir(str(tmp_path))
    assert {first.path, second.path, third.path} == set(tmp_path.iterdir())
    for directory in (first, second, third, third):
        directory.close()
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "launcher-swap-data").mkdir()
    (tmp_path / "launcher-swap-notes.txt").write_text("notes")
    NVMeSwapDir(str(tmp_path)).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launcher-swap-data", "launcher-swap-notes.txt"]


def test_unusable_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"parallel\.offload_path: .*/nowhere is no directory on .*make it on every"):
        check_offload_path(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match="is no directory"):
        NVMeSwapDir(str(tmp_path / "file"))
    with pytest.raises(ClusterError, match=r"/proc cannot be used on .*; give a directory of a local disk"):
        check_offload_path("/proc")
    directory = NVMeSwapDir(str(tmp_path))
    check_free_space(directory, 1)
    with pytest.raises(ClusterError, match=r"GiB free, and the states of its workers take 1048576\.00 GiB; free"):
        check_free_space(directory, 1 << 50)
    directory.close()
