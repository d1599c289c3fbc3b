"""Local Ray: a single-node cluster on this machine, started in the background of a command.

`start_for_command()` starts it in a separate process (the node), which ends with the command; `LocalRay.address()`
waits for it. It starts faster than `ray.init()`: no dashboard, log monitor, autoscaler or API server, and its workers
are forks (`fork_server.py`). For Ray's dashboard, run `ray start --head` and set `cluster.address`. Runs in the
command (`LocalRay`) and in the node's process (`main`).
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launcher.errors import ClusterError
from launcher.processes import fork_client, fork_server, warm_ray
from launcher.processes.fork_server import ForkServerError
from launcher.processes.warm_ray import WarmRay

_START_S = 60.0
_POLL_S = 1.0
_STAY = "stay\n"
_MANY_CPUS = 256
"""Logical CPUs of a Ray that stays. They matter only for scheduling, and later commands are not known yet."""
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's default niceness of 15 lets workers nearly stop while another process computes.
    "RAY_worker_niceness": "0",
    # Saves one process per start: a local node is never preempted.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray Train and Ray Data set it for some workers. Set for all, one zygote serves them (zygotes differ by RAY_*).
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
# Longest socket path below Ray's temporary directory (ray 2.60, _private/node.py), with a pid of seven digits. The
# kernel limits the whole path (sun_path, unix(7)).
_SOCKET = "/ray/session_2026-11-29_04-08-46_123456_4194304/sockets/plasma_store"
_LONGEST = (107 if sys.platform.startswith("linux") else 103) - len(_SOCKET)
# Size of Ray's first log files. A disk with less free space counts as full.
_PROBE_BYTES = 1 << 16


class LocalRayError(Exception):
    """Ray could not be started on this machine; the text has the last line that its process wrote."""


@dataclass
class LocalRay:
    """Handle of a local Ray in the command that uses it."""

    process: "subprocess.Popen[str] | None"
    """Process of the node; None if another command started it (`launcher up`)."""
    note: str | None = None
    """Reason why workers are plain processes, for the user; None if they are forks."""
    known_address: str = ""
    """Address of the GCS, once known."""
    log: IO[str] | None = None
    """File with the standard error of the node's process."""

    @staticmethod
    def start(num_cpus: int, *, fork_here: bool, idle_s: float | None = None) -> "LocalRay":
        """Start Ray in the background, and the fork server; return when the server's imports are done.

        Args:
            num_cpus: Logical CPUs for Ray's scheduler.
            fork_here: True to fork the server off this process, which must have one thread and no ray imported. The
                command then has the same imports already. Otherwise the first worker starts the server.
            idle_s: Seconds without a command after which Ray ends; None means that it ends with this process.

        Raises:
            ClusterError: The environment keeps Ray from starting.
        """
        check_environment()
        # The user's own values win. Set in this process too: Ray Train passes some of them on from the command (ray
        # 2.60, get_env_vars_to_propagate).
        for name, value in _RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        note = path = None
        if fork_here and not fork_client.is_off():
            try:
                path = _command_socket()
            except OSError as error:
                note = str(error)
        # A socket that this process has inherited belongs to the server of another command.
        environment = {name: value for name, value in os.environ.items() if name != fork_client.SOCKET}
        if path is not None:
            environment[fork_client.SOCKET] = path
        settings = {"num_cpus": num_cpus, "directory": os.getcwd(), "idle_s": idle_s}
        # A file, as a pipe that nobody reads would block the node once it is full.
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- stays open as long as the node runs
        # Started before the imports below, so that both run at the same time. Its standard input is its sign of life:
        # the pipe closes however this process ends, and the node then stops Ray. A session of its own, as Ctrl-C must
        # reach only the command, which stops the node in order. `-m` needs ROOT; `main` changes to `directory`.
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.processes.local_ray", json.dumps(settings)],
            cwd=fork_client.ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, start_new_session=True,
        )  # fmt: skip
        ray = LocalRay(process, note, log=log)
        if path is not None:
            try:
                # The server forks off this process and closes its copy of the node's input, or the node would outlive
                # the command. It ends with the command, or with the node of a Ray that stays.
                fork_server.start_beside(path, os.getpid() if idle_s is None else process.pid)
            except (ForkServerError, OSError) as error:
                ray.note = str(error)
            except BaseException:  # Ctrl-C during the imports: no other code would stop the node
                ray.stop()
                raise
        return ray

    def address(self) -> str:
        """Wait until Ray runs and return the address of its GCS.

        Raises:
            LocalRayError: Ray did not start.
        """
        if not self.known_address:
            assert self.process is not None and self.process.stdout is not None and self.log is not None
            ready, _, _ = select.select([self.process.stdout], [], [], _START_S)
            line = self.process.stdout.readline() if ready else ""
            if not line:
                # Even SIGKILL leaves no process of Ray behind (`spawn_reaper` in `_start_node`).
                self.process.kill()
                self.process.wait()
                self.log.seek(0)
                lines = self.log.read().strip().splitlines() or ["its process wrote nothing"]
                raise LocalRayError(f"a local Ray did not start ({lines[-1]})")
            self.known_address = json.loads(line)["address"]
        return self.known_address

    def stop(self) -> None:
        """Stop Ray with all its processes and wait for them; do nothing if another command started it."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            # The node waits for this (`main`).
            self.process.stdin.close()
        try:
            self.process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_current: LocalRay | None = None


def local_cpus(demand: float) -> int:
    """Return the logical CPUs of a local Ray: enough for the demand, even above the number of cores."""
    return max(os.cpu_count() or 1, int(demand + 1))


def start_for_command(num_cpus: int, *, fork_here: bool = False) -> LocalRay:
    """Start the Ray of this command (see `LocalRay.start`), or return the one that is already starting."""
    global _current
    # ADDRESS is set in a command that was forked from a server of `launcher up`: its Ray is running already.
    if _current is None:
        address = os.environ.get(warm_ray.ADDRESS)
        _current = LocalRay(None, None, address) if address else LocalRay.start(num_cpus, fork_here=fork_here)
    return _current


def current() -> LocalRay | None:
    """Return the Ray that this command has started, or None."""
    return _current


def stop_current() -> None:
    """Stop the Ray that this command has started, if any."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


