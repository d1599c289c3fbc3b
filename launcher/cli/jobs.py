"""The commands `submit` and `jobs`: run jobs on a Ray cluster through its Jobs API. Runs on the client."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from launcher.cli.options import ERR, OUT, JobFile, Overrides, load, print_line
from launcher.cli.remote_command import parse_command

if TYPE_CHECKING:
    from launcher.submit.package import Package
    from launcher.submit.ray_jobs import Job, RayJobs

commands = typer.Typer()
jobs = typer.Typer(help="List, follow and stop the jobs of a Ray cluster.", no_args_is_help=True)
commands.add_typer(jobs, name="jobs")

Address = Annotated[
    str | None,
    typer.Option(help="Ray dashboard, http://HEAD:8265.", envvar="RAY_API_SERVER_ADDRESS", metavar="URL"),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the job ends; use its exit code.")]
Name = Annotated[str, typer.Argument(help="Submission id, or name of a run for its newest job.", metavar="JOB")]


@commands.command()
def submit(
    job: JobFile,
    overrides: Overrides = None,
    command: Annotated[
        str,
        typer.Option(
            help="Command to run: 'train [--fork RUN]', tune, 'evaluate [--split NAME]', 'evaluate --data LOCATION "
            "[--name NAME]' or 'predict INPUT --output DIR'. Paths are paths on the cluster."
        ),
    ] = "train",
    address: Address = None,
    follow: Follow = False,
    working_dir: Annotated[
        Path | None, typer.Option(help="Send this directory, without files git ignores.", metavar="DIR")
    ] = None,
) -> None:
    """Submit a job to a Ray cluster: train, tune, evaluate or predict."""
    spec = load(job, overrides, runs_locally=False)
    from launcher.errors import RunError
    from launcher.submit.package import make_package
    from launcher.submit.ray_jobs import Submission

    # Twice: a wrong command is refused here before the package reads any file, and below its paths are looked up in it.
    parse_command(command)
    package = make_package(spec, working_dir)
    submission = Submission(package.job, parse_command(command, package))
    _warn_about_job_file(package)
    _warn_about_size(package)
    cluster = _connect(address or _to_dashboard(spec.cluster.address))
    # Not atomic: two submissions at once may both pass. Then the lease in the run directory stops the older attempt
    # (`rundir/lease.py`).
    busy = cluster.at_work_on(package.job)
    if busy is not None:
        raise RunError(
            f"{spec.name}: {busy.id} works on this run now; follow it with `launcher jobs logs {busy.id} --follow`, or "
            f"stop it first with `launcher jobs stop {busy.id}`"
        )
    # Needed until `submit` returns: Ray's client reads the archive in it.
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "package.zip"
        package.write(archive)
        job_id = cluster.submit(submission, archive)
    print_line(f"submitted {job_id} to {cluster.address}")
    if follow:
        _follow(cluster, job_id)
    else:
        print_line(f"show its log: launcher jobs logs {job_id} --follow")


@jobs.command("list")
def list_jobs(address: Address = None) -> None:
    """List the jobs of the cluster, newest first."""
    columns = [Column(name, no_wrap=True) for name in ("job", "state", "started (UTC)", "minutes")]
    table = Table(*columns, Column("command", overflow="fold"))
    for job in _connect(address).jobs():
        started = job.started.strftime("%Y-%m-%d %H:%M") if job.started else ""
        command = f"{job.command} {job.run}" if job.run else job.entrypoint
        # Text, as rich reads the brackets of a string as markup.
        table.add_row(*map(Text, (job.id, str(job.status.value), started, _format_minutes(job), command)))
    OUT.print(table)


@jobs.command()
def status(name: Name, address: Address = None) -> None:
    """Show the state of a job.

    Exit code: 0 unless the job failed (1, or 2 if you can fix the cause) or was stopped (130).
    """
    cluster = _connect(address)
    job = cluster.find(name)
    rows = {
        "job": job.id, "run": job.run, "storage": job.storage, "command": job.command or job.entrypoint,
        "state": str(job.status.value), "minutes": _format_minutes(job), "message": job.message,
    }  # fmt: skip
    table = Table(show_header=False, box=None)
    for key, value in rows.items():
        if value:
            table.add_row(key, Text(value))
    OUT.print(table)
    if job.over:
        _raise_if_failed(job)


@jobs.command()
def logs(name: Name, follow: Follow = False, address: Address = None) -> None:
    """Print the log of a job's driver."""
    cluster = _connect(address)
    job = cluster.find(name)
    if follow:
        _follow(cluster, job.id)
    else:
        # As it is: the log has line ends of its own, and may hold brackets that rich would read as markup.
        typer.echo(cluster.logs(job.id), nl=False)


