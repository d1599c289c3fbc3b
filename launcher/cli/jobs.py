"""`launcher submit` and `launcher jobs`: work on a Ray cluster through its Jobs API. Runs on the client."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from launcher.cli.options import ERR, OUT, JobFile, Overrides, load
from launcher.cli.remote_command import words_of

if TYPE_CHECKING:
    from launcher.submit.package import Package
    from launcher.submit.ray_jobs import Job, RayJobs

commands = typer.Typer()
jobs = typer.Typer(help="Look at and stop the jobs of a Ray cluster.", no_args_is_help=True)
commands.add_typer(jobs, name="jobs")

Address = Annotated[
    str | None,
    typer.Option(help="Dashboard of the cluster, http://HEAD:8265.", envvar="RAY_API_SERVER_ADDRESS", metavar="URL"),
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Show the log until the job ends; its end is the exit code.")
]
Name = Annotated[str, typer.Argument(help="Submission id, or a run's name: its newest submission.", metavar="JOB")]


@commands.command()
def submit(
    job: JobFile,
    overrides: Overrides = None,
    command: Annotated[
        str,
        typer.Option(
            help="'train [--fork RUN]', tune, 'evaluate [--split NAME]', 'evaluate --data LOCATION [--name NAME]', or "
            "'predict INPUT --output DIR': paths there."
        ),
    ] = "train",
    address: Address = None,
    follow: Follow = False,
    working_dir: Annotated[
        Path | None, typer.Option(help="Send this whole directory, but for what git ignores.", metavar="DIR")
    ] = None,
) -> None:
    """Send a job to a Ray cluster: to be trained there, tuned, evaluated, or to predict."""
    spec = load(job, overrides, here=False)
    from launcher.errors import RunError
    from launcher.submit.package import make_package
    from launcher.submit.ray_jobs import Submission

    words_of(command)  # before files are looked at
    package = make_package(spec, working_dir)
    submission = Submission(package.job, words_of(command, package))
    _warn_of_size(package)
    cluster = _open(address or _http(spec.cluster.address))
    busy = cluster.at_work_on(package.job)
    if busy is not None:
        raise RunError(
            f"{spec.name}: {busy.id} works on this run now; follow it with `launcher jobs logs {busy.id} --follow`, or "
            f"stop it first with `launcher jobs stop {busy.id}`"
        )
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "package.zip"
        package.write(archive)
        sent = cluster.submit(submission, archive)
    OUT.print(f"submitted {sent} to {cluster.address}", highlight=False, soft_wrap=True)
    if follow:
        _follow(cluster, sent)
    else:
        OUT.print(f"its log: launcher jobs logs {sent} --follow", highlight=False, soft_wrap=True)


@jobs.command("list")
def list_jobs(address: Address = None) -> None:
    """List what the cluster was given, newest first."""
    found = _open(address).jobs()
    whole = [Column(name, no_wrap=True) for name in ("job", "state", "started (UTC)", "minutes")]
    table = Table(*whole, Column("does", overflow="fold"))
    for job in found:
        began = job.started.strftime("%Y-%m-%d %H:%M") if job.started else ""
        does = f"{job.command} {job.run}" if job.run else job.entrypoint
        table.add_row(job.id, str(job.status.value), began, _minutes(job), does)
    OUT.print(table)


@jobs.command()
def status(name: Name, address: Address = None) -> None:
    """What became of a job; the exit code is 0 while all is well."""
    cluster = _open(address)
    job = cluster.find(name)
    rows = {
        "job": job.id, "run": job.run, "storage": job.storage, "command": job.command or job.entrypoint,
        "state": str(job.status.value), "minutes": _minutes(job), "message": job.message,
    }  # fmt: skip
    table = Table(show_header=False, box=None)
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    OUT.print(table)
    if job.over:
        _end(job)


@jobs.command()
def logs(name: Name, follow: Follow = False, address: Address = None) -> None:
    """Show what a job's driver printed."""
    cluster = _open(address)
    job = cluster.find(name)
    if follow:
        _follow(cluster, job.id)
    else:
        typer.echo(cluster.logs(job.id), nl=False)


@jobs.command()
def stop(name: Name, address: Address = None) -> None:
    """Stop a job: it saves a checkpoint first, within its cluster.grace_s. Waits until it has ended."""
    cluster = _open(address)
    job = cluster.find(name)
    if job.over:
        OUT.print(f"{job.id} has ended already ({job.status.value})", highlight=False, soft_wrap=True)
        return
    from launcher.submit.follow import wait

    cluster.stop(job.id)
    OUT.print(f"stopping {job.id}: it saves a checkpoint first", highlight=False, soft_wrap=True)
    ended = wait(cluster, job.id)
    OUT.print(f"{job.id}: {ended.status.value}", highlight=False, soft_wrap=True)


def _open(address: str | None) -> "RayJobs":
    from launcher.submit.ray_jobs import LOCAL, RayJobs

    return RayJobs(address or _http(os.environ.get("RAY_ADDRESS")) or LOCAL)


def _http(address: str | None) -> str | None:
    """An address that is a dashboard's; RAY_ADDRESS and cluster.address may be of another kind."""
    return address if address is not None and address.startswith(("http://", "https://")) else None


def _warn_of_size(package: "Package") -> None:
    from launcher.submit.package import MAX_BYTES

    if package.size_bytes > MAX_BYTES:
        files = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in package.largest(3))
        ERR.print(
            f"warning: {package.size_bytes / 2**20:.0f} MiB would travel with the job, and Ray takes "
            f"{MAX_BYTES >> 20} MiB zipped; the largest are {files}: keep data on shared storage",
            highlight=False,
            soft_wrap=True,
        )


def _follow(cluster: "RayJobs", job_id: str) -> None:
    from launcher.errors import RunInterrupted
    from launcher.submit.follow import Follower

    def notice(text: str) -> None:
        ERR.print(text, highlight=False, soft_wrap=True)

    try:
        job = Follower(cluster, job_id, lambda text: typer.echo(text, nl=False), notice).follow()
    except KeyboardInterrupt as stop:
        raise RunInterrupted(
            f"{job_id} goes on; `launcher jobs logs {job_id} --follow` shows it, `launcher jobs stop {job_id}` ends it"
        ) from stop
    _end(job)
    OUT.print(f"{job.id}: {job.status.value} after {_minutes(job)} minutes", highlight=False, soft_wrap=True)


def _end(job: "Job") -> None:
    """Raise what the job ended with, so that the exit code tells it."""
    from launcher.errors import RunError, RunInterrupted, TrainingError

    if job.status.value == "STOPPED":
        raise RunInterrupted(f"{job.id}: was stopped; the same submission goes on from its last checkpoint")
    if job.status.value == "FAILED":
        if job.exit_code == 2:
            raise RunError(f"{job.id}: FAILED; its log says what to mend")
        raise TrainingError(f"{job.id}: FAILED ({job.message[:300]})")


def _minutes(job: "Job") -> str:
    from datetime import datetime, timezone

    if job.started is None:
        return ""
    ended = job.ended or datetime.now(timezone.utc)
    return f"{(ended - job.started).total_seconds() / 60:.1f}"