def check_environment() -> None:
    """Check that Ray can create its sockets, logs and token; Ray itself would hang or fail with an obscure error.

    Raises:
        ClusterError: It cannot. Names the variable to change.
    """
    name, place = _find_temporary()
    if len(os.fsencode(place)) > _LONGEST:
        raise ClusterError(
            f"{name}: {place} is {len(os.fsencode(place))} bytes long, and above {_LONGEST} bytes the paths of Ray's "
            "sockets are too long for the system; set RAY_TMPDIR to a shorter directory, such as /tmp"
        )
    try:
        os.makedirs(f"{place}/ray", exist_ok=True)
        # Written, not only created: a full disk still creates files. Unbuffered, so that the write itself fails.
        with tempfile.TemporaryFile(dir=f"{place}/ray", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise ClusterError(
            f"{name}: {place}/ray cannot be written ({os.strerror(error.errno or 0)}), where Ray keeps its sockets and "
            "logs; free space and set permissions there, or set RAY_TMPDIR to another directory of this machine"
        ) from error
    _check_home()


def _find_temporary() -> tuple[str, str]:
    """Return the variable that sets Ray's temporary directory, and the directory, in the order in which Ray looks."""
    # ray 2.60, _common/utils.py: TMPDIR counts on Linux alone.
    for name in ("RAY_TMPDIR", *(("TMPDIR",) if sys.platform.startswith("linux") else ())):
        if name in os.environ:
            return name, os.path.abspath(os.environ[name])
    return "RAY_TMPDIR", "/tmp" if os.name == "posix" else tempfile.gettempdir()


def _check_home() -> None:
    """Check that Ray can write its token to the home directory, if it needs one there."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    folder = Path.home() / ".ray"
    try:
        # An existing token needs to be readable only; Ray writes one only if there is none.
        if os.access(folder / "auth_token", os.R_OK):
            return
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ClusterError(
            f"HOME: {folder} cannot be written ({os.strerror(error.errno or 0)}), where Ray keeps its token "
            "(RAY_AUTH_MODE is token); set HOME to a writable directory, or RAY_AUTH_TOKEN to a token"
        ) from error


def up(idle_s: float) -> WarmRay:
    """Start a Ray with a fork server that keeps running after this command.

    Args:
        idle_s: Seconds without a command after which it ends.

    Raises:
        LocalRayError: Ray did not start, or commands cannot be forked.
    """
    # Before imports add variables: later commands are compared as they start.
    environment = warm_ray.digests()
    ray = LocalRay.start(_MANY_CPUS, fork_here=True, idle_s=idle_s)
    assert ray.process is not None and ray.process.stdin is not None
    if ray.note is not None or fork_client.is_off():
        ray.stop()
        raise LocalRayError(f"commands cannot be forked here: {ray.note or f'{fork_client.OFF}=0'}")
    path = _command_socket()
    began = fork_client.process_began(ray.process.pid) or 0
    warm = WarmRay(ray.process.pid, began, ray.address(), path, environment, sys.executable, time.time())
    # First, as the process below finds the server through this file.
    warm_ray.write(warm)
    # It makes the server start the zygote of commands. It needs the environment of a new command: zygotes differ by
    # RAY_* variables, and this process has added some (`_RAY_SETTINGS`).
    subprocess.run(
        [sys.executable, "-m", "launcher.processes.warm_ray"], cwd=fork_client.ROOT,
        env=warm_ray.initial_environment(), check=False,
    )  # fmt: skip
    # Last: until here an error or Ctrl-C in this process closes the pipe without this line, and the node ends.
    ray.process.stdin.write(_STAY)
    ray.process.stdin.close()
    return warm


def _command_socket() -> str:
    """Return the socket path of this command's fork server."""
    return os.path.join(fork_client.socket_dir(), f"command-{os.getpid()}.sock")


def main() -> None:
    """Run the node: start Ray, print its address, stop it when standard input closes or after the idle time."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    os.chdir(settings["directory"])  # workers inherit it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # `None` makes an import fail. Without the optional packages of its dashboard, Ray starts the agent of each node
    # with --minimal, which loads a fifth of the modules (ray 2.60, services.start_raylet).
    sys.modules["ray.dashboard.optional_deps"] = None  # type: ignore[assignment]
    # Until the handler below is set, SIGTERM ends this process at once, and Ray's end with it (`spawn_reaper`).
    node = _start_node(settings["num_cpus"])

    def stop(*_: object) -> None:
        # First, so that no new command finds a Ray that is ending. `check_alive` would raise if a process has died
        # before, and leave the others running. `os._exit`, as this is a signal handler too: SystemExit could be caught.
        warm_ray.remove_state(os.getpid())
        node.kill_all_processes(check_alive=False, allow_graceful=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    sys.stdout.write(json.dumps({"address": node.gcs_address}) + "\n")
    sys.stdout.flush()
    # An empty line means that the command has ended, even by SIGKILL.
    if sys.stdin.readline() == _STAY:
        _wait_until_idle(settings["idle_s"], node)
    stop()


def _wait_until_idle(idle_s: float, node: Any) -> None:
    """Wait until no command has used this Ray for `idle_s` seconds, or until one of its processes has died."""
    last_used = time.monotonic()
    while not node.dead_processes():
        # `is_used` takes the lock for a moment, during which a command has to retry (`_LOCK_TRIES`). Rare enough at
        # this rate. Ray is not asked: a command that is still importing has no connection to it.
        time.sleep(_POLL_S)
        if warm_ray.is_used():
            last_used = time.monotonic()
        elif time.monotonic() - last_used > idle_s and warm_ray.close_if_unused():
            return


def _start_node(num_cpus: int) -> Any:
    """Start GCS and raylet as `ray.init()` does (ray 2.60, _private/worker.py), without optional services."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LeanNode(Node):
        """Ray node without an API server."""

        # `include_dashboard=False` only leaves modules out: ray 2.60 starts the server's process anyway (node.py). The
        # empty address is the value without a dashboard.
        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            self._webui_url = ""

    ensure_token_if_auth_enabled({}, create_token_if_missing=True)
    parameters = RayParams(
        num_cpus=num_cpus,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]  # a boolean that Ray annotates as str
        no_monitor=True,
        setup_worker_path=None if fork_client.is_off() else os.path.abspath(fork_client.__file__),
        # Prestarted workers have no runtime environment; all of ours have one, so they would never be used.
        _system_config={"prestart_worker_first_driver": False},  # type: ignore[dict-item]  # annotated for strings
    )
    # `spawn_reaper`: Ray's processes end with this one even if it is killed (ray 2.60: PR_SET_PDEATHSIG, or a process
    # that waits for the end of a pipe). `shutdown_at_exit` is off, as `main` ends by `os._exit`.
    return LeanNode(ray_params=parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


if __name__ == "__main__":
    main()
