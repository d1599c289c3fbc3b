"""Directory of one process for offloaded states, on a disk of its node. Runs in train workers; the client checks it.

The files are useless after the process has ended, and a killed process cannot remove them: the next one does. A file
lock, which the kernel releases when the process ends (flock(2)), shows which directories are in use.
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

_PREFIX = "launcher-swap-"
_LOCK = "in-use.lock"


class NVMeSwapDir:
    """Directory that exists and is locked; creating it removes the directories of dead processes.

    Args:
        parent: Value of `parallel.offload_path`.

    Raises:
        ClusterError: The parent cannot hold states.
    """

    def __init__(self, parent: str) -> None:
        check_offload_path(parent)
        for old in Path(parent).glob(f"{_PREFIX}*"):
            _remove_if_dead(old)
        lock = None
        # A process that starts at the same time may take the lock between `touch` and `_try_lock`, take the directory
        # for a dead one's and remove it. A directory without a lock file is never removed.
        while lock is None:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            (self.path / _LOCK).touch()
            lock = _try_lock(self.path)
        self._lock = lock

    def close(self) -> None:
        """Remove the directory. May be called again."""
        # The lock last: without it another process would take the directory for a dead one's, and remove it too.
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def check_offload_path(parent: str) -> None:
    """Check that a directory of this machine can hold states.

    Raises:
        ClusterError: The directory is missing, not writable, or has no direct I/O.
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
            # DeepSpeed's kernel opens its files with O_DIRECT, which not every file system has.
            os.close(os.open(name, os.O_RDWR | os.O_DIRECT))
        finally:
            os.unlink(name)
    except OSError as error:
        reason = "its file system has no direct I/O" if error.errno == errno.EINVAL else describe_os_error(error)
        raise ClusterError(
            f"{where} cannot be used on {socket.gethostname()} ({reason}); give a directory of a local disk"
        ) from error


def check_free_space(directory: NVMeSwapDir, needed: int) -> None:
    """Check that the disk has enough free space.

    Args:
        directory: Directory for the states.
        needed: Bytes that all processes of this node write.

    Raises:
        ClusterError: The disk is too full.
    """
    free = shutil.disk_usage(directory.path).free
    if free < needed:
        raise ClusterError(
            f"parallel.offload_path: {directory.path.parent} on {socket.gethostname()} has {free / 2**30:.2f} GiB "
            f"free, and the states of its workers take {needed / 2**30:.2f} GiB; free space, or use more nodes"
        )


def _remove_if_dead(directory: Path) -> None:
    lock = _try_lock(directory)
    if lock is not None:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _try_lock(directory: Path) -> int | None:
    """Return a descriptor that locks the directory; None if another process holds the lock or has removed it."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The file may have been removed between open and flock; then the lock is on a deleted file.
        if os.path.samestat(os.fstat(lock), os.stat(directory / _LOCK)):
            return lock
    # Locked by another process, or removed.
    except OSError:
        pass
    os.close(lock)
    return None
