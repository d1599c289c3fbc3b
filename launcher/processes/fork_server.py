"""Fork Ray's worker processes from one process that has done the heavy imports. Runs on any node; Linux.

A start of two workers runs some twenty Python processes, and nearly all of their time is the same imports. The server
imports them once; a fork of it is a worker process after 20 ms and shares its pages. `fork_client.py` is what Ray
starts in place of a worker: it hands its arguments, environment and streams over, and ends as the fork ends.

What holds (ray 2.60; tests/processes/):
- The server never imports `ray`: its C++ part reads RAY_* variables, RAY_JOB_ID among them, when it is loaded. A fork
  that has loaded it for one set of RAY_* variables (a zygote) serves all workers with the same set. No random id may
  be drawn in a zygote: all its forks would go on to draw the same ids, and Ray would take two tasks for one.
- The outcome of an import may depend on the environment. The variables that imports ask for are recorded; a request
  that differs in one of them is refused, and the client starts a plain process.
- The server has one thread (jemalloc's own survives a fork), or it does not serve: a lock that another thread holds
  would stay locked in the fork. Nor does it serve where an import initialised CUDA, which no fork can use.
- A fork has a session of its own: Ray kills the process group of a worker that ends.
- Processes of the same user alone are served (SO_PEERCRED), through a socket in a folder that is the user's alone.
- The server ends with the process that it watches (the command, or the node's raylet), and when packages or the
  launcher's code change beneath it. Forks outlive a server that is killed: it costs nothing but speed.
"""

import array
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from launcher.processes import preload
from launcher.processes.fork import Added, Request, become, draws_differ, entries_of, import_ray, set_environment
from launcher.processes.fork_client import LENGTH, STREAMS, node_socket, peer_of, process_began

_ACCEPT_S, _KILL_AFTER_S = 5.0, 5.0
_MOST_ZYGOTES = 6
_UNFIT = 3
"""Exit code of a zygote whose forks would not be what new processes are."""


class ForkServerError(Exception):
    """This process must not be forked."""


@dataclass(frozen=True)
class Baseline:
    """What the server was when it loaded its modules; requests are compared with it.

    Args:
        loaded: What its imports depended on.
        path: `sys.path` of a process without a script and without PYTHONPATH.
        fingerprint: State of the installed packages and of the launcher's code.
    """

    loaded: preload.Loaded
    path: tuple[str, ...] = field(default_factory=lambda: _bare_path())
    fingerprint: str = field(default_factory=lambda: fingerprint())

    def refuses(self, request: Request) -> str | None:
        """Return the reason why a fork would not be what a new process is, or None."""
        name = preload.difference(self.loaded, request["environment"])
        if name is not None:
            return f"its imports were made with another value of {name}"
        own = _shadowing([e for e in entries_of(request["environment"]) if e not in self.path])
        return f"PYTHONPATH has a {own} of its own" if own is not None else None


