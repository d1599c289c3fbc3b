"""The command `runs`: all runs of a storage in a table. Runs on the client."""

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launcher.cli.options import OUT, print_line

commands = typer.Typer()

_WIDTH = 160
"""Width of the table in a file or a pipe."""
_COLORS = {"running": "green", "finished": "blue", "failed": "red", "dead": "red", "interrupted": "yellow"}


@commands.command()
def runs(
    storage: Annotated[str, typer.Argument(help="Directory or URI that holds runs.", metavar="STORAGE")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, for scripts.")] = False,
) -> None:
    """List runs with state, step, best metric and last heartbeat.

    A run whose driver stopped without a final state is listed as dead.
    """
    from launcher.rundir.listing import list_runs

    entries = list_runs(storage)
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(entry.model_dump(mode="json")))
        return
    if not entries:
        print_line(f"no run in {storage} yet")
        return
    table = Table(box=None, padding=(0, 2))
    for column in ("run", "state", "step", "best", "heartbeat", "task"):
        table.add_column(column, no_wrap=True)
    for entry in entries:
        state = f"[{_COLORS.get(entry.state, 'default')}]{entry.state}[/]"
        best = "" if entry.best is None else f"{entry.best:.4f} ({entry.metric}, step {entry.best_step})"
        heartbeat = "" if entry.heartbeat is None else _format_age(time.time() - entry.heartbeat)
        table.add_row(entry.name, state, f"{entry.step}/{entry.total_steps}", best, heartbeat, entry.task)
    # Without a terminal rich assumes 80 columns and would cut the cells.
    (OUT if OUT.is_terminal else Console(width=_WIDTH)).print(table)
    for entry in entries:
        if entry.why:
            print_line(f"{entry.name}: {entry.why}")


def _format_age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    # Clocks differ, so a heartbeat may seem to come from the future.
    return f"{max(0.0, seconds):.0f} s ago"
