"""Start a Ray of this machine alone, side by side with whatever the command does meanwhile.

`start_for_command()` starts it in a process of its own (the node), which ends when the command does;
`LocalRay.address()` waits for it. Compared with `ray.init()`: no dashboard, log monitor, autoscaler or API server,
which nobody looks at here, and workers are forks (`fork_server.py`). A user who wants Ray's dashboard starts `ray
start --head` and names its address. Runs in the command (LocalRay) and in the node's process (main).
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
from typing import IO, Any

from launcher.processes import fork_client, fork_server, warm_ray
from launcher.processes.environment import refuse_environment
from launcher.processes.fork_server import ForkServerError
from launcher.processes.warm_ray import WarmRay

_START_S, _LOOK_S = 60.0, 1.0
_STAY = "stay\n"
_MANY_CPUS = 256
"""Logical CPUs of a Ray that stays: they only schedule, and nobody knows yet what will run on it."""
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers yield to every other process (niceness 15), and nearly stop where another one computes.
    "RAY_worker_niceness": "0",
    # A process at each start that watches whether nodes are taken away, which nobody does with this one.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray Train and Ray Data give it to some of their workers; where all have it, one zygote serves them.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
_CLIENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fork_client.py")


class LocalRayError(Exception):
    """Ray could not be started here; says what its process wrote."""


@dataclass
class LocalRay:
    """A Ray of this machine, as its command sees it.

    Args:
        process: The node's process; None where it is not this command's (`launcher up`).
        note: Reason why workers are plain processes, for a person; None where they are forks.
        known_address: Address of its GCS, once it is known.
        log: What the node's process writes to standard error.
    """

    process: "subprocess.Popen[str] | None"
    note: str | None = None
    known_address: str = ""
    log: IO[str] | None = None

    @staticmethod
    def start(num_cpus: int, *, fork_here: bool, idle_s: float | None = None) -> "LocalRay":
        """Begin to start Ray and the fork server; returns when the server has its imports.

        Args:
            num_cpus: Logical CPUs that Ray schedules with.
            fork_here: Whether this process may become the server's parent: it has one thread and has not imported ray.
                The imports are then there for the command as well. Otherwise the server is started by the first worker.
            idle_s: Seconds without a command after which it ends; None lets it end with this process.

        Raises:
            ClusterError: The environment keeps it from starting.
        """
        refuse_environment()
        for name, value in _RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        note = path = None
        if fork_here and not _is_off():
            try:
                path = _command_socket()
            except OSError as error:
                note = str(error)
        environment = {name: value for name, value in os.environ.items() if name != fork_client.SOCKET}
        if path is not None:
            environment[fork_client.SOCKET] = path
        settings = {"num_cpus": num_cpus, "directory": os.getcwd(), "idle_s": idle_s}
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- stays open as long as both processes need it
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.processes.local_ray", json.dumps(settings)],
            cwd=_root_of_package(), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, start_new_session=True,
        )  # fmt: skip
        ray = LocalRay(process, note, log=log)
        if path is not None:
            try:
                fork_server.start_beside(path, os.getpid() if idle_s is None else process.pid)
            except (ForkServerError, OSError) as error:
                ray.note = str(error)
            except BaseException:  # Ctrl-C in the middle of the imports: nobody else knows of the node yet
                ray.stop()
                raise
        return ray

    def address(self) -> str:
        """Return the address of its GCS, as soon as it runs.

        Raises:
            LocalRayError: It did not start.
        """
        if not self.known_address:
            assert self.process is not None and self.process.stdout is not None and self.log is not None
            ready, _, _ = select.select([self.process.stdout], [], [], _START_S)
            line = self.process.stdout.readline() if ready else ""
            if not line:
                self.process.kill()
                self.process.wait()
                self.log.seek(0)
                written = self.log.read().strip().splitlines() or ["it wrote nothing"]
                raise LocalRayError(f"a local Ray did not start ({written[-1]})")
            self.known_address = json.loads(line)["address"]
        return self.known_address

    def stop(self) -> None:
        """End Ray and all its processes, and wait for that; one that is not this command's stays."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # what its process waits for
        try:
            self.process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_begun: LocalRay | None = None


def local_cpus(demand: float) -> int:
    """Return how many logical CPUs a local Ray has, however few cores there are: they only schedule."""
    return max(os.cpu_count() or 1, int(demand + 1))


