"""`launcher sweeps`: look at finished sweeps. Runs on the client."""

from typing import Annotated

import typer
from rich.table import Table

from launcher.cli.options import OUT

commands = typer.Typer(help="Look at finished sweeps.", no_args_is_help=True)


@commands.command("compare")
def compare_sweeps(
    runs: Annotated[list[str], typer.Argument(help="Directories or URIs of two or more sweeps.", metavar="RUN...")],
) -> None:
    """What each of several sweeps found, side by side."""
    from launcher.errors import RunError
    from launcher.formatting import format_param
    from launcher.report.sweep import collect_sweep, find_sweep

    table = Table("", *runs)
    columns = []
    for run in runs:
        found = find_sweep(run)
        if found is None:
            raise RunError(f"{run}: no sweep there (it has no sweep/sweep.json); give what `launcher tune` printed")
        columns.append(collect_sweep(found).facts())
    for name in dict.fromkeys(name for facts in columns for name in facts):
        table.add_row(name, *(format_param(facts[name]) if name in facts else "" for facts in columns))
    OUT.print(table)
