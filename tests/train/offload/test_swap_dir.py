"""Directories for offloaded states: one for each process, none left behind by those that were killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import ClusterError
from launcher.train.offload.swap_dir import NVMeSwapDir, check_free_space, check_offload_path

_HOLDS = """
import sys, time
from launcher.train.offload.swap_dir import NVMeSwapDir
directory = NVMeSwapDir(sys.argv[1])
(directory.path / "0.tensor.swp").write_bytes(b"states")
print(directory.path, flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    mine, (other, theirs) = NVMeSwapDir(str(tmp_path)), _holder(tmp_path)
    later = NVMeSwapDir(str(tmp_path))
    assert {mine.path, theirs, later.path} == set(tmp_path.iterdir())
    assert (theirs / "0.tensor.swp").read_bytes() == b"states"
    other.send_signal(signal.SIGKILL)
    other.wait()
    last = NVMeSwapDir(str(tmp_path))
    assert {mine.path, later.path, last.path} == set(tmp_path.iterdir())
    for directory in (mine, later, last, last):
        directory.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_its_own_directories_is_touched(tmp_path: Path) -> None:
    (tmp_path / "launcher-swap-data").mkdir()
    (tmp_path / "launcher-swap-notes.txt").write_text("mine")
    NVMeSwapDir(str(tmp_path)).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launcher-swap-data", "launcher-swap-notes.txt"]


def test_what_cannot_keep_states_is_refused(tmp_path: Path) -> None:
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


def _holder(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a directory in `folder`, and the directory."""
    command = [sys.executable, "-c", _HOLDS, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())
