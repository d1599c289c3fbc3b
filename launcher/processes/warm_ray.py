"""Warm Ray: a local Ray and fork server that keep running between commands (`launcher up`, `launcher down`). Client.

`up.json` in the user's socket directory describes it. Commands are forked from its server with all imports done, and
run on its Ray. Each command holds a shared lock; the node ends when the lock has been free for the idle time. A command
does not use it, and says why, if its environment, the installed packages or the launcher's code have changed since it
started. This module imports only the standard library, as it runs before the command line is loaded.
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
from launcher.processes.fork_client import is_process

ADDRESS = "LAUNCHER_UP_ADDRESS"
"""Environment variable of a forked command: address of the GCS of its Ray."""
MODULES = (
    "ray", "ray.data", "ray.train.torch", "launcher.cli.main", "launcher.driver.run",
    "launcher.driver.memory.activations",
)  # fmt: skip
"""Modules that are loaded when a command is forked."""
_COMMANDS = ("train", "tune", "predict", "evaluate", "check")
_STOP_S = 30.0
# Tries of 20 ms each. `is_used` holds the lock only between two system calls.
_LOCK_TRIES = 10
QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that reduce the output of libraries, set for every command without `--debug`."""
# Variables of terminal and shell, which differ between terminals and do not affect a run.
_SHELL_VARIABLES = (
    "_", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES", "COLORTERM", "TERM", "WINDOWID", "DISPLAY", "LS_COLORS", "PS1",
    "HISTFILE", "EDITOR", "PAGER", "LESSOPEN", "LESSCLOSE",
)  # fmt: skip
_SHELL_PREFIXES = ("SSH_", "TMUX", "VTE_", "XDG_SESSION", "DBUS_", "TERM_", "ITERM_", "LC_TERMINAL", "STY", "VSCODE_")


@dataclass(frozen=True)
class WarmRay:
    """Content of up.json."""

    pid: int
    """Process id of the node."""
    began: int
    """Start time of the node's process, in clock ticks since boot."""
    address: str
    """Address of its GCS."""
    socket: str
    """Path of the fork server's socket."""
    environment: dict[str, str]
    """Digest of each environment variable at its start."""
    python: str
    """Path of its interpreter."""
    started_at: float
    """Start time, seconds since the epoch."""

    def is_alive(self) -> bool:
        """Return True if its process is running."""
        return is_process(self.pid, self.began)


def state_path() -> str:
    """Return the path of up.json."""
    return os.path.join(fork_client.socket_dir(), "up.json")


def lock_path() -> str:
    """Return the path of the lock that each command holds while it uses the warm Ray."""
    # Never removed: a process that has it open would hold a lock on a file that others cannot see.
    return os.path.join(fork_client.socket_dir(), "up.lock")


def find_running() -> WarmRay | None:
    """Return the running warm Ray, or None. Remove the up.json of one that was killed."""
    try:
        with open(state_path(), encoding="utf-8") as file:
            warm = WarmRay(**json.load(file))
    # TypeError: another version of the launcher has written other fields.
    except (OSError, ValueError, TypeError):
        return None
    if warm.is_alive():
        return warm
    with contextlib.suppress(OSError):
        os.unlink(state_path())
    return None


def write(warm: WarmRay) -> None:
    """Write up.json atomically."""
    path = state_path()
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(warm), file)
    # Not fsynced: whatever loses the file also ends the process that it describes.
    os.replace(file.name, path)


def initial_environment() -> dict[str, str]:
    """Return the environment at the start of this process, without variables that imports and the command line add."""
    # The memory of the environment at exec (proc(5)): `putenv` puts new values elsewhere. setproctitle overwrites it,
    # so no process that ray has renamed may call this.
    with open("/proc/self/environ", "rb") as file:
        entries = [os.fsdecode(entry).partition("=") for entry in file.read().split(b"\0") if entry]
    return {name: value for name, _, value in entries}


