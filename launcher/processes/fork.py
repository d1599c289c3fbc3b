"""What happens in a fork of the fork server, so that it is what a new process would be. Runs in the fork.

A fork inherits what a new process would not have (signal handlers, random states, the server's environment) and lacks
what it would inherit from its parent (limits, niceness): all of it is set here.
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
_FILTERS = list(warnings.filters)  # before a command silences them


@dataclass(frozen=True)
class Added:
    """What imports have added to a process, which they would add in a new one likewise.

    Args:
        path: Entries in front of `sys.path`.
        environment: Variables, where a new process was not given them.
    """

    path: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def become(request: Request, streams: list[int], path: Sequence[str], added: Added) -> NoReturn:
    """Run the script of a request in this fork, as a new process would.

    Args:
        request: What `fork_client.run_in_fork` has sent.
        streams: Descriptors of standard input, output and error.
        path: `sys.path` of a process without a script and without PYTHONPATH.
        added: What imports of the server have added.
    """
    code = 1
    try:
        os.setsid()
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
        set_environment({**added.environment, **request["environment"]})
        os.chdir(request["directory"])
        sys.argv = request["arguments"]
        sys.path[:] = [*added.path, request["script_folder"], *entries_of(request["environment"]), *path]
        warnings.filters = list(_FILTERS)
        _renew_random_states()
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201 -- as Python itself does
    except BaseException:  # noqa: BLE001 -- as Python itself does with whatever a script raises
        traceback.print_exc()
    finally:
        _exit_as_python_does(code)


def _exit_as_python_does(code: int) -> NoReturn:
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 255)


def set_environment(environment: dict[str, str]) -> None:
    """Make these the variables of this process, for Python and for C alike."""
    os.environ.clear()
    os.environ.update(environment)


def _set_limits(request: Request) -> None:
    """Take over what a process inherits from its parent, which is another one here."""
    import resource

    os.umask(request["umask"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, asked = request["open_files"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, asked) if asked <= hard else (min(soft, hard), hard))
    os.sched_setaffinity(0, request["affinity"])
    with contextlib.suppress(PermissionError):  # only a lower niceness than the server's needs a right
        os.setpriority(os.PRIO_PROCESS, 0, request["niceness"])
    with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(request["oom_score"]))


def _renew_random_states() -> None:
    """Seed what would be the same in every fork; Python's own `random`, `tempfile` and `uuid` do it themselves."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def entries_of(environment: dict[str, str]) -> list[str]:
    """Return the entries of PYTHONPATH as Python puts them into `sys.path`."""
    return [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def import_ray(modules: list[str]) -> None:
    """Import modules, ray among them, without drawing from the random state of its C++ part."""
    actor: Any = importlib.import_module("ray.actor")
    plain = actor.ActorClassID

    class FromSystem:
        """Ids of the actor classes that modules define, from the system's random numbers (ray 2.60, actor.py)."""

        @staticmethod
        def from_random() -> object:
            return plain(os.urandom(plain.size()))

    actor.ActorClassID = FromSystem
    try:
        for name in modules:
            importlib.import_module(name)
    finally:
        actor.ActorClassID = plain


def draws_differ() -> bool:
    """Return True if two forks of this process draw different ids."""
    import ray

    drawn = []
    for _ in range(2):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, ray.UniqueID.from_random().binary())
            os._exit(0)
        os.waitpid(pid, 0)
        drawn.append(os.read(reading, 64))
        os.close(reading)
        os.close(writing)
    return drawn[0] != drawn[1]
