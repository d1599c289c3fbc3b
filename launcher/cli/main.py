"""The command line: parse, call one function, print. Runs on the client.

Importing it loads neither torch nor ray; a command does when it needs them. `train.py` has the commands of a run.
Exit codes: 0 done, 1 the run stopped, 2 something the user can mend, 130 interrupted.
"""

import logging
import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from launcher.cli import compare, doctor, init, jobs, kube, runs, train, tune, up
from launcher.cli.environment import refused_by_machine
from launcher.cli.options import ERR
from launcher.errors import LauncherError, RunInterrupted, SpecError, UserError
from launcher.processes import local_ray
from launcher.processes.warm_ray import QUIET

app = typer.Typer(
    help="Fine-tune pretrained models on Ray: the loss curve is a function of the job file, not of the cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train.commands)
app.add_typer(up.commands)
app.add_typer(init.commands)
app.add_typer(runs.commands)
app.add_typer(compare.commands)
app.add_typer(jobs.commands)
app.add_typer(doctor.commands)
app.add_typer(tune.commands, name="sweeps")
app.add_typer(kube.commands, name="kube")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and Ray's own messages.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not use the Ray that `launcher up` has started.")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["LAUNCHER_DEBUG"] = "1"


def main() -> None:
    """Entry point of the `launcher` command and of `python -m launcher`."""
    debug = "--debug" in sys.argv
    has_ray = local_ray.current() is not None  # a caller's, which goes on with it
    if not debug:
        _quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job ends as after Ctrl-C, not in mid-air
    try:
        app()
    except LauncherError as error:
        if debug:
            raise
        problems = error.problems if isinstance(error, SpecError) else (error.message,)
        for problem in problems:
            ERR.print(problem, markup=False, highlight=False, soft_wrap=True)
        sys.exit(130 if isinstance(error, RunInterrupted) else 2 if isinstance(error, UserError) else 1)
    except Exception as error:  # process border: what nobody foresaw is a defect, told in one line
        if debug:
            raise
        refused = refused_by_machine(error)
        if refused is not None:
            ERR.print(refused, markup=False, highlight=False, soft_wrap=True)
            sys.exit(2)
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        remedy = "the same command with --debug after `launcher` shows where; please report it"
        ERR.print(f"the launcher failed ({what}); {remedy}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    finally:
        if not has_ray:
            local_ray.stop_current()


def _quiet() -> None:
    """Libraries say less: a person sees the launcher's own lines. `--debug` leaves them as they are."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in ("ray", "ray.data", "ray.train", "transformers", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
