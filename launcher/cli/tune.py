"""The commands of sweeps: `tune`, `sweeps compare`. Runs on the client, or on the head in a submitted job."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT, JobFile, Overrides, load, start_ray_early

commands = typer.Typer()
sweeps = typer.Typer(help="Compare finished sweeps.", no_args_is_help=True)
commands.add_typer(sweeps, name="sweeps")


@commands.command()
def tune(job: JobFile, overrides: Overrides = None) -> None:
    """Run the sweep of a job's 'tune' section; export the best model.

    Also evaluates that model on the test data and writes reports. Run the same command again to resume an
    interrupted sweep.
    """
    spec = load(job, overrides)
    # Before the import below loads ray and torch.
    # Without a limit of its own a sweep gets the cores of the machine (`local_ray.local_cpus`).
    start_ray_early(spec, (spec.tune and spec.tune.max_concurrent) or 1)
    from launcher.tune.run import run_sweep

    run_sweep(spec, OUT)


@sweeps.command("compare")
def compare_sweeps(
    runs: Annotated[list[str], typer.Argument(help="Directories or URIs of two or more sweeps.", metavar="RUN")],
) -> None:
    """Print the results of several sweeps side by side."""
    from launcher.errors import RunError
    from launcher.formatting import format_param
    from launcher.report.sweep import collect_sweep, find_sweep

    # Escaped: rich reads brackets, which paths may hold, as markup.
    table = Table("", *map(escape, runs))
    columns = []
    for run in runs:
        sweep = find_sweep(run)
        if sweep is None:
            raise RunError(f"{run}: no sweep there (it has no sweep/sweep.json); give what `launcher tune` printed")
        columns.append(collect_sweep(sweep).facts())
    for name in dict.fromkeys(name for facts in columns for name in facts):
        table.add_row(name, *(Text(format_param(facts[name]) if name in facts else "") for facts in columns))
    OUT.print(table)
