"""What the environment keeps from a local Ray, told before it starts. Runs on the client and the head."""

import os
import sys
import tempfile
from pathlib import Path

from launcher.errors import ClusterError

# Ray's longest path of a socket, below its temporary directory (ray 2.60, _private/node.py), with a process id of
# seven digits; and the longest that the kernel takes (unix(7): sun_path).
_SOCKET = "/ray/session_2026-11-29_04-08-46_123456_4194304/sockets/plasma_store"
_LONGEST = (107 if sys.platform.startswith("linux") else 103) - len(_SOCKET)
# Ray's first log files; less room than that is none.
_PROBE_BYTES = 1 << 16


def refuse_environment() -> None:
    """Refuse an environment in which Ray cannot make its sockets, logs or token.

    Raises:
        ClusterError: Names the variable to change.
    """
    name, place = _temporary()
    if len(os.fsencode(place)) > _LONGEST:
        raise ClusterError(
            f"{name}: {place} is {len(os.fsencode(place))} bytes long, and with more than {_LONGEST} the names of "
            "Ray's sockets there are too long for the system; set RAY_TMPDIR to a shorter directory, such as /tmp"
        )
    try:
        os.makedirs(f"{place}/ray", exist_ok=True)
        with tempfile.TemporaryFile(dir=f"{place}/ray", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise ClusterError(
            f"{name}: {place}/ray cannot be written ({os.strerror(error.errno or 0)}), where Ray keeps its sockets and "
            "logs; make room and rights there, or set RAY_TMPDIR to another directory of this machine"
        ) from error
    _refuse_home()


def _temporary() -> tuple[str, str]:
    """Return the variable that names Ray's temporary directory, and the directory, as Ray looks for it."""
    for name in ("RAY_TMPDIR", *(("TMPDIR",) if sys.platform.startswith("linux") else ())):
        if name in os.environ:
            return name, os.path.abspath(os.environ[name])
    return "RAY_TMPDIR", "/tmp" if os.name == "posix" else tempfile.gettempdir()


def _refuse_home() -> None:
    """Refuse a home in which Ray can keep no token, where it wants one."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    folder = Path.home() / ".ray"
    try:
        if os.access(folder / "auth_token", os.R_OK):
            return
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ClusterError(
            f"HOME: {folder} cannot be written ({os.strerror(error.errno or 0)}), where Ray keeps its token "
            "(RAY_AUTH_MODE is token); set HOME to a directory that can be written, or RAY_AUTH_TOKEN to a token"
        ) from error
