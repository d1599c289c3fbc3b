"""Start a Ray of this machine alone, side by side with whatever the command does meanwhile.

`begin()` starts it in a process of its own (the node), which ends when the command does; `LocalRay.address()` waits for
it. Compared with `ray.init()`: no dashboard, log monitor, autoscaler or API server, which nobody looks at here, and
workers are forks (`fork_server.py`). A user who wants Ray's dashboard starts `ray start --head` and names its address.
Runs in the command (LocalRay) and in the node's process (main).
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from launcher.processes import fork_client, fork_server
from launcher.processes.fork_server import ForkServerError

_START_S = 60.0
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
        process: The node's process.
        socket: Path of the fork server's socket; None where workers are plain processes.
        note: Reason why they are, for a person.
    """

    process: "subprocess.Popen[str]"
    socket: str | None
    note: str | None
    _address: str = ""

    @staticmethod
    def start(num_cpus: int, *, fork_here: bool) -> "LocalRay":
        """Begin to start Ray and the fork server; returns when the server has its imports.

        Args:
            num_cpus: Logical CPUs that Ray schedules with.
            fork_here: Whether this process may become the server's parent: it has one thread and has not imported ray.
                The imports are then there for the command as well. Otherwise the server is started by the first worker.
        """
        path = None if _is_off() else os.path.join(fork_client.folder(), f"command-{os.getpid()}.sock")
        environment = dict(os.environ)
        environment.pop(fork_client.SOCKET, None)
        if path is not None and fork_here:
            environment[fork_client.SOCKET] = path
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.processes.local_ray", json.dumps({"num_cpus": num_cpus})],
            cwd=_root_of_package(), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        note = None
        if path is not None and fork_here:
            try:
                fork_server.start_beside(path, os.getpid())
            except (ForkServerError, OSError) as error:
                note = str(error)
        return LocalRay(process, path if fork_here else None, note)

    def address(self) -> str:
        """Return the address of its GCS, as soon as it runs.

        Raises:
            LocalRayError: It did not start.
        """
        if not self._address:
            assert self.process.stdout is not None and self.process.stderr is not None
            ready, _, _ = select.select([self.process.stdout], [], [], _START_S)
            line = self.process.stdout.readline() if ready else ""
            if not line:
                self.process.kill()
                written = self.process.stderr.read().strip().splitlines() or ["it wrote nothing"]
                raise LocalRayError(f"a local Ray did not start ({written[-1]})")
            self._address = json.loads(line)["address"]
        return self._address

    def stop(self) -> None:
        """End Ray and all its processes, and wait for that."""
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


def begin(num_cpus: int, *, fork_here: bool = False) -> LocalRay:
    """Start the Ray of this command, or return the one that was begun; see `LocalRay.start`."""
    global _begun
    if _begun is None:
        for name, value in _RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        _begun = LocalRay.start(num_cpus, fork_here=fork_here)
    return _begun


def begun() -> LocalRay | None:
    """Return the Ray that this command has begun, or None."""
    return _begun


def end() -> None:
    """Stop the Ray that this command has begun, if there is one."""
    global _begun
    if _begun is not None:
        _begun.stop()
        _begun = None


def _is_off() -> bool:
    return os.environ.get(fork_client.OFF) == "0" or sys.platform != "linux"


def _root_of_package() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> None:
    """Run the node: start Ray, print its address, and stop it when standard input is closed."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python's own way to make an import fail: without the packages of Ray's dashboard, the agent that Ray starts on
    # each node loads a fifth of what it would (ray 2.60, services.start_raylet: --minimal).
    sys.modules["ray.dashboard.optional_deps"] = None  # type: ignore[assignment]
    node = _start_node(settings["num_cpus"])

    def stop(*_: object) -> None:
        node.kill_all_processes(check_alive=False, allow_graceful=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    print(json.dumps({"address": node.gcs_address}), flush=True)  # noqa: T201 -- the command reads it
    while sys.stdin.readline():
        continue
    stop()


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
    )
    return LeanNode(ray_params=parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


if __name__ == "__main__":
    main()
