"""`launcher runs`: the runs of a storage at a glance. Runs on the client."""

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launcher.cli.options import OUT

commands = typer.Typer()

_WIDTH = 160
"""Of the table in a file or a pipe."""
_COLORS = {"running": "green", "finished": "blue", "failed": "red", "dead": "red", "interrupted": "yellow"}


@commands.command()
def runs(
    storage: Annotated[str, typer.Argument(help="Directory or URI that holds runs.", metavar="[STORAGE]")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """List the runs of a storage: state, step, best metric, heartbeat. A run whose driver is gone shows as dead."""
    from launcher.rundir.listing import runs_of

    found = runs_of(storage)
    if as_json:
        for run in found:
            typer.echo(json.dumps(run.model_dump(mode="json")))
        return
    if not found:
        OUT.print(f"no run in {storage} yet", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2))
    for column in ("run", "state", "step", "best", "heartbeat", "task"):
        table.add_column(column, no_wrap=True)
    for run in found:
        color = _COLORS.get(run.state, "default")
        best = "" if run.best is None else f"{run.best:.4f} ({run.metric}, step {run.best_step})"
        beat = "" if run.heartbeat is None else _ago(time.time() - run.heartbeat)
        table.add_row(run.name, f"[{color}]{run.state}[/]", f"{run.step}/{run.total_steps}", best, beat, run.task)
    (OUT if OUT.is_terminal else Console(width=_WIDTH)).print(table)
    for run in found:
        if run.why:
            OUT.print(f"{run.name}: {run.why}", markup=False, highlight=False, soft_wrap=True)


def _ago(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{max(0.0, seconds):.0f} s ago"
