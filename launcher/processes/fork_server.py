"""Fork server: forks Ray's worker processes from one process with all heavy imports done. Runs on every node; Linux.

Starting two workers runs about twenty Python processes, which spend nearly all of their time on the same imports.

- The **server** does these imports once, without ray. It accepts requests at a Unix socket.
- A **zygote** is a fork of the server that has loaded ray for one set of RAY_* variables. It forks the workers that
  share this set.
- A **worker** is a fork of a zygote. It is ready after 20 ms and shares memory pages with its zygote.
- A **client** (`fork_client.py`) is the process that Ray starts in place of a worker. It sends arguments, environment
  and streams to the server, and exits as its worker exits.

Rules that keep a fork equivalent to a new process (ray 2.60; tests/processes/):

- Ray: its C++ core reads RAY_* variables, including RAY_JOB_ID, when it is loaded. So the server never imports it, and
  zygotes are separate per set of variables. A zygote must not draw a random id: its forks would inherit the state of
  the generator and draw the same ids, and Ray would confuse their tasks (`fork.import_ray`, `fork.draws_differ`).
- Threads: only the forking thread exists in a fork, and a lock that another thread holds stays locked there forever.
  So the server must have one thread. jemalloc's background thread is an exception, as jemalloc restarts it.
- CUDA cannot be used in a fork of a process that has initialised it. So the server must not initialise it.
- Environment: the result of an import may depend on it. A request that differs in a variable read by the imports is
  refused, and the client starts a plain process.
- Descriptors: a fork inherits all open files. It closes the server's sockets and pipes, or their other ends would
  never see them closed.
- Security: only processes of the same user are served (SO_PEERCRED), at a socket in a directory of this user alone.
- Lifetime: the server ends with the process that it watches (the command or the raylet), and when installed packages
  or the launcher's code change. Forks outlive a killed server, which costs speed only: the next worker starts another.
"""

import contextlib
import fcntl
import gc
import glob
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import NoReturn

from launcher.processes import preload
from launcher.processes.fork import Added, Request, become, draws_differ, entries_of, import_ray, set_environment
from launcher.processes.fork_client import (
    LENGTH,
    ROOT,
    STREAMS,
    node_socket,
    peer_of,
    process_began,
    redirect_streams,
    send,
)

_ACCEPT_S = 5.0
_KILL_AFTER_S = 5.0
_MAX_ZYGOTES = 6
_UNFIT = 3
"""Exit code of a zygote whose forks would not be equivalent to new processes."""


class ForkServerError(Exception):
    """This process cannot be forked safely."""


@dataclass(frozen=True)
class Baseline:
    """State of the server after its imports, with which requests are compared."""

    loaded: preload.Loaded
    """Environment that its imports depended on."""
    path: tuple[str, ...] = field(default_factory=lambda: _bare_path())
    """Value of `sys.path` in a process without a script and without PYTHONPATH."""
    fingerprint: str = field(default_factory=lambda: fingerprint())
    """Hash-like text of the installed packages and the launcher's code."""

    def refusal(self, request: Request) -> str | None:
        """Return the reason why a fork would differ from a new process, or None if it would not."""
        name = preload.difference(self.loaded, request["environment"])
        if name is not None:
            return f"its imports were made with another value of {name}"
        package = _find_shadowing([e for e in entries_of(request["environment"]) if e not in self.path])
        return f"PYTHONPATH has a {package} of its own" if package is not None else None


def start_beside(path: str, watch: int) -> None:
    """Import what this process and its workers share, then fork the server, which imports the rest itself.

    Args:
        path: Path of the server's socket.
        watch: Pid of the process with which the server ends.

    Raises:
        ForkServerError: This process cannot be forked safely.
    """
    loaded = preload.load(preload.SHARED)
    check_forkable()
    # A fork writes text that is still buffered a second time.
    sys.stdout.flush()
    sys.stderr.flush()
    ready, to_child = os.pipe()
    if os.fork() == 0:
        os.setsid()
        # Close all inherited files: a reader at the other end of the command's pipes would wait for the server to end.
        os.closerange(STREAMS, to_child)
        os.closerange(to_child + 1, os.sysconf("SC_OPEN_MAX"))
        redirect_streams(f"{path}.log")
        _run_server(path, watch, loaded, to_child, None)
    # With a copy of the writing end open here, the pipe would never end.
    os.close(to_child)
    os.read(ready, 1)  # returns when the child closes its end: the socket is listening
    os.close(ready)


