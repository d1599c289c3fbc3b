"""The commands that lay runs side by side: compare, replay. Runs on the client; replay trains, on the head."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT, Overrides, Run, load_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.report.compare import Comparison, Row

commands = typer.Typer()

_REPLAY_KEYS = ("cluster", "parallel", "checkpoint", "logging")


@commands.command("compare")
def compare_runs(
    runs: Annotated[list[str], typer.Argument(help="Directories or URIs of runs.", metavar="RUN...")],
    output: Annotated[Path, typer.Option(help="The page, one HTML file that works offline.")] = Path("compare.html"),
) -> None:
    """Curves, final metrics and differences of several runs on one page, and the metrics here."""
    from launcher.report.compare import check_page, compare, write_comparison
    from launcher.rundir.directory import find_run

    check_page(output)
    comparison = compare([find_run(run) for run in runs])
    for warning in comparison.warnings:
        OUT.print(f"note: {warning}", highlight=False, soft_wrap=True, markup=False)
    _print(comparison)
    OUT.print(str(write_comparison(comparison, output)), highlight=False, soft_wrap=True, markup=False)


@commands.command()
def replay(
    run: Run,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Of the new run; NAME-replay, -2 ... without it.")] = None,
) -> None:
    """Train a finished run again under a new name and tell whether the curves agree; goes on where it stopped.

    Changes may be made to cluster, parallel, checkpoint and logging. Exit code: 0 they agree, 1 they do not.
    """
    from launcher.rundir.directory import find_run

    found = find_run(run)
    job = load_run(found, overrides, _REPLAY_KEYS)
    from launcher.driver.replay import outcome, replay_run

    replayed = replay_run(found, job, name, OUT)
    for sentence in outcome(replayed):
        OUT.print(sentence, highlight=False, soft_wrap=True, markup=False)
    OUT.print(f"comparison: {replayed.page}", highlight=False, soft_wrap=True, markup=False)
    if not replayed.agreement.agrees:
        raise typer.Exit(1)


def _print(comparison: "Comparison") -> None:
    OUT.print(_table("", comparison.names, [*comparison.metrics, *comparison.facts]))
    for heading, rows in (
        ("job file", comparison.job_differences),
        ("environment", comparison.environment_differences),
    ):
        if rows:
            OUT.print(_table(heading, comparison.names, rows))
    for sentence in comparison.agreement:
        OUT.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _table(heading: str, names: "Sequence[str]", rows: "Sequence[Row]") -> Table:
    table = Table(escape(heading), *(escape(name) for name in names))
    for row in rows:
        cells = (Text(value, "bold" if i in row.best else "") for i, value in enumerate(row.values))
        starred = (Text.assemble(cell, " *") if i in row.best else cell for i, cell in enumerate(cells))
        table.add_row(Text(row.name), *starred)
    return table
