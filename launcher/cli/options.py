"""What commands share: their arguments, where they print, how a job file is read. Runs on the client."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from launcher.errors import UserError
from launcher.formatting import mask_secrets

if TYPE_CHECKING:
    from launcher.rundir.directory import RunDir
    from launcher.spec.job import JobSpec


class MaskedConsole(Console):
    """A console that shows no keys of URIs."""

    def print(self, *objects: Any, **how: Any) -> None:  # rich's own signature has two dozen arguments
        """Print as rich does, texts without their keys."""
        super().print(*(mask_secrets(text) if isinstance(text, str) else text for text in objects), **how)


OUT, ERR = MaskedConsole(), MaskedConsole(stderr=True)

JobFile = Annotated[Path, typer.Argument(help="The job file (YAML).", metavar="JOB.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes by dotted path: train.learning_rate=3e-5", metavar="[KEY=VALUE]...")
]
EVALUATE_KEYS = ("cluster", "parallel", "task", "data.format", "data.on_bad_row", "evaluation.batch_size")
"""Sections and keys of a run's job that its evaluation may change."""
Run = Annotated[str, typer.Argument(help="Directory or URI of a run.", metavar="RUN")]


def load(path: Path, overrides: list[str] | None, here: bool = True) -> "JobSpec":
    """A job file with its overrides, checked with its task's parameters.

    Args:
        path: the job file.
        overrides: changes by dotted path.
        here: whether it will run here, so that its storage must be writable.

    Raises:
        UserError: everything that is wrong with it.
    """
    from launcher.rundir.writable import check_storage
    from launcher.spec.loader import load_job
    from launcher.tasks import params_of

    job = load_job(path, overrides or (), params_of)
    if here:
        check_storage(job.output.storage)
    return job


def begin_ray(job: "JobSpec", at_once: int = 1) -> None:
    """Start a local Ray side by side with what a command does first, where the job will run on one.

    Has to come before ray or torch are imported: this process loads what workers need, and is forked for them.

    Raises:
        ClusterError: The job joins a cluster, which does not answer.
    """
    from launcher.processes import local_ray
    from launcher.processes.ray_address import check_address
    from launcher.processes.warm_ray import ADDRESS

    if job.cluster.address or os.environ.get("RAY_ADDRESS"):
        check_address(job.cluster.address)
        return
    if job.cluster.kubernetes or ("ray" in sys.modules and not os.environ.get(ADDRESS)):
        return
    ray = local_ray.start_for_command(local_ray.local_cpus(job.cluster.logical_cpus(at_once)), fork_here=True)
    if ray.process is None:
        OUT.print("runs on the Ray of `launcher up`", highlight=False, soft_wrap=True)
    if ray.note is not None:
        OUT.print(f"workers start without the fork server: {ray.note}", highlight=False, soft_wrap=True)


def check_overrides(overrides: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse changes to what was trained.

    Raises:
        UserError: a key is not among the allowed sections and keys.
    """
    from launcher.spec.permissions import PERMISSIONS

    for override in overrides:
        key = override.partition("=")[0]
        if key not in PERMISSIONS and not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserError(
                f"override {override}: {key} belongs to what was trained, which stays; only {', '.join(allowed)} may "
                "be changed here"
            )


def check_scored(split: str | None, data: str | None, name: str | None) -> None:
    """What `evaluate` may be asked for at once.

    Raises:
        UserError: two of the options do not go together.
    """
    if data is not None and split is not None:
        raise UserError("--data and --split: give one of them, as other data is no split of the run")
    if data is None and name is not None:
        raise UserError("--name: names the scores on --data; give --data too, or leave it out")


def load_run(run: "RunDir", overrides: list[str] | None, allowed: Sequence[str]) -> "JobSpec":
    """Return a run's job file, resolved as the run left it, with changes; it permits only what the command line does.

    Args:
        run: the run.
        overrides: changes by dotted path.
        allowed: sections and keys that may be changed.

    Raises:
        UserError: a change is not allowed, or everything that is wrong with the job.
    """
    from launcher.errors import SpecError
    from launcher.rundir.directory import beside
    from launcher.spec.loader import load_job
    from launcher.spec.messages import one_line
    from launcher.spec.permissions import granted
    from launcher.tasks import params_of

    check_overrides(overrides or (), allowed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_bytes(run.read_bytes("job.yaml"))
        try:
            job = load_job(path, overrides or (), params_of)
        except SpecError as error:
            shown = one_line(str(path))  # as problems begin with it
            problems = (problem.replace(shown, run.path("job.yaml"), 1) for problem in error.problems)
            raise SpecError(tuple(problems)) from error
    is_training = "logging" in allowed
    return beside(run, granted(job, run.path("job.yaml"), overrides or (), is_training))
