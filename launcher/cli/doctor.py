"""The command `launcher doctor`: what to know of a cluster before spending hours of GPUs on it. Runs on the client."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.cli.options import ERR, OUT
from launcher.errors import RunInterrupted

if TYPE_CHECKING:
    from launcher.submit.doctor.facts import DoctorRecord, Finding

_STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}


commands = typer.Typer()


@commands.command()
def doctor(
    job: Annotated[
        Path | None, typer.Argument(help="Job file: gives address, storage and workers.", metavar="JOB.yaml")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Cluster: auto, HOST:6379, ray://HOST:10001; without it RAY_ADDRESS, else a local Ray."),
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Directory or URI that all nodes should share.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Examine a cluster: versions, shared storage, network, disks, memory, GPUs, clocks, access.

    Takes about a minute and leaves nothing behind. Exit code: 0 nothing is in the way (warnings may be), 2 there are
    problems, each with its remedy.
    """
    from launcher.spec.loader import load_job
    from launcher.submit.doctor.report import examine
    from launcher.tasks import params_of

    # The storage is tried on the nodes; that it can be written from here does not matter.
    spec = load_job(job, (), params_of) if job is not None else None

    cluster = spec.cluster if spec is not None else None
    place = storage or (spec.output.storage if spec is not None else None)
    progress = ERR if as_json else OUT
    try:
        with progress.status("looking at the cluster; this takes about a minute"):  # on terminals only
            record = examine(
                address or (cluster.address if cluster is not None else None),
                place,
                cluster,
                lambda findings: _say(findings, progress),
            )
    except KeyboardInterrupt as stop:
        raise RunInterrupted("stopped; the doctor's probes and files are taken away") from stop
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        _print(record)
    if not record.healthy:
        raise typer.Exit(2)


def _say(findings: "Sequence[Finding]", console: Console) -> None:
    for finding in findings:
        line = Text.assemble((f"{finding.level:8}", _STYLES[finding.level]), f"{finding.check:9}", finding.found)
        console.print(line, soft_wrap=True)


def _print(record: "DoctorRecord") -> None:
    table = Table("check", "result", "what was found")
    for finding in record.findings:
        table.add_row(finding.check, Text(finding.level, _STYLES[finding.level]), Text(finding.found))
    OUT.print()
    OUT.print(table)
    remedies = [finding for finding in record.findings if finding.remedy]
    for finding in sorted(remedies, key=lambda each: each.level != "problem"):
        line = Text.assemble((f"{finding.check}: ", _STYLES[finding.level]), finding.remedy)
        OUT.print(line, soft_wrap=True)
    counts = [sum(finding.level == level for finding in record.findings) for level in ("problem", "warning")]
    said = [_plural(count, level) for count, level in zip(counts, ("problem", "warning"), strict=True)]
    looked = f"{_plural(len(record.nodes), 'node')} looked at in {record.seconds:.0f} s"
    OUT.print(f"{', '.join(said)}; {looked}", highlight=False)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
