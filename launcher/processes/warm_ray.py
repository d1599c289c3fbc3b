"""A local Ray with its fork server that stays between commands: `launcher up`, `launcher down`. Client.

`up.json` in the user's own folder names it. Commands are forked from its server with everything imported, and run on
its Ray; each holds a shared lock meanwhile, and the node ends when nobody has held it for some minutes. It is not used,
and says why, where the command's environment, the installed packages or the launcher's code differ from what it was
started with. What this module imports is in the standard library: it runs before the command line is loaded.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass

from launcher.processes import fork_client
from launcher.processes.fork_client import process_began

ADDRESS = "LAUNCHER_UP_ADDRESS"
"""Environment variable of a forked command: the GCS of the Ray that it runs on."""
MODULES = (
    "ray",
    "ray.data",
    "ray.train.torch",
    "launcher.cli.main",
    "launcher.driver.run",
    "launcher.driver.memory.activations",
)
"""What a command has loaded when it is forked."""
_COMMANDS = ("train", "tune", "predict", "evaluate", "check")
_STOP_S, _TRIES = 30.0, 10
QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables with which libraries say less, set for every command without `--debug`."""
# Of the terminal and the shell; nothing that is started here depends on them.
_OF_THE_SHELL = (
    "_", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES", "COLORTERM", "TERM", "WINDOWID", "DISPLAY", "LS_COLORS", "PS1",
    "HISTFILE", "EDITOR", "PAGER", "LESSOPEN", "LESSCLOSE",
)  # fmt: skip
_SHELL_PREFIXES = ("SSH_", "TMUX", "VTE_", "XDG_SESSION", "DBUS_", "TERM_", "ITERM_", "LC_TERMINAL", "STY", "VSCODE_")


@dataclass(frozen=True)
class WarmRay:
    """up.json.

    Args:
        pid: The node's process.
        began: When it began, in clock ticks since boot.
        address: Address of its GCS.
        socket: Path of the fork server's socket.
        environment: Digest of each variable in which it was started.
        python: Interpreter that it runs.
        started_at: Seconds since the epoch.
    """

    pid: int
    began: int
    address: str
    socket: str
    environment: dict[str, str]
    python: str
    started_at: float

    def is_alive(self) -> bool:
        """Return True if its process is still the one that was started."""
        return process_began(self.pid) == self.began


def state_path() -> str:
    """Return the path of up.json."""
    return os.path.join(fork_client.folder(), "up.json")


def lock_path() -> str:
    """Return the path of the lock that each command which uses it holds."""
    return os.path.join(fork_client.folder(), "up.lock")


def find() -> WarmRay | None:
    """Return the Ray that stays, or None; what is left of one that was killed is removed."""
    try:
        with open(state_path(), encoding="utf-8") as file:
            found = WarmRay(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None
    if found.is_alive():
        return found
    with contextlib.suppress(OSError):
        os.unlink(state_path())
    return None


def write(warm: WarmRay) -> None:
    """Write up.json, whole or not at all."""
    path = state_path()
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(warm), file)
    os.replace(file.name, path)


def initial_environment() -> dict[str, str]:
    """Return the environment that this process was started with, without what imports and the command line added."""
    with open("/proc/self/environ", "rb") as file:
        entries = [os.fsdecode(entry).partition("=") for entry in file.read().split(b"\0") if entry]
    return {name: value for name, _, value in entries}


def digests() -> dict[str, str]:
    """Return a digest of each environment variable that this process was started with and that could bear on a run."""
    return {
        name: hashlib.sha256(os.fsencode(value)).hexdigest()[:16]
        for name, value in initial_environment().items()
        if name not in _OF_THE_SHELL and not name.startswith(_SHELL_PREFIXES)
    }


def run_command(arguments: list[str]) -> None:
    """Run a command in a fork of the Ray that stays, and end as it ends; return where that is not possible.

    Args:
        arguments: `sys.argv`.
    """
    words = [word for word in arguments[1:] if not word.startswith("-")]
    if (
        not words
        or words[0] not in _COMMANDS
        or "--fresh" in arguments
        or "--help" in arguments
        or ADDRESS in os.environ
    ):
        return
    warm = find()
    if warm is None:
        return
    lock = _join()
    if lock is None or not warm.is_alive():
        return
    why = _difference(warm) or _run_in_fork(warm, [os.path.abspath(arguments[0]), *arguments[1:]])
    os.close(lock)
    sys.stderr.write(f"not run on the Ray of `launcher up`: {why}; `launcher down` ends it\n")
    sys.stderr.flush()


def _run_in_fork(warm: WarmRay, arguments: list[str]) -> str | None:
    """Run a script as a command is run; returns the reason why that is not possible, with the environment as it was."""
    before = dict(os.environ)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ[ADDRESS] = warm.address
    why = fork_client.run_in_fork(warm.socket, arguments, MODULES, sys.path[0])
    os.environ.clear()
    os.environ.update(before)
    return why


def _join() -> int | None:
    """Take the lock of those that use it; it is held until this process ends. None if the Ray is about to end."""
    lock = os.open(lock_path(), os.O_CREAT | os.O_RDWR, 0o600)
    for _ in range(_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # it may only have been looked at (`is_used`)
        else:
            return lock
    os.close(lock)
    return None


def _difference(warm: WarmRay) -> str | None:
    if warm.python != sys.executable:
        return f"it was started with {warm.python}"
    here = digests()
    names = sorted(name for name in {*here, *warm.environment} if here.get(name) != warm.environment.get(name))
    return f"it was started with another value of {names[0]}" if names else None


def close_if_unused() -> bool:
    """Keep commands from joining from now on, until this process ends; return False if one uses it already."""
    return _lock_alone() is not None


def is_used() -> bool:
    """Return True if a command uses it at this moment."""
    lock = _lock_alone()
    if lock is None:
        return True
    os.close(lock)  # which unlocks it, too
    return False


def _lock_alone() -> int | None:
    """Take the lock against all commands; None if one holds it."""
    lock = os.open(lock_path(), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def forget(pid: int) -> None:
    """Remove up.json if it names this process, which ends."""
    found = find()
    if found is not None and found.pid == pid:
        with contextlib.suppress(OSError):
            os.unlink(state_path())


def stop(warm: WarmRay) -> None:
    """End it with all its processes, and wait for that."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(warm.pid, signal.SIGTERM)
    until = time.monotonic() + _STOP_S
    while warm.is_alive() and time.monotonic() < until:
        time.sleep(0.05)
    if warm.is_alive():
        os.kill(warm.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.unlink(state_path())


if __name__ == "__main__":
    # Run by `up`: a command that does nothing leaves a process behind that has loaded what commands need.
    found = find()
    if found is not None:
        sys.exit(_run_in_fork(found, [os.devnull]))
