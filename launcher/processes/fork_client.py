"""Start one of Ray's worker processes as a fork of the node's fork server. Runs on any node, in place of the worker.

Uses the standard library alone, so that it starts in 10 ms (`python -I -S -E`); the server is `fork_server.py`. Where
no server serves, this process becomes the plain worker that Ray asked for, and one line in raylet.err says why.

Ray runs it in one of two ways:
- as the `setup_worker_path` of a local Ray: `fork_client.py --serialized-runtime-env-context=... --language=PYTHON
  default_worker.py ...` (what Ray's own `setup_worker.py` is given, which spends half a second on importing ray);
- as the `py_executable` of a runtime environment, on a cluster: `fork_client.py default_worker.py ...`.
"""

import array
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import TextIO

OFF = "LAUNCHER_FORK_SERVER"
"""Environment variable: `0` starts every worker as a plain process."""
SOCKET = "LAUNCHER_FORK_SOCKET"
"""Environment variable: path of the server that a command started before its Ray."""
LENGTH = struct.Struct("I")
STREAMS = 3

_OF_A_WORKER = ("ray", "ray.data", "ray.train.torch", "ray.tune", "launcher.train.worker")
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="
_ANSWER_S = 60.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main(arguments: list[str]) -> None:
    """Become the worker that Ray asked for; never returns."""
    from_raylet = any(argument.startswith((_CONTEXT, _LANGUAGE)) for argument in arguments)
    worker = _apply_context(arguments) if from_raylet else arguments
    why = "the runtime environment needs more than a fork can give" if worker is None else None
    if worker is not None:
        try:
            why = _run_worker(worker)
        except OSError as error:  # whatever is wrong with sockets, it costs speed alone
            why = str(error)
    if why is not None:
        _log(f"a worker starts without the fork server: {why}")
    if from_raylet:
        # Ray's own way, which knows containers and other languages, too.
        script = next(argument for argument in arguments if argument.endswith("default_worker.py"))
        arguments = [os.path.join(os.path.dirname(script), "setup_worker.py"), *arguments]
    os.execv(sys.executable, [sys.executable, *arguments])


def ray_executable() -> str | None:
    """Return the `py_executable` with which Ray starts workers through this client on every node of a cluster.

    Returns:
        Shell command that falls back to the plain interpreter where this file is missing; None where the runtime
        environment brings an interpreter of its own, or there is no fork.
    """
    given = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    others = ("pip", "uv", "conda", "container", "image_uri", "py_executable")
    if os.environ.get(OFF) == "0" or sys.platform != "linux" or any(given.get(key) for key in others):
        return None
    here = os.path.abspath(__file__)
    plain = 'exec "$(dirname "$(command -v ray)")/python" "$@"'
    choose = (
        f'if [ -x {sys.executable} ] && [ -f {here} ]; then exec {sys.executable} -I -S -E {here} "$@"; fi; {plain}'
    )
    return f"bash -c '{choose}' launcher"


def _run_worker(worker: list[str]) -> str | None:
    """Run a worker in a fork, and end as it ends.

    Returns:
        Reason why no server serves. One is started then, for the workers after this one.
    """
    if os.environ.get(OFF) == "0":
        return f"{OFF}=0"
    given = os.environ.get(SOCKET)
    why = run_in_fork(given, worker, _OF_A_WORKER) if given else "none is named"
    path = node_socket()
    if os.path.exists(path):
        why = run_in_fork(path, worker, _OF_A_WORKER)
    if not os.path.exists(path) or (why or "").startswith(ConnectionRefusedError.__name__):  # it was killed
        _start_server(path)
    return why


def folder() -> str:
    """Return the folder of this user's sockets, made if it is missing.

    Raises:
        OSError: Somebody else could write to it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = os.path.join(base, "launcher") if base and os.path.isdir(base) else f"/tmp/launcher-{os.getuid()}"
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:
            raise PermissionError(f"{path}: must be a folder of this user alone (chmod 700), or be removed") from None
    return path


def node_socket() -> str:
    """Return the path of the socket of this node's own server, which the first worker starts that finds none."""
    # One server per raylet: nodes that share a machine may have namespaces or limits of their own.
    raylet = os.environ.get("RAY_RAYLET_PID", "0")
    return os.path.join(folder(), f"node-{raylet}-{process_began(int(raylet))}.sock")