@jobs.command()
def stop(name: Name, address: Address = None) -> None:
    """Stop a job and wait until it has ended.

    It first saves a checkpoint, for which it has cluster.grace_s seconds.
    """
    cluster = _connect(address)
    job = cluster.find(name)
    if job.over:
        print_line(f"{job.id} has ended already ({job.status.value})")
        return
    from launcher.submit.follow import wait

    # Ray answers at once and stops in the background, hence the wait.
    cluster.stop(job.id)
    print_line(f"stopping {job.id}: it saves a checkpoint first")
    ended = wait(cluster, job.id)
    print_line(f"{job.id}: {ended.status.value}")


def _connect(address: str | None) -> "RayJobs":
    from launcher.submit.ray_jobs import LOCAL, RayJobs

    return RayJobs(address or _to_dashboard(os.environ.get("RAY_ADDRESS")) or LOCAL)


def _to_dashboard(address: str | None) -> str | None:
    """Return the address if it is a dashboard's; RAY_ADDRESS and cluster.address may be of another kind."""
    return address if address is not None and address.startswith(("http://", "https://")) else None


def _warn_about_job_file(package: "Package") -> None:
    from launcher.submit.package import JOB_FILE

    if JOB_FILE in package.files:
        print_line(
            f"warning: {JOB_FILE} is not sent: on the cluster that name is this job with its overrides; "
            "rename the file if the job reads it",
            ERR,
        )


def _warn_about_size(package: "Package") -> None:
    from launcher.submit.package import MAX_BYTES

    # No error, since the zip may be smaller than its files.
    if package.size_bytes > MAX_BYTES:
        files = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in package.largest(3))
        print_line(
            f"warning: {package.size_bytes / 2**20:.0f} MiB would be sent with the job, and Ray accepts "
            f"{MAX_BYTES >> 20} MiB zipped; the largest are {files}: keep data on shared storage",
            ERR,
        )


def _follow(cluster: "RayJobs", job_id: str) -> None:
    from launcher.errors import RunInterrupted
    from launcher.submit.follow import Follower

    try:
        job = Follower(
            cluster, job_id, lambda text: typer.echo(text, nl=False), lambda text: print_line(text, ERR)
        ).follow()
    except KeyboardInterrupt as error:
        # Ctrl-C ends only the display of the log, not the job.
        raise RunInterrupted(
            f"{job_id} keeps running; `launcher jobs logs {job_id} --follow` shows its log, `launcher jobs stop "
            f"{job_id}` stops it"
        ) from error
    _raise_if_failed(job)
    print_line(f"{job.id}: {job.status.value} after {_format_minutes(job)} minutes")


def _raise_if_failed(job: "Job") -> None:
    """Raise an error whose exit code is that of a failed or stopped job."""
    from launcher.errors import RunError, RunInterrupted, TrainingError

    if job.status.value == "STOPPED":
        raise RunInterrupted(f"{job.id}: was stopped; submit it again to resume from its last checkpoint")
    if job.status.value == "FAILED":
        # The driver is a launcher too: with 2 it means that the user can fix it.
        if job.exit_code == 2:
            raise RunError(f"{job.id}: FAILED; its log says what to fix")
        # Ray's message ends with up to 20,000 characters of the log (2.60, job_supervisor.py).
        raise TrainingError(f"{job.id}: FAILED ({job.message[:300]})")


def _format_minutes(job: "Job") -> str:
    from datetime import datetime, timezone

    if job.started is None:
        return ""
    ended = job.ended or datetime.now(timezone.utc)
    return f"{(ended - job.started).total_seconds() / 60:.1f}"
