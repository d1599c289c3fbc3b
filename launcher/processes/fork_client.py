"""Client of the fork server: Ray starts it in place of a worker process. Runs on every node; Linux.

It sends its arguments, environment and streams to the server (`fork_server.py`), follows the fork, and exits with its
exit code. If no server answers, it becomes the plain worker that Ray asked for, and one line in raylet.err says why.
It imports only the standard library, so that it starts in 10 ms (`python -I -S -E`).

Ray runs it in one of two ways:
- as the `setup_worker_path` of a local Ray: `fork_client.py --serialized-runtime-env-context=... --language=PYTHON
  default_worker.py ...` (the arguments of Ray's `setup_worker.py`, which takes half a second to import ray);
- as the `py_executable` of a runtime environment on a cluster: `fork_client.py default_worker.py ...`.
"""

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
"""Environment variable; `0` starts every worker as a plain process."""
SOCKET = "LAUNCHER_FORK_SOCKET"
"""Environment variable with the socket path of the server that a command started before its Ray."""
LENGTH = struct.Struct("I")
"""Length prefix of a message."""
STREAMS = 3
"""Standard input, output and error, sent as file descriptors with each request."""

# What a zygote of workers imports. Another list means another zygote, with its own copy of ray in memory.
_WORKER_MODULES = ("ray", "ray.data", "ray.train.torch", "ray.tune", "launcher.train.worker")
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
# The first request of its kind waits for the rest of the server's imports and for a zygote that imports ray.
_ANSWER_S = 60.0
# Forwarded to the fork. SIGKILL cannot be: the server kills the fork when the connection of its client closes.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""Directory that contains the package, in which `python -m launcher...` finds it."""


def main(arguments: list[str]) -> None:
    """Become the worker that Ray asked for. Never returns."""
    is_from_raylet = any(argument.startswith((_CONTEXT, _LANGUAGE)) for argument in arguments)
    worker = _apply_context(arguments) if is_from_raylet else arguments
    why = "the runtime environment needs more than a fork can provide" if worker is None else None
    if worker is not None:
        try:
            why = _run_worker(worker)
        except OSError as error:  # socket failures cost speed only
            why = str(error)
    if why is not None:
        _log(f"a worker starts without the fork server: {why}")
    if is_from_raylet:
        # Ray's own start of a worker, which also handles containers and other languages.
        script = next(argument for argument in arguments if argument.endswith("default_worker.py"))
        arguments = [os.path.join(os.path.dirname(script), "setup_worker.py"), *arguments]
    # exec instead of a child: this stays the process that Ray has started and watches.
    os.execv(sys.executable, [sys.executable, *arguments])


def ray_executable() -> str | None:
    """Return the `py_executable` with which Ray starts workers through this client on every node of a cluster.

    Returns:
        Shell command, which falls back to the plain interpreter on nodes without this file. None if the runtime
        environment has its own interpreter, or if forks are off or not supported.
    """
    job_environment = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    # With these keys the worker has other packages than this interpreter, whose imports a fork would have.
    own_interpreter = ("pip", "uv", "conda", "container", "image_uri", "py_executable")
    if is_off() or any(job_environment.get(key) for key in own_interpreter):
        return None
    client = os.path.abspath(__file__)
    # The directory of `ray` is that of the interpreter of the node, whose path may differ from the one here.
    plain = 'exec "$(dirname "$(command -v ray)")/python" "$@"'
    # Tested on the node, as this path is the driver's. If it has spaces, the test fails and the plain Python runs.
    choose = (
        f'if [ -x {sys.executable} ] && [ -f {client} ]; then exec {sys.executable} -I -S -E {client} "$@"; fi; {plain}'
    )
    # Ray 2.60 appends its arguments to this text (runtime_env/context.py): "$@" of the inner shell, $0 is `launcher`.
    return f"bash -c '{choose}' launcher"