def process_began(pid: int) -> int:
    """Return when a process began, in clock ticks since boot (proc(5), field 22); 0 where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def connect(path: str) -> socket.socket:
    """Connect to a server of this same user.

    Raises:
        OSError: There is none, or it is another user's.
    """
    server = socket.socket(socket.AF_UNIX)
    server.settimeout(_ANSWER_S)
    try:
        server.connect(path)
        if peer_of(server) != os.getuid():
            raise PermissionError(f"{path}: is served by another user")
    except OSError:
        server.close()
        raise
    return server


def peer_of(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def run_in_fork(
    path: str, arguments: list[str], modules: Sequence[str] = (), script_folder: str | None = None
) -> str | None:
    """Run a Python script in a fork, and end as it ends: same streams, environment, directory, limits, exit code.

    Args:
        path: Path of the server's socket.
        arguments: Path of the script, and its arguments.
        modules: What the fork has loaded already, ray among them; the server keeps a process that has, for the next.
        script_folder: First entry of `sys.path`; None is the folder of the script.

    Returns:
        Reason why the server does not serve; otherwise this process ends with the fork.
    """
    request = {
        "arguments": arguments,
        "modules": list(modules),
        "script_folder": os.path.dirname(os.path.abspath(arguments[0])) if script_folder is None else script_folder,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": _umask(),
        "ignored_signals": [n for n in _SIGNALS if signal.getsignal(n) is signal.SIG_IGN],
        "niceness": os.nice(0),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "affinity": sorted(os.sched_getaffinity(0)),
        "oom_score": _oom_score(),
    }
    body = json.dumps(request).encode()
    try:
        with connect(path) as server:
            streams = array.array("i", range(STREAMS))
            server.sendmsg([LENGTH.pack(len(body))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            server.sendall(body)
            answers = server.makefile("r", encoding="utf-8")
            answer = json.loads(answers.readline() or "{}")
            if "pid" not in answer:
                return str(answer.get("refused", "it ended"))
            server.settimeout(None)
            _follow(answer["pid"], answer["began"], answers)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None  # not reached: _follow ends the process


def _follow(pid: int, began: int, answers: TextIO) -> None:
    """Pass signals on to the fork, wait for its end, and end likewise."""
    for number in (n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN):
        signal.signal(number, lambda received, _: _send(pid, began, received))
    try:
        answer = answers.readline()  # nothing where the server has died
    except OSError:
        answer = ""
    if not answer:
        # The fork outlives its server; this process stays until it has ended, or Ray would count it as lost.
        _wait(pid, began)
        os._exit(1)
    code = int(json.loads(answer)["exit"])
    if code < 0:  # ended by a signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


def _wait(pid: int, began: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    if process_began(pid) == began:
        select.select([descriptor], [], [])


def _send(pid: int, began: int, number: int) -> None:
    if process_began(pid) == began:  # else the number may be another process's by now
        os.kill(pid, number)


def _log(text: str) -> None:
    sys.stderr.write(f"launcher: {text}\n")
    sys.stderr.flush()


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _oom_score() -> int:
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        return int(file.read())


def _apply_context(arguments: list[str]) -> list[str] | None:
    """Apply the runtime environment that the raylet gives, as Ray's `setup_worker.py` does (ray 2.60).

    Returns:
        Script of the worker and its arguments; None where the environment is more than variables.
    """
    given = next((a[len(_CONTEXT) :] for a in arguments if a.startswith(_CONTEXT)), "{}")
    context = json.loads(given or "{}")
    language = next((a[len(_LANGUAGE) :] for a in arguments if a.startswith(_LANGUAGE)), "PYTHON")
    others = any(context.get(key) for key in ("command_prefix", "override_worker_entrypoint", "java_jars"))
    if language != "PYTHON" or others or context.get("py_executable", sys.executable) != sys.executable:
        return None
    import re

    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    return [a for a in arguments if not a.startswith((_CONTEXT, _LANGUAGE)) and a not in ("-s", "-S")]


def _start_server(path: str) -> None:
    """Start a server for the workers after this one, which ends with the raylet.

    It becomes a grandchild that is nobody's: a worker of Ray kills its children when it ends.
    """
    raylet = os.environ.get("RAY_RAYLET_PID")
    if not raylet:
        return
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(f"{path}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        for number, file in enumerate((null, log, log)):
            os.dup2(file, number)
        os.closerange(STREAMS, os.sysconf("SC_OPEN_MAX"))
        os.environ.pop(SOCKET, None)
        os.chdir(_ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "launcher.processes.fork_server", raylet])
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