def check_forkable() -> None:
    """Check that a fork of this process would work like a new process.

    Raises:
        ForkServerError: Ray is imported, CUDA is initialised, or other threads are running.
    """
    if "ray" in sys.modules:
        raise ForkServerError("ray is imported and has already read its environment variables")
    others = other_threads()
    if others:
        raise ForkServerError(f"threads are running that a fork would lack: {', '.join(others)}")
    if _is_cuda_initialised():
        raise ForkServerError("an import has initialised CUDA, which cannot be used in a fork")


def other_threads() -> list[str]:
    """Return the names of the threads of this process that a fork would lack."""
    # A trial fork first: OpenBLAS ends its threads before a fork and restarts them on demand (pthread_atfork).
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    names = []
    # Not `threading.enumerate`, which does not know the threads of C libraries.
    for thread in sorted(os.listdir("/proc/self/task"), key=int)[1:]:
        with open(f"/proc/self/task/{thread}/comm", encoding="ascii", errors="replace") as file:
            names.append(file.read().strip())
    return [name for name in names if name != "jemalloc_bg_thd"]  # pyarrow's; jemalloc restarts it in a fork


def _is_cuda_initialised() -> bool:
    """Return True if any library has initialised the CUDA driver in this process."""
    import ctypes

    try:
        # RTLD_NOLOAD: never loads the driver itself. torch could answer only for its own use of CUDA.
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False  # libcuda is not loaded
    not_initialised = 3  # CUDA_ERROR_NOT_INITIALIZED, cuda.h
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != not_initialised)


def fingerprint() -> str:
    """Return a text that changes when packages are installed or the launcher's code changes: paths and times."""
    packages = (f"{glob.escape(directory)}/*-info" for directory in dict.fromkeys(sys.path))
    lines = []
    for pattern in (*packages, f"{glob.escape(ROOT)}/launcher/**/*.py"):
        for path in glob.iglob(pattern, recursive=True):
            # Times instead of hashes, as the server compares them at every request. A file may vanish meanwhile.
            with contextlib.suppress(OSError):
                lines.append(f"{path} {os.stat(path).st_mtime_ns}")
    return "\n".join(sorted(lines))


def receive(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """Receive one message with its file descriptors; None if the other side has closed."""
    # One more than the streams: a request to a zygote also carries the client's connection.
    header, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, STREAMS + 1)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    body = bytearray()
    while len(body) < length:  # never read beyond this message: the descriptors of the next one would be lost
        part = connection.recv(length - len(body))
        if not part:
            return None
        body += part
    return bytes(body), descriptors