def _run_worker(worker: list[str]) -> str | None:
    """Run a worker in a fork and exit as it exits; return only if no server could fork it.

    Returns:
        Reason why no server could. The node's server is started then, for later workers.
    """
    if os.environ.get(OFF) == "0":
        return f"{OFF}=0"
    command_socket = os.environ.get(SOCKET)
    why = run_in_fork(command_socket, worker, _WORKER_MODULES) if command_socket else f"{SOCKET} is not set"
    path = node_socket()
    if os.path.exists(path):
        why = run_in_fork(path, worker, _WORKER_MODULES)
    # A server that was killed leaves its socket behind, which refuses connections.
    if not os.path.exists(path) or (why or "").startswith(ConnectionRefusedError.__name__):
        _start_server(path)
    return why


def socket_dir() -> str:
    """Return the directory of this user's sockets; create it if it is missing.

    Raises:
        OSError: Another user could write to it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = os.path.join(base, "launcher") if base and os.path.isdir(base) else f"/tmp/launcher-{os.getuid()}"
    try:
        # Create first and check only a directory that exists: between a check and mkdir another user could create it.
        os.mkdir(path, 0o700)
    except FileExistsError:
        # Security: requests run code as this user. A symlink, or a directory that others can enter, is refused.
        status = os.lstat(path)
        if status.st_uid != os.getuid() or status.st_mode & 0o170077 != 0o040000:
            raise PermissionError(
                f"{path}: must belong to this user alone; run chmod 700 on it, or remove it"
            ) from None
    return path


def node_socket() -> str:
    """Return the socket path of this node's server, which the first worker without a server starts."""
    # One server per raylet: nodes that share a machine may differ in namespaces or limits.
    raylet = os.environ.get("RAY_RAYLET_PID", "0")
    # With the start time, as a later raylet may have the same pid and would find the socket of the earlier one.
    return os.path.join(socket_dir(), f"node-{raylet}-{process_began(int(raylet)) or 0}.sock")