def digests() -> dict[str, str]:
    """Return a hash of each initial environment variable that can affect a run; values themselves may be secrets."""
    return {
        name: hashlib.sha256(os.fsencode(value)).hexdigest()[:16]
        for name, value in initial_environment().items()
        if name not in _SHELL_VARIABLES and not name.startswith(_SHELL_PREFIXES)
    }


def run_command(arguments: list[str]) -> None:
    """Run a command in a fork of the warm Ray's server and exit as it exits; return if that is not possible.

    Args:
        arguments: Value of `sys.argv`.
    """
    words = [word for word in arguments[1:] if not word.startswith("-")]
    # ADDRESS is set in a command that is such a fork already: without this test it would ask for a fork again.
    if not words or words[0] not in _COMMANDS or {"--fresh", "--help"} & set(arguments) or ADDRESS in os.environ:
        return
    warm = find_running()
    if warm is None:
        return
    lock = _acquire_shared()
    # Checked under the lock: from here on, an idle Ray cannot end (`close_if_unused`). The client holds the lock until
    # the command ends, not the fork, which dies with its client.
    if lock is None or not warm.is_alive():
        return
    why = _difference(warm) or _run_in_fork(warm, [os.path.abspath(arguments[0]), *arguments[1:]])
    # The command continues without it, perhaps for days, and must not keep an unused Ray running.
    os.close(lock)
    sys.stderr.write(f"not run on the Ray of `launcher up`: {why}; `launcher down` ends it\n")
    sys.stderr.flush()


def _run_in_fork(warm: WarmRay, arguments: list[str]) -> str | None:
    """Run a script in a fork and exit as it exits, or restore the environment and return why that is not possible."""
    before = dict(os.environ)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Also part of the request: `run_in_fork` sends the whole environment.
    os.environ[ADDRESS] = warm.address
    # Not the folder of the script: with `python -m launcher` that is the package, and sys.path[0] the working
    # directory.
    why = fork_client.run_in_fork(warm.socket, arguments, MODULES, sys.path[0])
    os.environ.clear()
    os.environ.update(before)
    return why


def _acquire_shared() -> int | None:
    """Acquire the lock as a user and hold it until this process ends; None if the warm Ray is about to end."""
    lock = os.open(lock_path(), os.O_CREAT | os.O_RDWR, 0o600)
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            # `is_used` holds the lock for a moment.
            time.sleep(0.02)
        else:
            return lock
    os.close(lock)
    return None


def _difference(warm: WarmRay) -> str | None:
    """Return how this command's interpreter or environment differs from the warm Ray's, or None."""
    if warm.python != sys.executable:
        return f"it was started with {warm.python}"
    current = digests()
    names = sorted(name for name in {*current, *warm.environment} if current.get(name) != warm.environment.get(name))
    return f"it was started with another value of {names[0]}" if names else None


def close_if_unused() -> bool:
    """Lock out new commands until this process ends; return False if a command is using the warm Ray."""
    # The descriptor stays open on purpose: the lock must hold until the process ends, however it ends.
    return _acquire_exclusive() is not None


def is_used() -> bool:
    """Return True if a command is using the warm Ray."""
    lock = _acquire_exclusive()
    if lock is None:
        return True
    # Closing the only descriptor also releases the lock.
    os.close(lock)
    return False


def _acquire_exclusive() -> int | None:
    """Acquire the lock against all commands; None if a command holds it."""
    lock = os.open(lock_path(), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        # flock, not lockf: locks of lockf belong to the process, and closing any descriptor of the file drops them.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def remove_state(pid: int) -> None:
    """Remove up.json if it describes the process with this pid, which is about to end."""
    warm = find_running()
    # Another `launcher up` may have replaced the file since.
    if warm is not None and warm.pid == pid:
        with contextlib.suppress(OSError):
            os.unlink(state_path())


def stop(warm: WarmRay) -> None:
    """Stop the warm Ray with all its processes, and wait until it has ended."""
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
    # Run by `local_ray.up`: an empty command makes the server start the zygote that later commands are forked from.
    running = find_running()
    if running is not None:
        sys.exit(_run_in_fork(running, [os.devnull]))
