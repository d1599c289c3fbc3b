"""What the machine refuses a command: a full disk, too many open files, in one sentence. Runs on the client.

Such errors come from anywhere in the launcher and its libraries; anything else that nobody foresaw is a defect.
"""

import errno
import os
import re

_PLACES = "output.storage, TMPDIR, RAY_TMPDIR, HF_HOME"
_ROOM = f"make room there, or name another place ({_PLACES})"
_DISK = "look at the disk or the mount, then give the command again"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: f"name a place that can be written ({_PLACES})",
    errno.EACCES: f"give yourself the rights there, or name another place ({_PLACES})",
    errno.EPERM: f"give yourself the rights there, or name another place ({_PLACES})",
    errno.EMFILE: "raise the limit of open files of this shell (ulimit -n)",
    errno.ENFILE: "close other programs, or let the machine's administrator raise fs.file-max",
    errno.EAGAIN: "raise the limit of processes of this user (ulimit -u), or close other programs",
    errno.ENOMEM: "close other programs, or take a machine with more memory",
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENOTCONN: _DISK,
}
# How pyarrow, and libraries that are written in Rust, tell the system's number inside their own errors.
_NUMBER = re.compile(r"\[errno (\d+)\]|\(os error (\d+)\)", re.IGNORECASE)


def refused_by_machine(error: BaseException) -> str | None:
    """Return the sentence for an error that the machine is to blame for; None for any other."""
    if isinstance(error, FileNotFoundError) and _is_gone():
        return "the working directory does not exist any more; change to one that does (cd), and try again"
    if isinstance(error, MemoryError):
        return f"this machine: {os.strerror(errno.ENOMEM)}; {_REMEDIES[errno.ENOMEM]}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"this machine: no more threads can be started; {_REMEDIES[errno.EAGAIN]}"
    number = _errno(error)
    if number in _REMEDIES:
        place = getattr(error, "filename", None) or "this machine"
        return f"{os.fsdecode(place)}: {os.strerror(number)}; {_REMEDIES[number]}"
    return None if error.__cause__ is None else refused_by_machine(error.__cause__)


def _errno(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found.group(1) or found.group(2)) if found else 0


def _is_gone() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False
