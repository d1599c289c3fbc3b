"""The command line: registers the commands and turns errors into sentences and exit codes. Runs on the client.

Importing this module loads neither torch nor ray; a command imports them when it needs them. Read `train.py` next.
Exit codes: 0 success, 1 the run failed, 2 the user can fix something, 130 interrupted.
"""

import errno
import logging
import os
import re
import signal
import sys
import warnings
from typing import Annotated

import typer

from launcher.cli import compare, doctor, evaluate, init, jobs, kube, predict, rows, runs, tasks, train, tune, up
from launcher.cli.options import ERR, print_line
from launcher.errors import LauncherError, RunInterrupted, SpecError, UserError
from launcher.processes import local_ray
from launcher.processes.warm_ray import QUIET

app = typer.Typer(
    help="Distributed fine-tuning on Ray and DeepSpeed. The loss curve depends on the job file, not on the cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # in typer's default mode, help keeps the line breaks of a docstring
)
# `--help` lists the commands in this order.
for _module in (init, train, tune, evaluate, predict, compare, rows, runs, tasks, jobs, kube, doctor, up):
    app.add_typer(_module.commands)

_DIRECTORIES = "output.storage, TMPDIR, RAY_TMPDIR, HF_HOME"
_FREE_SPACE = f"free space there, or choose another directory ({_DIRECTORIES})"
_GET_PERMISSION = f"get permission to write there, or choose another directory ({_DIRECTORIES})"
_CHECK_DISK = "check the disk or the mount, then run the command again"
_FIXES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _FREE_SPACE,
    errno.EROFS: f"choose a writable directory ({_DIRECTORIES})",
    errno.EACCES: _GET_PERMISSION,
    errno.EPERM: _GET_PERMISSION,
    errno.EMFILE: "raise the limit of open files of this shell (ulimit -n)",
    errno.ENFILE: "close other programs, or ask the administrator to raise fs.file-max",
    errno.EAGAIN: "raise the limit of processes of this user (ulimit -u), or close other programs",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
    errno.EIO: _CHECK_DISK,
    errno.ESTALE: _CHECK_DISK,
    errno.ENOTCONN: _CHECK_DISK,
}
# Ray's errors that a machine caused, by name: `launcher --help` must not import ray.
_RUN_AGAIN = "run the command again; what was saved is not done twice"
_RAY_FIXES = {
    "OutOfMemoryError": "ask for fewer workers or smaller batches, or use nodes with more memory",
    "ObjectStoreFullError": "lower data.window_steps, or use nodes with more memory",
    "OutOfDiskError": _FREE_SPACE,
    **dict.fromkeys(("RayActorError", "ActorDiedError", "ActorUnavailableError"), _RUN_AGAIN),
    **dict.fromkeys(("LocalRayletDiedError", "NodeDiedError", "WorkerCrashedError"), _RUN_AGAIN),
}
# pyarrow, and libraries written in Rust, report the system's error number only in the text of their own errors.
_ERRNO_IN_TEXT = re.compile(r"\[errno (\d+)\]|\(os error (\d+)\)", re.IGNORECASE)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the messages of Ray.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not use the Ray that 'launcher up' started.")] = False,
) -> None:
    """Handle the options of all commands. `launcher/__main__.py` has handled `--fresh` already."""
    if debug:
        os.environ["LAUNCHER_DEBUG"] = "1"


def main() -> None:
    """Run the `launcher` command, print errors as sentences and exit."""
    # From argv, because the options are parsed inside app(), and errors before that need it too.
    debug = "--debug" in sys.argv
    # Started by a caller in this process, which keeps it.
    has_ray = local_ray.current() is not None
    if not debug:
        # Before app(): libraries read these variables once, when they are imported.
        _quiet()
    # SIGTERM stops a run like Ctrl-C: it saves first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except LauncherError as error:
        if debug:
            raise
        problems = error.problems if isinstance(error, SpecError) else (error.message,)
        for problem in problems:
            print_line(problem, ERR)
        sys.exit(130 if isinstance(error, RunInterrupted) else 2 if isinstance(error, UserError) else 1)
    except Exception as error:  # process boundary: anything else is a system error or a bug, reported in one line
        if debug:
            raise
        sentence = explain_system_error(error)
        if sentence is not None:
            print_line(sentence, ERR)
            sys.exit(2)
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        advice = "run the same command with --debug after `launcher` to see where, and please report it"
        print_line(f"the launcher failed ({what}); {advice}", ERR)
        sys.exit(1)
    finally:
        # Also after the exits above. A Ray of this process must not outlive it.
        if not has_ray:
            local_ray.stop_current()


def explain_system_error(error: BaseException) -> str | None:
    """Return a sentence for an error that the machine caused (full disk, open files, ...); None for any other."""
    # os.getcwd() in a deleted directory raises it without a file name, wherever a path becomes absolute.
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return "the working directory does not exist any more; change to one that does (cd), and try again"
    if isinstance(error, MemoryError):
        return f"this machine: {os.strerror(errno.ENOMEM)}; {_FIXES[errno.ENOMEM]}"
    # Python's own error when the system refuses a thread; it has no errno.
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"this machine: no more threads can be started; {_FIXES[errno.EAGAIN]}"
    name = type(error).__name__
    # An actor whose constructor raises dies too, of a bug.
    if type(error).__module__ == "ray.exceptions" and name in _RAY_FIXES and not getattr(error, "actor_init_failed", 0):
        # Ray's memory monitor also kills actors, and its name is in the text alone.
        name = "OutOfMemoryError" if "OOM" in str(error) else name
        return f"Ray: a process of the command was lost ({name}); {_RAY_FIXES[name]}"
    number = _find_errno(error)
    if number in _FIXES:
        place = getattr(error, "filename", None) or "this machine"
        return f"{os.fsdecode(place)}: {os.strerror(number)}; {_FIXES[number]}"
    # Libraries wrap the system's error in one of their own; the number is in the cause.
    return None if error.__cause__ is None else explain_system_error(error.__cause__)


def _find_errno(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = _ERRNO_IN_TEXT.search(str(error))
    return int(match.group(1) or match.group(2)) if match else 0


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _quiet() -> None:
    """Turn off the messages of libraries, so that only the launcher's own lines are shown. `--debug` skips this."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in ("ray", "ray.data", "ray.train", "transformers", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
