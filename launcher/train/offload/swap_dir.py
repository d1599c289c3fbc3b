"""A directory of one process's own on a disk of its node, for offloaded states. Train workers; the client looks too.

Its files are of no use once the process has ended, and one that is killed cannot remove them: whoever comes next does.
A file lock, which ends with the process that holds it (flock(2)), says whose directory is still in use.
"""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from pathlib import Path

from launcher.errors import ClusterError
from launcher.rundir.uri import describe_os_error

_PREFIX, _LOCK = "launcher-swap-", "in-use.lock"


class NVMeSwapDir:
    """Made, and locked, at once; directories of dead processes beside it are removed.

    Args:
        parent: `parallel.offload_path`.

    Raises:
        ClusterError: nothing can be kept there.
    """

    def __init__(self, parent: str) -> None:
        check_offload_path(parent)
        for old in Path(parent).glob(f"{_PREFIX}*"):
            _remove_if_dead(old)
        held = None
        while held is None:  # until nobody took it for a dead one's before it was locked
            # One without a lock's file is nobody's to remove.
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            (self.path / _LOCK).touch()
            held = _locked(self.path)
        self._lock = held

    def close(self) -> None:
        """Remove it; may be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def check_offload_path(parent: str) -> None:
    """Refuse a directory that can keep no states on this machine.

    Raises:
        ClusterError: says why.
    """
    where = f"parallel.offload_path: {parent}"
    if not os.path.isdir(parent):
        raise ClusterError(
            f"{where} is no directory on {socket.gethostname()}; make it on every node, on a disk of the node's own"
        )
    try:
        descriptor, name = tempfile.mkstemp(dir=parent)
        os.close(descriptor)
        try:
            os.close(os.open(name, os.O_RDWR | os.O_DIRECT))  # as the kernel that moves the states opens its files
        finally:
            os.unlink(name)
    except OSError as error:
        reason = "its file system has no direct I/O" if error.errno == errno.EINVAL else describe_os_error(error)
        raise ClusterError(
            f"{where} cannot be used on {socket.gethostname()} ({reason}); give a directory of a local disk"
        ) from error


def check_free_space(directory: NVMeSwapDir, needed: int) -> None:
    """Refuse a disk without room.

    Args:
        directory: where the states go.
        needed: bytes, of all processes of this machine.

    Raises:
        ClusterError: says what is missing.
    """
    free = shutil.disk_usage(directory.path).free
    if free < needed:
        raise ClusterError(
            f"parallel.offload_path: {directory.path.parent} on {socket.gethostname()} has {free / 2**30:.2f} GiB "
            f"left, and the states of its workers take {needed / 2**30:.2f}; make room, or take more nodes"
        )


def _remove_if_dead(directory: Path) -> None:
    lock = _locked(directory)
    if lock is not None:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _locked(directory: Path) -> int | None:
    """Descriptor of its lock; None where somebody else holds it, or has removed the directory."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(directory / _LOCK)):
            return lock
    except OSError:  # held, or gone meanwhile
        pass
    os.close(lock)
    return None
