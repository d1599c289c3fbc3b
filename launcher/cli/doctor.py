"""The command `doctor`: checks of a cluster before a long run. Runs on the client; read `submit/doctor/` next."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.cli.options import ERR, OUT, print_line
from launcher.errors import RunInterrupted
from launcher.formatting import pluralize

if TYPE_CHECKING:
    from launcher.submit.doctor.facts import DoctorRecord, Finding

_STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}

commands = typer.Typer()


@commands.command()
def doctor(
    job: Annotated[
        Path | None, typer.Argument(help="Job file: sets address, storage, workers.", metavar="JOB.yaml")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="auto, HOST:6379 or ray://HOST:10001; default: RAY_ADDRESS, else a local Ray.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Directory or URI that all nodes should share.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Check a cluster before a long run.

    Checks versions, shared storage, network, disks, memory, GPUs, clocks and permissions of all nodes. Takes about a
    minute and removes all its files. Exit code: 0 if a run can start (there may be warnings), 2 if there are problems,
    each with its fix.
    """
    from launcher.spec.loader import load_job
    from launcher.submit.doctor.report import examine
    from launcher.tasks import params_class

    # Not `load`: the nodes test the storage, which need not be writable from this machine.
    spec = load_job(job, (), params_class) if job is not None else None
    cluster = spec.cluster if spec is not None else None
    # With --json, stdout must hold nothing but the object.
    console = ERR if as_json else OUT
    try:
        with console.status("checking the cluster; this takes about a minute"):  # only shown on a terminal
            record = examine(
                address or (cluster.address if cluster is not None else None),
                storage or (spec.output.storage if spec is not None else None),
                cluster,
                lambda findings: _print_findings(findings, console),
            )
    except KeyboardInterrupt as error:
        # By now the doctor's finally blocks have ended the actors and deleted the files.
        raise RunInterrupted("stopped; the doctor's processes and files are removed") from error
    if as_json:
        # Not by rich, which wraps lines at the width of the terminal.
        typer.echo(record.model_dump_json(indent=1))
    else:
        _print_record(record)
    if not record.healthy:
        raise typer.Exit(2)


def _print_findings(findings: "Sequence[Finding]", console: Console) -> None:
    for finding in findings:
        line = Text.assemble((f"{finding.level:8}", _STYLES[finding.level]), f"{finding.check:9}", finding.found)
        console.print(line, soft_wrap=True)


def _print_record(record: "DoctorRecord") -> None:
    table = Table("check", "result", "what was found")
    for finding in record.findings:
        table.add_row(finding.check, Text(finding.level, _STYLES[finding.level]), Text(finding.found))
    OUT.print()
    OUT.print(table)
    with_remedy = [finding for finding in record.findings if finding.remedy]
    for finding in sorted(with_remedy, key=lambda finding: finding.level != "problem"):
        line = Text.assemble((f"{finding.check}: ", _STYLES[finding.level]), finding.remedy)
        OUT.print(line, soft_wrap=True)
    levels = [finding.level for finding in record.findings]
    counts = ", ".join(pluralize(levels.count(level), level) for level in ("problem", "warning"))
    print_line(f"{counts}; {pluralize(len(record.nodes), 'node')} checked in {record.seconds:.0f} s")
