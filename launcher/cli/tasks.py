"""The commands `tasks` and `schema`: what a job file may contain. Runs on the client."""

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT, print_line

commands = typer.Typer()


@commands.command()
def tasks(
    name: Annotated[
        str | None, typer.Argument(help="Name or import path of one task; the default is all.", metavar="TASK")
    ] = None,
) -> None:
    """List the tasks with their columns, parameters and metrics."""
    from launcher.tasks import describe_task, task_names

    for task in [name] if name else task_names():
        description = describe_task(task)
        OUT.print(Text.assemble((task, "bold"), f"  {description.summary}"), soft_wrap=True)
        targets = ", ".join(description.targets) or "from the same"
        print_line(f"  reads    {', '.join(description.inputs)}; learns {targets}")
        print_line(f"  metrics  {', '.join(description.metrics)}")
        table = Table("task: key", "default", "meaning", box=None, padding=(0, 2))
        for key, default, meaning in description.parameters:
            table.add_row(*map(Text, (key, default, meaning)))
        OUT.print(table)
        OUT.print()


@commands.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from launcher.spec.schema import job_schema
    from launcher.tasks import params_models

    # Not by rich, which would wrap the lines of the JSON.
    typer.echo(json.dumps(job_schema(params_models()), indent=1))
