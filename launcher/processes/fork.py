"""Set-up of a forked worker, so that it behaves like a new process. Runs in the fork.

A fork inherits state of the server that a new process would not have (signal handlers, random states, environment),
and lacks what a new process inherits from the one that starts it (limits, niceness, umask). Both are corrected here.
"""

import contextlib
import importlib
import os
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from launcher.processes.fork_client import STREAMS

Request = dict[str, Any]
# Taken when this module is imported, before a command changes them.
_FILTERS = list(warnings.filters)


@dataclass(frozen=True)
class Added:
    """Changes that imports have made to a process, and would make in a new process too."""

    path: tuple[str, ...] = ()
    """Entries added at the front of `sys.path`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables added, used where a request does not set them."""


def become(request: Request, streams: list[int], path: Sequence[str], added: Added) -> NoReturn:
    """Run the script of a request in this fork, as a new process would, and exit.

    Args:
        request: Request of `fork_client.run_in_fork`.
        streams: File descriptors of standard input, output and error.
        path: Value of `sys.path` in a process without a script and without PYTHONPATH.
        added: Changes made by the imports of the server.
    """
    code = 1
    try:
        # A session of its own: Ray kills the process group of a worker that ends, which must not be the server's.
        os.setsid()
        # The fork has inherited the server's handlers; a new process has the defaults.
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in request["ignored_signals"]:
            signal.signal(number, signal.SIG_IGN)
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        for stream in streams:
            if stream >= STREAMS:
                os.close(stream)
        _set_limits(request)
        # The request comes second: a variable that the client has set wins over the one that an import would set.
        set_environment({**added.environment, **request["environment"]})
        os.chdir(request["directory"])
        sys.argv = request["arguments"]
        # In place, as modules may hold a reference to the list.
        sys.path[:] = [*added.path, request["script_folder"], *entries_of(request["environment"]), *path]
        warnings.filters = list(_FILTERS)
        _renew_random_states()
        # While the script runs it is sys.modules["__main__"], which pickle needs. `run_path` restores the server's on
        # return, so atexit functions see that one again.
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        # As in Python: None is success, a number is the code, anything else is 1.
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201 -- as Python does
    except BaseException:  # noqa: BLE001 -- as Python does with an uncaught exception
        traceback.print_exc()
    finally:
        _exit_as_python_does(code)


def _exit_as_python_does(code: int) -> NoReturn:
    """Finish as the interpreter would, then call `os._exit`: a normal exit would return into the server's code."""
    import atexit
    import threading

    try:
        # The order of Py_FinalizeEx: non-daemon threads, atexit functions, buffers. Daemon threads are not awaited.
        threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Also if an atexit function has raised or was interrupted: returning would run the server twice.
        os._exit(code & 255)


def set_environment(environment: dict[str, str]) -> None:
    """Replace the environment of this process, for Python and for C libraries (`putenv`)."""
    # Item by item through putenv and unsetenv. Assigning another dict to `os.environ` would not reach C libraries.
    os.environ.clear()
    os.environ.update(environment)


def _set_limits(request: Request) -> None:
    """Apply what a process inherits from its parent: the client stands for the parent, not the server."""
    import resource

    os.umask(request["umask"])
    # Only root may raise a hard limit; for others the one of the server is the most they can have.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, wanted_hard = request["open_files"]
    limits = (soft, wanted_hard) if wanted_hard <= hard else (min(soft, hard), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    # Sets the calling thread alone; threads that start later inherit it. So it must come before any of them.
    os.sched_setaffinity(0, request["affinity"])
    with contextlib.suppress(PermissionError):
        # setpriority sets the value, `os.nice` would add to the one of the server. To lower it needs a privilege.
        os.setpriority(os.PRIO_PROCESS, 0, request["niceness"])
    with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(request["oom_score"]))


def _renew_random_states() -> None:
    """Seed NumPy, which would draw the same numbers in every fork. `random` and `uuid` reseed themselves."""
    # `random` does it through os.register_at_fork; uuid4 has no state, it reads os.urandom. NumPy does neither.
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def entries_of(environment: dict[str, str]) -> list[str]:
    """Return the entries of PYTHONPATH as Python adds them to `sys.path`."""
    return [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def import_ray(modules: list[str]) -> None:
    """Import modules, including ray, without drawing from the random state of Ray's C++ core.

    If the generator of the C++ core is used before a fork, all forks inherit its state and draw the same ids for their
    tasks and objects, and Ray confuses them. Modules that define actor classes draw an id for each class at import
    (ray 2.60, actor.py), so `ActorClassID.from_random` is replaced during the imports.
    """
    # actor.py looks the name up in its own globals at each use (`from ray import ActorClassID`), so replacing it there
    # is enough, and nothing else in Ray sees the replacement.
    actor: Any = importlib.import_module("ray.actor")
    original = actor.ActorClassID

    class FromSystem:
        """Source of actor class ids that uses the system's random numbers instead."""

        @staticmethod
        def from_random() -> object:
            return original(os.urandom(original.size()))

    actor.ActorClassID = FromSystem
    try:
        for name in modules:
            importlib.import_module(name)
    finally:
        actor.ActorClassID = original


def draws_differ() -> bool:
    """Return True if two forks of this process draw different Ray ids (a check on `import_ray`)."""
    import ray

    drawn = []
    for _ in range(2):
        # In two forks: two draws in one process differ even if all forks start from the same state.
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, ray.UniqueID.from_random().binary())
            os._exit(0)
        # Waiting before reading cannot block: an id fits into the buffer of the pipe.
        os.waitpid(pid, 0)
        drawn.append(os.read(reading, 64))
        os.close(reading)
        os.close(writing)
    return drawn[0] != drawn[1]
