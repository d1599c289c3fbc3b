"""The commands of a run: check, train, tune, evaluate, predict, report. Runs on the client, or on the head."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from launcher.cli.arguments import OUT, JobFile, Overrides, Run, load

if TYPE_CHECKING:
    from launcher.plan import Plan

commands = typer.Typer()


@commands.command()
def train(job: JobFile, overrides: Overrides = None) -> None:
    """Train a job, or go on with it; then export, score the test data, write the report."""
    spec = load(job, overrides)
    from launcher.run import run_job

    run_job(spec, OUT)


@commands.command()
def tune(job: JobFile, overrides: Overrides = None) -> None:
    """Search the space of `tune:`, or go on with it; then export the best model, score it on test, write the report."""
    spec = load(job, overrides)
    from launcher.run import run_sweep

    run_sweep(spec, OUT)


@commands.command()
def check(job: JobFile, overrides: Overrides = None) -> None:
    """Validate all that can be without training, and print the plan."""
    spec = load(job, overrides)
    from launcher.prepare import prepare, try_rows

    if spec.tune is not None:
        from launcher.tune.tuner import check_sweep

        check_sweep(spec)
    prepared = prepare(spec)
    try_rows(prepared)
    _print_plan(prepared.plan)


@commands.command()
def evaluate(run: Run, split: Annotated[str, typer.Option(help="validation or test.")] = "test") -> None:
    """Score a run's exported model on a split of its data."""
    from launcher.rundir import find_run

    found = find_run(run)
    from launcher.run import evaluate_run

    scores = evaluate_run(found, split, OUT)
    table = Table("metric", split, "baseline")
    for name, value in scores.metrics.items():
        baseline = scores.baseline.get(name)
        table.add_row(name, f"{value:.4f}", "" if baseline is None else f"{baseline:.4f}")
    OUT.print(table)
    OUT.print(f"{scores.rows} rows; details in {found.path(f'scores-{split}.json')}", highlight=False, soft_wrap=True)


@commands.command()
def predict(
    run: Run,
    input: Annotated[str, typer.Argument(help="File, directory or glob; local or a URI.", metavar="INPUT")],
    output: Annotated[str, typer.Option(help="Directory or URI for the Parquet files.")],
) -> None:
    """Run a run's exported model over data of any size; keeps its columns, adds the prediction and scores."""
    from launcher.rundir import find_run

    found = find_run(run)
    from launcher.predict import predict_run

    rows, skipped = predict_run(found, input, output)
    left = f", {skipped} of them without a prediction" if skipped else ""
    OUT.print(f"{rows} rows{left} in {output}", highlight=False, soft_wrap=True)


@commands.command()
def report(run: Run) -> None:
    """Write the reports of a run, and of its sweep if it has one, anew: self-contained HTML files."""
    from launcher.report.render import write_report
    from launcher.report.sweep import find_sweep, write_sweep_report
    from launcher.rundir import find_run

    sweep = find_sweep(run)
    if sweep is not None:
        OUT.print(write_sweep_report(sweep), highlight=False, soft_wrap=True)
    if sweep is None or sweep.exists("job.yaml"):
        OUT.print(write_report(find_run(run)), highlight=False, soft_wrap=True)


@commands.command()
def tasks(name: Annotated[str | None, typer.Argument(help="Name or import path; none lists all.")] = None) -> None:
    """List the tasks: the columns they read, their parameters and metrics."""
    from launcher.tasks import describe, task_names

    for found in [name] if name else task_names():
        facts = describe(found)
        OUT.print(f"[bold]{found}[/bold]  {facts.summary}", highlight=False, soft_wrap=True)
        OUT.print(f"  reads    {', '.join(facts.inputs)}; learns {', '.join(facts.targets) or 'from the same'}")
        OUT.print(f"  metrics  {', '.join(facts.metrics)}", highlight=False, soft_wrap=True)
        table = Table("task: key", "default", "meaning", box=None, padding=(0, 2))
        for key, default, meaning in facts.parameters:
            table.add_row(key, default, meaning)
        OUT.print(table)
        OUT.print()


@commands.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from launcher.spec.load import job_schema
    from launcher.tasks import params_models

    typer.echo(json.dumps(job_schema(params_models()), indent=1))


def _print_plan(plan: "Plan") -> None:
    table = Table(show_header=False, box=None)
    rows = {
        "task": plan.task,
        "model": ", ".join(f"{key} {value}" for key, value in plan.model.items()),
        "rows": f"{plan.train_rows} train, {plan.validation_rows} validation, {plan.test_rows} test",
        "steps": f"{plan.total_steps} ({plan.steps_per_epoch} per epoch, {plan.epochs} epochs) of {plan.batch_size}",
        "evaluation": f"{plan.metric} ({plan.metric_mode}) every {plan.evaluate_every_steps or plan.steps_per_epoch}",
        "workers": f"{plan.workers}, ZeRO-{plan.zero}, {plan.accumulation} x {plan.micro_batch} samples each per step",
        "states": f"{plan.state_bytes_per_worker / 2**30:.2f} GiB of weights, gradients, optimizer states per worker",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    OUT.print(table)
    for note in plan.notes:
        OUT.print(f"note: {note}", highlight=False, soft_wrap=True)
