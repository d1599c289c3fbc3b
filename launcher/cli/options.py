"""Arguments, consoles and job file loading that the commands share. Runs on the client."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from launcher import formatting
from launcher.errors import UserError
from launcher.formatting import mask_secrets

if TYPE_CHECKING:
    from launcher.rundir.directory import RunDir
    from launcher.spec.job import JobSpec


class MaskedConsole(Console):
    """Console that masks secrets in URIs."""

    def print(self, *objects: Any, **options: Any) -> None:  # rich's own signature has two dozen arguments
        """Print like rich, with secrets masked in plain strings."""
        super().print(*(mask_secrets(text) if isinstance(text, str) else text for text in objects), **options)


OUT = MaskedConsole()
ERR = MaskedConsole(stderr=True)

JobFile = Annotated[Path, typer.Argument(help="Job file (YAML).", metavar="JOB.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to keys of the job file: train.learning_rate=3e-5", metavar="KEY=VALUE"),
]
Run = Annotated[str, typer.Argument(help="Directory or URI of a run.", metavar="RUN")]
EVALUATE_KEYS = ("cluster", "parallel", "task", "data.format", "data.on_bad_row", "evaluation.batch_size")
"""Sections and keys of a run's job that `evaluate` may change."""
REPLAY_KEYS = ("cluster", "parallel", "checkpoint", "logging")
"""Sections that the loss curve does not depend on (`spec/curve.py`): `replay` may change these alone."""


def print_line(text: str, console: Console = OUT) -> None:
    """Print text as it is: no markup, no colors, no wrapping, so that scripts and grep find whole sentences."""
    formatting.print_line(console, text)


def load(path: Path, overrides: list[str] | None, runs_locally: bool = True) -> "JobSpec":
    """Load a job file with its overrides and validate it, including the task's parameters.

    Args:
        path: Job file.
        overrides: Changes, `key.path=value`.
        runs_locally: True if the job runs on this machine, so that its storage must be writable.

    Raises:
        UserError: The job file or an override is invalid; one sentence per problem.
    """
    from launcher.rundir.writable import check_storage
    from launcher.spec.loader import load_job
    from launcher.tasks import params_class

    job = load_job(path, overrides or (), params_class)
    if runs_locally:
        check_storage(job.output.storage)
    return job


def load_run_job(run: "RunDir", overrides: list[str] | None, allowed: Sequence[str]) -> "JobSpec":
    """Load the job file of a run with changes. It gets only the permissions that the command line gives.

    Args:
        run: Run directory.
        overrides: Changes, `key.path=value`.
        allowed: Sections and keys that may be changed.

    Raises:
        UserError: A change is not allowed, or the job is invalid; one sentence per problem.
    """
    from launcher.errors import SpecError
    from launcher.rundir.directory import with_storage_of_run
    from launcher.spec.loader import load_job
    from launcher.spec.messages import one_line
    from launcher.spec.permissions import grant_permissions
    from launcher.tasks import params_class

    # Before the job is read, which may be on remote storage.
    check_overrides(overrides or (), allowed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        # Into a local file, as the run may be on remote storage and `load_job` reads paths.
        path.write_bytes(run.read_bytes("job.yaml"))
        try:
            job = load_job(path, overrides or (), params_class)
        except SpecError as error:
            # Each problem starts with the name of this temporary file; users know that of the run.
            local_name = one_line(str(path))
            problems = (problem.replace(local_name, run.path("job.yaml"), 1) for problem in error.problems)
            raise SpecError(tuple(problems)) from error
    # Only commands that train allow changes to `logging`, and only they report to trackers.
    is_training = "logging" in allowed
    # Permissions come last: whatever the file says, only overrides of the command line count.
    return with_storage_of_run(run, grant_permissions(job, run.path("job.yaml"), overrides or (), is_training))


def start_ray_early(job: "JobSpec", at_once: int = 1) -> None:
    """Start a local Ray in the background, if the job will run on one.

    Call this before anything imports ray or torch: this process loads what the workers need and is forked for them.

    Args:
        job: Job that will run.
        at_once: Number of such jobs that run at the same time (trials).

    Raises:
        ClusterError: The job connects to a cluster that does not answer.
    """
    from launcher.processes import local_ray
    from launcher.processes.ray_address import check_address
    from launcher.processes.warm_ray import ADDRESS

    if job.cluster.address or os.environ.get("RAY_ADDRESS"):
        # ray.init alone tries a dead address for minutes.
        check_address(job.cluster.address)
        return
    # A process that has imported ray cannot be forked for workers any more, unless it was itself forked from the Ray of
    # `launcher up`.
    if job.cluster.kubernetes or ("ray" in sys.modules and not os.environ.get(ADDRESS)):
        return
    ray = local_ray.start_for_command(local_ray.local_cpus(job.cluster.logical_cpus(at_once)), fork_here=True)
    if ray.process is None:
        print_line("runs on the Ray of `launcher up`")
    if ray.note is not None:
        print_line(f"workers start without the fork server: {ray.note}")


def check_overrides(overrides: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse changes to keys that a finished run was trained with.

    Raises:
        UserError: A key is not in the allowed sections and keys.
    """
    from launcher.spec.permissions import PERMISSIONS

    for override in overrides:
        key = override.partition("=")[0]
        # A permission may always be given: `grant_permissions` decides about it.
        if key not in PERMISSIONS and not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserError(
                f"override {override}: {key} is fixed, as the run was trained with it; only {', '.join(allowed)} may "
                "be changed here"
            )


def check_evaluate_options(split: str | None, data: str | None, name: str | None) -> None:
    """Refuse options of `evaluate` that contradict each other.

    Raises:
        UserError: Two of the options exclude each other.
    """
    if data is not None and split is not None:
        raise UserError("--data and --split: give only one of them, since other data is not a split of the run")
    if data is None and name is not None:
        raise UserError("--name: names the scores on --data; give --data too, or drop --name")