def start_for_command(num_cpus: int, *, fork_here: bool = False) -> LocalRay:
    """Start the Ray of this command, or return the one that was begun; see `LocalRay.start`."""
    global _begun
    if _begun is None:
        address = os.environ.get(warm_ray.ADDRESS)
        _begun = LocalRay(None, None, address) if address else LocalRay.start(num_cpus, fork_here=fork_here)
    return _begun


def current() -> LocalRay | None:
    """Return the Ray that this command has begun, or None."""
    return _begun


def stop_current() -> None:
    """Stop the Ray that this command has begun, if there is one."""
    global _begun
    if _begun is not None:
        _begun.stop()
        _begun = None


def up(idle_s: float) -> WarmRay:
    """Start a Ray with a fork server that stays when this command has ended.

    Args:
        idle_s: Seconds without a command after which it ends.

    Raises:
        LocalRayError: It did not start, or commands could not be forked.
    """
    environment = warm_ray.digests()  # before imports add variables of their own
    ray = LocalRay.start(_MANY_CPUS, fork_here=True, idle_s=idle_s)
    assert ray.process is not None and ray.process.stdin is not None
    if ray.note is not None or _is_off():
        ray.stop()
        raise LocalRayError(f"commands cannot be forked here: {ray.note or f'{fork_client.OFF}=0'}")
    path = _command_socket()
    warm = WarmRay(
        ray.process.pid, fork_client.process_began(ray.process.pid), ray.address(), path, environment, sys.executable,
        time.time(),
    )  # fmt: skip
    warm_ray.write(warm)
    subprocess.run(
        [sys.executable, "-m", "launcher.processes.warm_ray"], cwd=_root_of_package(),
        env=warm_ray.initial_environment(), check=False,
    )  # fmt: skip
    ray.process.stdin.write(_STAY)
    ray.process.stdin.close()
    return warm


def _command_socket() -> str:
    """Return the path of the fork server's socket of this command."""
    return os.path.join(fork_client.folder(), f"command-{os.getpid()}.sock")


def _is_off() -> bool:
    return os.environ.get(fork_client.OFF) == "0" or sys.platform != "linux"


def _root_of_package() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> None:
    """Run the node: start Ray, print its address, and stop it when standard input is closed, or after idle minutes."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    os.chdir(settings["directory"])  # which workers inherit
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python's own way to make an import fail: without the packages of Ray's dashboard, the agent that Ray starts on
    # each node loads a fifth of what it would (ray 2.60, services.start_raylet: --minimal).
    sys.modules["ray.dashboard.optional_deps"] = None  # type: ignore[assignment]
    node = _start_node(settings["num_cpus"])

    def stop(*_: object) -> None:
        warm_ray.forget(os.getpid())
        node.kill_all_processes(check_alive=False, allow_graceful=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    sys.stdout.write(json.dumps({"address": node.gcs_address}) + "\n")
    sys.stdout.flush()
    if sys.stdin.readline() == _STAY:  # otherwise the command has ended
        _wait_until_idle(settings["idle_s"], node)
    stop()


def _wait_until_idle(idle_s: float, node: Any) -> None:
    """Wait until no command has used this Ray for some seconds, or Ray itself has died."""
    used = time.monotonic()
    while not node.dead_processes():
        time.sleep(_LOOK_S)
        if warm_ray.is_used():
            used = time.monotonic()
        elif time.monotonic() - used > idle_s and warm_ray.close_if_unused():
            return


def _start_node(num_cpus: int) -> Any:
    """Start GCS and raylet as `ray.init()` does (ray 2.60, _private/worker.py), with less beside them."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LeanNode(Node):
        """A node without an API server."""

        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            self._webui_url = ""

    ensure_token_if_auth_enabled({}, create_token_if_missing=True)
    parameters = RayParams(
        num_cpus=num_cpus,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]  # a flag, typed as a string
        no_monitor=True,
        setup_worker_path=None if _is_off() else _CLIENT,
        # Workers that Ray starts before anybody asks have no runtime environment, which all of ours have.
        _system_config={"prestart_worker_first_driver": False},  # type: ignore[dict-item]  # typed for strings
    )
    return LeanNode(ray_params=parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


if __name__ == "__main__":
    main()