def start_beside(path: str, watch: int) -> None:
    """Load what this process and workers need, fork a server off, and go on. The server loads the rest for itself.

    Args:
        path: Path of its socket.
        watch: Process with which the server ends.

    Raises:
        ForkServerError: This process cannot be forked safely.
    """
    loaded = preload.load(preload.SHARED)
    check_forkable()
    sys.stdout.flush()
    sys.stderr.flush()
    ready, to_child = os.pipe()
    if os.fork() == 0:
        os.setsid()
        # The command's pipes among them: whoever waits for their end would wait for the server's.
        os.closerange(STREAMS, to_child)
        os.closerange(to_child + 1, os.sysconf("SC_OPEN_MAX"))
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(f"{path}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        for number, file in enumerate((null, log, log)):
            os.dup2(file, number)
        _close(null, log)
        _run(path, watch, loaded, lambda: os.close(to_child))
    os.close(to_child)
    os.read(ready, 1)  # nothing, as soon as the child's end is closed: the socket is there
    os.close(ready)


def check_forkable() -> None:
    """Check that a fork of this process can do all that a new process can.

    Raises:
        ForkServerError: ray or CUDA is initialised, or threads run that would be missing in a fork.
    """
    if "ray" in sys.modules:
        raise ForkServerError("ray is imported, which keeps the environment that it was loaded in")
    others = other_threads()
    if others:
        raise ForkServerError(f"threads run that would be missing in a fork: {', '.join(others)}")
    if _is_cuda_initialised():
        raise ForkServerError("an import has initialised CUDA, which no fork can use")


def other_threads() -> list[str]:
    """Return the names of this process's threads that a fork would lack."""
    # OpenBLAS ends its threads before a fork, and starts them again when they are needed (pthread_atfork).
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    names = []
    for thread in sorted(os.listdir("/proc/self/task"), key=int)[1:]:
        with open(f"/proc/self/task/{thread}/comm", encoding="ascii", errors="replace") as file:
            names.append(file.read().strip())
    return [name for name in names if name != "jemalloc_bg_thd"]  # pyarrow's; jemalloc starts it anew in a fork


def _is_cuda_initialised() -> bool:
    """Return True if any library has initialised the CUDA driver in this process."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False  # it is not loaded
    not_initialised = 3  # CUDA_ERROR_NOT_INITIALIZED, cuda.h
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != not_initialised)


def fingerprint() -> str:
    """Return a text that changes when packages are installed or the launcher's own code changes."""
    found = []
    for directory in dict.fromkeys(sys.path):
        with contextlib.suppress(OSError):
            entries = [entry for entry in os.scandir(directory) if entry.name.endswith("-info")]
            found += [f"{entry.path} {entry.stat().st_mtime_ns}" for entry in entries]
    for directory, _, files in os.walk(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
        paths = [os.path.join(directory, name) for name in files if name.endswith(".py")]
        found += [f"{path} {os.stat(path).st_mtime_ns}" for path in paths]
    return "\n".join(sorted(found))


def send(connection: socket.socket, body: bytes, descriptors: list[int]) -> None:
    """Send one message with file descriptors over a stream socket."""
    rights = array.array("i", descriptors)
    connection.sendmsg([LENGTH.pack(len(body))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """Receive one message with its file descriptors; None where the other side has closed."""
    size = array.array("i").itemsize
    header, rights, _, _ = connection.recvmsg(LENGTH.size, socket.CMSG_SPACE(size * (STREAMS + 1)))
    if len(header) < LENGTH.size:
        return None
    descriptors = array.array("i")
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % size])
    (length,), body = LENGTH.unpack(header), bytearray()
    while len(body) < length:  # not a byte more: the next message's would come without its descriptors
        part = connection.recv(length - len(body))
        if not part:
            return None
        body += part
    return bytes(body), list(descriptors)


class _Server:
    """A process that forks: the node's server, with a listening socket, or a zygote, with a channel from the server.

    Args:
        baseline: What the server was when it loaded its modules.
        source: The listening socket, or the channel.
        added: What imports have added in a zygote; None in the node's server.
    """

    def __init__(self, baseline: Baseline, source: socket.socket, added: Added | None = None) -> None:
        self._baseline, self._source, self._added = baseline, source, added
        self._is_zygote = added is not None
        self._children: dict[int, socket.socket | None] = {}
        self._zygotes: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._ends, self._may_load_ray = False, True
        self._watch: int | None = None
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Ctrl-C on a terminal reaches the whole group; the command decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        self._selector.register(self._wake, selectors.EVENT_READ, self._reap)
        self._selector.register(source, selectors.EVENT_READ, self._take if self._is_zygote else self._accept)

    def run(self, watch: int | None = None) -> None:
        """Serve until the end of the watched process, of the channel, or of the environment as it was.

        Args:
            watch: File descriptor of the watched process (pidfd_open(2)).
        """
        self._watch = watch
        if watch is not None:
            self._selector.register(watch, selectors.EVENT_READ, self._end_children)
        while not (self._ends and not self._children):
            for key, _ in self._selector.select():
                key.data()

    def _accept(self) -> None:
        if self._ends:
            return  # closed by another event of the same moment
        connection, _ = self._source.accept()
        connection.settimeout(_ACCEPT_S)
        try:
            message = receive(connection) if peer_of(connection) == os.getuid() else None
        except OSError:
            message = None
        if message is None or len(message[1]) != STREAMS:
            connection.close()
            return
        body, streams = message
        try:
            request = json.loads(body)
            why = self._baseline.refuses(request)
        except (ValueError, KeyError, TypeError):  # not one of our clients
            _close(connection, *streams)
            return
        if fingerprint() != self._baseline.fingerprint:
            why = "packages or the launcher's code have changed since it started; it ends"
            self._end()
        if why is not None:
            _answer(connection, {"refused": why})
            _close(connection, *streams)
        elif (
            self._may_load_ray
            and request["modules"]
            and self._hand_over(request, body, [connection.fileno(), *streams])
        ):
            _close(connection, *streams)
        else:
            self._fork(request, connection, streams)

    def _take(self) -> None:
        """Take a request that the server has handed over."""
        message = None if self._ends else receive(self._source)
        if message is None:
            self._end()
            return
        request, (connection, *streams) = json.loads(message[0]), message[1]
        self._fork(request, socket.socket(fileno=connection), streams)

    def _hand_over(self, request: Request, body: bytes, descriptors: list[int]) -> bool:
        """Let the zygote with its modules and RAY_* variables serve a request; False where there is none."""
        variables = sorted(pair for pair in request["environment"].items() if pair[0].startswith("RAY_"))
        key = repr((request["modules"], variables))
        for _ in range(2):
            channel = self._zygotes.pop(key, None) or self._start_zygote(request, descriptors)
            try:
                send(channel, body, descriptors)
            except OSError:  # it was killed; another takes its place
                channel.close()
                continue
            self._zygotes[key] = channel  # the last one used is the last in order
            while len(self._zygotes) > _MOST_ZYGOTES:
                self._zygotes.pop(next(iter(self._zygotes))).close()
            return True
        return False

    def _start_zygote(self, request: Request, descriptors: list[int]) -> socket.socket:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _close(*descriptors)  # the first client's: who waits for the end of its output would wait for the zygote's
            self._forget()
            _run_zygote(self._baseline, theirs, request)
        theirs.close()
        self._children[pid] = None
        return ours

    def _fork(self, request: Request, connection: socket.socket, streams: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._forget()
            connection.close()
            if self._is_zygote:
                self._source.close()
            become(request, streams, self._baseline.path, self._added or Added((), self._baseline.loaded.added))
        _close(*streams)
        self._children[pid] = connection
        _answer(connection, {"pid": pid, "began": process_began(pid)})
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._lose_client(pid))

    def _lose_client(self, pid: int) -> None:
        """End a fork whose client has been killed: Ray takes such a worker for dead."""
        connection = self._children.get(pid)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
            self._children[pid] = None
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Pass the exit codes of ended forks on to their clients."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._children.pop(pid, None)
            if connection is None and os.waitstatus_to_exitcode(status) == _UNFIT:
                self._may_load_ray = False  # from here on, each fork loads ray for itself
            if connection is not None:
                self._selector.unregister(connection)
                _answer(connection, {"exit": os.waitstatus_to_exitcode(status)})
                connection.close()

    def _end(self) -> None:
        """Serve nobody any more; forks stay until they end."""
        if self._ends:
            return
        self._ends = True
        self._selector.unregister(self._source)
        if not self._is_zygote:
            with contextlib.suppress(OSError):
                os.unlink(self._source.getsockname())
        self._source.close()
        for channel in self._zygotes.values():
            channel.close()
        self._zygotes.clear()

    def _end_children(self) -> None:
        """End with the watched process, and leave no fork behind."""
        self._end()
        until = time.monotonic() + _KILL_AFTER_S
        number: int = signal.SIGTERM
        while self._children:
            for pid in self._children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            while self._children and time.monotonic() < until:
                self._selector.select(0.1)
                self._reap()
            number = signal.SIGKILL
            until += _KILL_AFTER_S

    def _forget(self) -> None:
        """Close in a fork what belongs to the server."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        if not self._is_zygote:
            self._source.close()
        _close(*[file for file in (self._watch, self._wake, self._woken) if file is not None])
        _close(*filter(None, self._children.values()), *self._zygotes.values())


def _answer(connection: socket.socket, answer: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the client is gone; nobody needs the answer
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _close(*files: "socket.socket | int") -> None:
    for file in files:
        if isinstance(file, int):
            os.close(file)
        else:
            file.close()


def _run(path: str, watch: int, loaded: preload.Loaded, is_listening: Callable[[], object]) -> NoReturn:
    """Serve at a socket until the watched process has ended."""
    code = 1
    try:
        watched = os.pidfd_open(watch)
        listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)  # in a folder that nobody else can enter
        listener.listen(128)  # clients wait for their turn while the rest is loaded
        is_listening()
        baseline = Baseline(preload.load(preload.SERVER, loaded))
        check_forkable()
        gc.collect()
        gc.freeze()  # pages that the collector does not touch stay shared
        _Server(baseline, listener).run(watched)
        code = 0
    except BaseException:  # noqa: BLE001 -- must never return into the code that was forked
        traceback.print_exc()
    finally:
        _remove_files(path, and_log=code == 0)
        os._exit(code)


def _remove_files(path: str, and_log: bool) -> None:
    """Remove the socket and the lock of a server that ends, and its log if nothing went wrong."""
    for suffix in ("", ".lock", *((".log",) if and_log else ())):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def _run_zygote(baseline: Baseline, channel: socket.socket, request: Request) -> NoReturn:
    """Load ray with a worker's environment, and fork the workers that share its RAY_* variables."""
    code = 1
    try:
        environment = request["environment"]
        set_environment({**baseline.loaded.added, **environment})
        sys.path[:] = [*entries_of(environment), *baseline.path]
        before = set(sys.path)
        import_ray(request["modules"])
        if other_threads() or not draws_differ():
            os._exit(_UNFIT)
        gc.collect()
        gc.freeze()
        added = Added(
            tuple(entry for entry in sys.path if entry not in before),
            {name: value for name, value in os.environ.items() if environment.get(name) != value},
        )
        _Server(baseline, channel, added).run()
        code = 0
    except BaseException:  # noqa: BLE001 -- must never return into the server's code
        traceback.print_exc()
    finally:
        os._exit(code)


def _bare_path() -> tuple[str, ...]:
    """Return `sys.path` without the script's folder, which comes first, and without PYTHONPATH."""
    from_environment = set(entries_of(dict(os.environ)))
    return tuple(entry for entry in sys.path[1:] if entry not in from_environment)


def _shadowing(entries: list[str]) -> str | None:
    """Return a loaded top-level package that a new process would load from one of these folders instead, or None."""
    for directory in entries:
        if directory.endswith("/ray/thirdparty_files"):
            continue  # ray puts it in front for itself, with packages that it shares with others
        try:
            names = {entry.name.removesuffix(".py") for entry in os.scandir(directory)}
        except OSError:
            continue  # Python passes over it, too
        for name in names & sys.modules.keys():
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and not os.path.abspath(file).startswith(os.path.join(directory, "")):
                return name
    return None


def main() -> NoReturn:
    """Serve the workers of a raylet: `python -m launcher.processes.fork_server PID-OF-THE-RAYLET`."""
    import fcntl

    watch, path = int(sys.argv[1]), node_socket()
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os._exit(0)  # another worker was as quick
    _run(path, watch, preload.load(preload.SHARED), lambda: None)


if __name__ == "__main__":
    main()