def process_began(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot (proc(5), field 22 of /proc/PID/stat).

    Pid and start time together identify a process; the pid alone may belong to a later one.

    Returns:
        Start time; None if there is no such process, if it is a zombie, or if the system is not Linux.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name of the process, in brackets, may contain spaces and brackets: count after the last bracket.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    # Counted from field 3, the state. A zombie has ended, although its pid is still taken until its parent collects it.
    return None if fields[0] in "ZX" else int(fields[19])


def is_process(pid: int, began: int | None) -> bool:
    """Return True if the process is running that had this pid and start time (`process_began`)."""
    return began is not None and process_began(pid) == began


def connect(path: str) -> socket.socket:
    """Connect to a server of this user.

    Raises:
        OSError: There is no server, or another user runs it.
    """
    server = socket.socket(socket.AF_UNIX)
    server.settimeout(_ANSWER_S)
    try:
        server.connect(path)
        # The client checks as well: its request has its whole environment, which may hold secrets.
        if peer_of(server) != os.getuid():
            raise PermissionError(f"{path}: is served by another user")
    except OSError:
        server.close()
        raise
    return server


def peer_of(connection: socket.socket) -> int:
    """Return the user id of the process at the other end (SO_PEERCRED; the kernel guarantees it)."""
    # struct ucred: pid, uid, gid (unix(7)).
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def send(connection: socket.socket, body: bytes, descriptors: list[int]) -> None:
    """Send one message with file descriptors over a stream socket."""
    # The descriptors travel with the four bytes of the length. `send_fds` may send a longer buffer in part, and does
    # not repeat; `sendall` does, but takes no descriptors.
    socket.send_fds(connection, [LENGTH.pack(len(body))], descriptors)
    connection.sendall(body)


def redirect_streams(log: str) -> None:
    """Redirect standard input to /dev/null, and standard output and error to a log file that only this user reads."""
    null = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for number, descriptor in enumerate((null, file, file)):
        os.dup2(descriptor, number)
    # If a standard stream was closed before, `open` has returned its number, which must stay open.
    for descriptor in (null, file):
        if descriptor >= STREAMS:
            os.close(descriptor)


def is_off() -> bool:
    """Return True if workers must be plain processes."""
    return os.environ.get(OFF) == "0" or sys.platform != "linux"


def run_in_fork(
    path: str, arguments: list[str], modules: Sequence[str] = (), script_folder: str | None = None
) -> str | None:
    """Run a Python script in a fork and exit as it exits: same streams, environment, directory, limits, exit code.

    Args:
        path: Path of the server's socket.
        arguments: Path of the script and its arguments.
        modules: Modules to preload, including ray. The server keeps a process with them (a zygote) for later requests.
        script_folder: First entry of `sys.path`; None means the folder of the script.

    Returns:
        Reason why the server does not serve; otherwise this process ends with the fork.
    """
    # Besides arguments and environment, all that a process inherits from its parent: the fork's parent is the server,
    # so the fork sets these values itself (`fork._set_limits`).
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
            send(server, body, list(range(STREAMS)))
            answers = server.makefile("r", encoding="utf-8")
            answer = json.loads(answers.readline() or "{}")
            if "pid" not in answer:
                return str(answer.get("refused", "it ended"))
            # The fork may run for days before the next line comes.
            server.settimeout(None)
            _follow(answer["pid"], answer["began"], answers)
    # After a timeout the server may still fork for this request. The connection is closed by then, which makes the
    # server kill that fork (`_Server._lose_client`), so no worker runs twice for long.
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None  # not reached: _follow ends the process


def _follow(pid: int, began: int | None, answers: TextIO) -> None:
    """Forward signals to the fork, wait for it, and exit as it exits."""
    for number in (n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN):
        # Only now: before the fork exists, a signal has to end this process itself.
        signal.signal(number, lambda received, _: _send(pid, began, received))
    try:
        answer = answers.readline()  # empty if the server has died
    except OSError:
        answer = ""
    if not answer:
        # The fork outlives its server. This process must outlive the fork, or Ray would count the worker as lost.
        _wait(pid, began)
        os._exit(1)
    code = int(json.loads(answer)["exit"])
    if code < 0:  # killed by a signal: die by the same one, as Ray reads the cause from the status
        # Setting a handler of SIGKILL is an error, even the default one.
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


def _wait(pid: int, began: int | None) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    if is_process(pid, began):  # checked after pidfd_open, so that the descriptor cannot be of a later process
        select.select([descriptor], [], [])


def _send(pid: int, began: int | None, number: int) -> None:
    if is_process(pid, began):  # the pid may have been reused
        os.kill(pid, number)


def _log(text: str) -> None:
    sys.stderr.write(f"launcher: {text}\n")
    sys.stderr.flush()


def _umask() -> int:
    # umask(2) returns the mask only when it sets one.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _oom_score() -> int:
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        return int(file.read())


def _apply_context(arguments: list[str]) -> list[str] | None:
    """Apply the runtime environment in the arguments, as Ray's `setup_worker.py` does (ray 2.60).

    Returns:
        Script of the worker and its arguments; None if the environment needs more than variables.
    """
    serialized = next((a[len(_CONTEXT) :] for a in arguments if a.startswith(_CONTEXT)), "{}")
    context = json.loads(serialized or "{}")
    language = next((a[len(_LANGUAGE) :] for a in arguments if a.startswith(_LANGUAGE)), "PYTHON")
    needs_more = any(context.get(key) for key in ("command_prefix", "override_worker_entrypoint", "java_jars"))
    if language != "PYTHON" or needs_more or context.get("py_executable", sys.executable) != sys.executable:
        return None
    import re

    for name, value in (context.get("env_vars") or {}).items():
        # As `update_envs` of ray 2.60, _private/utils.py: values may use earlier variables; unknown ones are empty.
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    # Ray passes the flags of its own interpreter on in front of the script (ray 2.60, services._site_flags). A fork has
    # imported `site` long ago.
    return [a for a in arguments if not a.startswith((_CONTEXT, _LANGUAGE)) and a not in ("-s", "-S")]


def _start_server(path: str) -> None:
    """Start a server for later workers; it ends with the raylet.

    It is forked twice, so that init adopts it: a Ray worker kills its children when it ends.
    """
    raylet = os.environ.get("RAY_RAYLET_PID")
    if not raylet:
        return
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    # Away from the process group of this worker, which Ray kills when the worker ends.
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        redirect_streams(f"{path}.log")
        # Whoever reads the other end of an inherited pipe would wait for the server to end.
        os.closerange(STREAMS, os.sysconf("SC_OPEN_MAX"))
        os.environ.pop(SOCKET, None)
        # `-m` looks for the package in the working directory.
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "launcher.processes.fork_server", raylet])
    finally:
        # Reached only if something failed: this copy must not continue as a second worker.
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