class _Server:
    """Event loop of a forking process: the server with a listening socket, or a zygote with a channel from the server.

    Args:
        baseline: State of the server after its imports.
        source: Listening socket, or channel.
        added: Changes made by a zygote's imports; None in the server.
        lock: File descriptor of the lock against other servers of the node; None in a zygote and beside a command.
    """

    def __init__(
        self, baseline: Baseline, source: socket.socket, added: Added | None = None, lock: int | None = None
    ) -> None:
        self._baseline, self._source, self._added, self._lock = baseline, source, added, lock
        self._is_zygote = added is not None
        self._children: dict[int, socket.socket | None] = {}
        self._zygotes: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._is_ending = False
        self._can_use_zygotes = True
        self._watch: int | None = None
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        # A signal writes a byte to this pipe, which wakes `select`: no work is done inside a signal handler.
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Ctrl-C in a terminal signals the whole process group; only the command handles it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        self._selector.register(self._wake, selectors.EVENT_READ, self._reap)
        self._selector.register(
            source, selectors.EVENT_READ, self._receive_request if self._is_zygote else self._accept
        )

    def run(self, watch: int | None = None) -> None:
        """Serve until the watched process ends, the channel closes, or the installation changes; wait for all forks.

        Args:
            watch: File descriptor of the watched process (pidfd_open(2)); None in a zygote.
        """
        self._watch = watch
        if watch is not None:
            self._selector.register(watch, selectors.EVENT_READ, self._end_children)
        while not (self._is_ending and not self._children):
            for key, _ in self._selector.select():
                key.data()

    def _accept(self) -> None:
        if self._is_ending:
            return  # another event of the same `select` has closed the socket
        connection, _ = self._source.accept()
        # There is one thread: a client that sends nothing blocks all others for this long per read.
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
            why = self._baseline.refusal(request)
        except (ValueError, KeyError, TypeError):  # not a request
            _close(connection, *streams)
            return
        if fingerprint() != self._baseline.fingerprint:
            why = "installed packages or the launcher's code have changed since it started; it ends"
            self._end()
        if why is not None:
            _answer(connection, {"refused": why})
            _close(connection, *streams)
            return
        may_have_zygote = self._can_use_zygotes and request["modules"]
        if may_have_zygote and self._hand_over(request, body, [connection.fileno(), *streams]):
            _close(connection, *streams)
        else:
            self._fork(request, connection, streams)

    def _receive_request(self) -> None:
        """Receive a request that the server has passed to this zygote."""
        message = None if self._is_ending else receive(self._source)
        if message is None:
            self._end()
            return
        request, (connection, *streams) = json.loads(message[0]), message[1]
        self._fork(request, socket.socket(fileno=connection), streams)

    def _hand_over(self, request: Request, body: bytes, descriptors: list[int]) -> bool:
        """Pass a request to the zygote with its modules and RAY_* variables; return False if none can be started."""
        variables = sorted(pair for pair in request["environment"].items() if pair[0].startswith("RAY_"))
        key = repr((request["modules"], variables))
        # Twice, as a zygote that was killed is only noticed when a request is sent to it.
        for _ in range(2):
            channel = self._zygotes.pop(key, None) or self._start_zygote(request, descriptors)
            try:
                send(channel, body, descriptors)
            except OSError:  # the zygote was killed; start another
                channel.close()
                continue
            self._zygotes[key] = channel  # re-inserted last: the first entry is the least recently used
            # A zygote whose channel is closed accepts nothing more, and ends after its last fork.
            while len(self._zygotes) > _MAX_ZYGOTES:
                self._zygotes.pop(next(iter(self._zygotes))).close()
            return True
        return False

    def _start_zygote(self, request: Request, descriptors: list[int]) -> socket.socket:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _close(*descriptors)  # of the first client: a reader of its output would wait for the zygote to end
            self._close_inherited()
            _run_zygote(self._baseline, theirs, request)
        theirs.close()
        self._children[pid] = None
        return ours

    def _fork(self, request: Request, connection: socket.socket, streams: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._close_inherited()
            connection.close()
            if self._is_zygote:
                self._source.close()
            become(request, streams, self._baseline.path, self._added or Added((), self._baseline.loaded.added))
        _close(*streams)
        self._children[pid] = connection
        # The start time is certain here: the pid cannot be reused before `_reap` collects the fork.
        _answer(connection, {"pid": pid, "began": process_began(pid)})
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._lose_client(pid))

    def _lose_client(self, pid: int) -> None:
        """Kill a fork whose client has been killed: Ray considers this worker dead."""
        connection = self._children.get(pid)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
            self._children[pid] = None
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Collect the exit codes of ended forks and send them to their clients."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        # Signals merge: one byte may stand for several ended forks, so collect until none is left.
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._children.pop(pid, None)
            if connection is None and os.waitstatus_to_exitcode(status) == _UNFIT:
                self._can_use_zygotes = False  # from now on each fork imports ray itself
            if connection is not None:
                self._selector.unregister(connection)
                _answer(connection, {"exit": os.waitstatus_to_exitcode(status)})
                connection.close()

    def _end(self) -> None:
        """Stop serving. Running forks continue."""
        if self._is_ending:
            return
        self._is_ending = True
        self._selector.unregister(self._source)
        if not self._is_zygote:
            with contextlib.suppress(OSError):
                os.unlink(self._source.getsockname())
        self._source.close()
        if self._lock is not None:
            # Another server may start now; this one waits for its last fork, perhaps for days.
            os.close(self._lock)
            self._lock = None
        for channel in self._zygotes.values():
            channel.close()
        self._zygotes.clear()

    def _end_children(self) -> None:
        """Stop serving and end all forks: SIGTERM, then SIGKILL after 5 s. Runs when the watched process has ended."""
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

    def _close_inherited(self) -> None:
        """Close in a fork the descriptors that belong to the server."""
        # First, or a signal in the fork would wake the server through the common pipe. Then close the selector instead
        # of unregistering from it: a fork shares the server's epoll set, and would change it for the server too.
        signal.set_wakeup_fd(-1)
        self._selector.close()
        if not self._is_zygote:
            self._source.close()
        # With the lock: a fork that held it would keep the successor of a killed server from starting.
        _close(*[file for file in (self._watch, self._wake, self._woken, self._lock) if file is not None])
        _close(*filter(None, self._children.values()), *self._zygotes.values())


