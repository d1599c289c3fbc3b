"""The text of a job file. Runs anywhere; read `spec/document.py` next."""

import os
import stat
from pathlib import Path

from launcher.errors import SpecError


def read_text(path: Path, name: str) -> str:
    """A job file's text.

    Args:
        path: Where it is.
        name: The path as messages show it.

    Raises:
        SpecError: There is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        _refuse_device(path, name)
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise SpecError((f"{name}: there is no such file; check the path of the job file",)) from error
    except IsADirectoryError as error:
        raise SpecError((f"{name}: this is a directory, not a job file; name a YAML file in it",)) from error
    except OSError as error:
        raise SpecError((f"{name}: the job file cannot be read ({error.strerror}); check the path",)) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise SpecError((f"{name}:{line}: {found}; save the job file as UTF-8",)) from error


def _refuse_device(path: Path, name: str) -> None:
    """A pipe that nobody writes to would be waited for, and /dev/zero never ends."""
    kind = path.stat().st_mode
    is_piped = stat.S_ISFIFO(kind) and os.path.realpath(path).startswith(("/proc/", "/dev/"))  # `<(...)` of a shell
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind) or is_piped):
        raise SpecError((f"{name}: this is a device or a pipe, not a job file; name a YAML file",))