def _answer(connection: socket.socket, answer: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the client has ended
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _close(*files: "socket.socket | int") -> None:
    for file in files:
        if isinstance(file, int):
            os.close(file)
        else:
            file.close()


def _run_server(path: str, watch: int, loaded: preload.Loaded, ready: int | None, lock: int | None) -> NoReturn:
    """Run the server until the watched process has ended, then exit; close `ready` when it listens."""
    code = 1
    try:
        watched = os.pidfd_open(watch)
        listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)  # in a directory that only this user can enter
        listener.listen(128)  # clients wait here during the remaining imports
        if ready is not None:
            os.close(ready)
        baseline = Baseline(preload.load(preload.SERVER, loaded))
        check_forkable()
        gc.collect()
        # The collector would write to the pages of all objects, and written pages are no longer shared.
        gc.freeze()
        _Server(baseline, listener, lock=lock).run(watched)
        code = 0
    except BaseException:  # noqa: BLE001 -- must not return into the code of the forked process
        traceback.print_exc()
    finally:
        # While the watched process runs, a successor may use them, and its socket. After an error the log is kept, and
        # a socket that nobody listens at, which refuses connections.
        if code == 0 and process_began(watch) is None:
            for suffix in (".lock", ".log"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + suffix)
        os._exit(code)


def _run_zygote(baseline: Baseline, channel: socket.socket, request: Request) -> NoReturn:
    """Run a zygote: import ray with a worker's environment, then fork the workers that share its RAY_* variables."""
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
    except BaseException:  # noqa: BLE001 -- must not return into the server's code
        traceback.print_exc()
    finally:
        os._exit(code)


def _bare_path() -> tuple[str, ...]:
    """Return `sys.path` without its first entry (the folder of the script) and without PYTHONPATH."""
    from_environment = set(entries_of(dict(os.environ)))
    return tuple(entry for entry in sys.path[1:] if entry not in from_environment)


def _find_shadowing(entries: list[str]) -> str | None:
    """Return a loaded top-level package that a new process would import from one of these folders instead, or None."""
    for directory in entries:
        if directory.endswith("/ray/thirdparty_files"):
            continue  # ray's vendored packages, which it puts first for itself
        try:
            names = {entry.name.removesuffix(".py") for entry in os.scandir(directory)}
        except OSError:
            continue  # Python ignores such entries too
        for name in names & sys.modules.keys():
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and not os.path.abspath(file).startswith(os.path.join(directory, "")):
                return name
    return None


def main() -> NoReturn:
    """Run the server of a raylet's workers: `python -m launcher.processes.fork_server PID-OF-THE-RAYLET`."""
    watch, path = int(sys.argv[1]), node_socket()
    # Released however this process ends, as no fork keeps a copy of the descriptor.
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os._exit(0)  # another worker has started a server
    _run_server(path, watch, preload.load(preload.SHARED), None, lock)


if __name__ == "__main__":
    main()
