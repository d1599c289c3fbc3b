"""The command line: parse, call one function, print. Runs on the client.

Importing it loads neither torch nor ray; a command does when it needs them.
Exit codes: 0 done, 1 the run stopped, 2 something the user can mend, 130 interrupted.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from launcher.errors import Interrupted, LauncherError, SpecError, UserError

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.spec.job import JobSpec

app = typer.Typer(
    help="Fine-tune pretrained models on Ray: the loss curve is a function of the job file, not of the cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sweeps = typer.Typer(help="Look at finished sweeps.", no_args_is_help=True)
app.add_typer(sweeps, name="sweeps")
_OUT, _ERR = Console(), Console(stderr=True)

JobFile = Annotated[Path, typer.Argument(help="The job file (YAML).", metavar="JOB.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes by dotted path: train.learning_rate=3e-5", metavar="[KEY=VALUE]...")
]
Run = Annotated[str, typer.Argument(help="Directory or URI of a run.", metavar="RUN")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and Ray's own messages.")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["LAUNCHER_DEBUG"] = "1"


@app.command()
def train(job: JobFile, overrides: Overrides = None) -> None:
    """Train a job, or go on with it; then export, score the test data, write the report."""
    spec = _load(job, overrides)
    from launcher.run import run_job

    run_job(spec, _OUT)


@app.command()
def tune(job: JobFile, overrides: Overrides = None) -> None:
    """Search the space of `tune:`, or go on with it; then export the best model, score it on test, write the report."""
    spec = _load(job, overrides)
    from launcher.run import run_sweep

    run_sweep(spec, _OUT)


@app.command()
def check(job: JobFile, overrides: Overrides = None) -> None:
    """Validate all that can be without training, and print the plan."""
    spec = _load(job, overrides)
    from launcher.prepare import prepare, try_rows

    if spec.tune is not None:
        from launcher.tune.tuner import check_sweep

        check_sweep(spec)
    prepared = prepare(spec)
    try_rows(prepared)
    _print_plan(prepared.plan)


@app.command()
def evaluate(run: Run, split: Annotated[str, typer.Option(help="validation or test.")] = "test") -> None:
    """Score a run's exported model on a split of its data."""
    from launcher.rundir import find_run

    found = find_run(run)
    from launcher.run import evaluate_run

    scores = evaluate_run(found, split, _OUT)
    table = Table("metric", split, "baseline")
    for name, value in scores.metrics.items():
        baseline = scores.baseline.get(name)
        table.add_row(name, f"{value:.4f}", "" if baseline is None else f"{baseline:.4f}")
    _OUT.print(table)
    _OUT.print(f"{scores.rows} rows; details in {found.path(f'scores-{split}.json')}", highlight=False, soft_wrap=True)


@app.command()
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
    _OUT.print(f"{rows} rows{left} in {output}", highlight=False, soft_wrap=True)


@app.command()
def report(run: Run) -> None:
    """Write the reports of a run, and of its sweep if it has one, anew: self-contained HTML files."""
    from launcher.report.render import write_report
    from launcher.report.sweep import find_sweep, write_sweep_report
    from launcher.rundir import find_run

    sweep = find_sweep(run)
    if sweep is not None:
        _OUT.print(write_sweep_report(sweep), highlight=False, soft_wrap=True)
    if sweep is None or sweep.exists("job.yaml"):
        _OUT.print(write_report(find_run(run)), highlight=False, soft_wrap=True)


@sweeps.command("compare")
def compare_sweeps(
    runs: Annotated[list[str], typer.Argument(help="Directories or URIs of two or more sweeps.", metavar="RUN...")],
) -> None:
    """What each of several sweeps found, side by side."""
    from launcher.errors import RunError
    from launcher.report.sweep import collect_sweep, find_sweep, value_text

    table = Table("", *runs)
    columns = []
    for run in runs:
        found = find_sweep(run)
        if found is None:
            raise RunError(f"{run}: no sweep there (it has no sweep/sweep.json); give what `launcher tune` printed")
        columns.append(collect_sweep(found).facts())
    for name in dict.fromkeys(name for facts in columns for name in facts):
        table.add_row(name, *(value_text(facts[name]) if name in facts else "" for facts in columns))
    _OUT.print(table)


@app.command()
def tasks(name: Annotated[str | None, typer.Argument(help="Name or import path; none lists all.")] = None) -> None:
    """List the tasks: the columns they read, their parameters and metrics."""
    from launcher.tasks import describe, task_names

    for found in [name] if name else task_names():
        facts = describe(found)
        _OUT.print(f"[bold]{found}[/bold]  {facts.summary}", highlight=False, soft_wrap=True)
        _OUT.print(f"  reads    {', '.join(facts.inputs)}; learns {', '.join(facts.targets) or 'from the same'}")
        _OUT.print(f"  metrics  {', '.join(facts.metrics)}", highlight=False, soft_wrap=True)
        table = Table("task: key", "default", "meaning", box=None, padding=(0, 2))
        for key, default, meaning in facts.parameters:
            table.add_row(key, default, meaning)
        _OUT.print(table)
        _OUT.print()


@app.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from launcher.spec.load import job_schema
    from launcher.tasks import params_models

    typer.echo(json.dumps(job_schema(params_models()), indent=1))


def _load(path: Path, overrides: list[str] | None) -> "JobSpec":
    from launcher.rundir import check_storage
    from launcher.spec.load import load_job
    from launcher.tasks import params_of

    job = load_job(path, overrides or (), params_of)
    check_storage(job.output.storage)
    return job


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
    _OUT.print(table)
    for note in plan.notes:
        _OUT.print(f"note: {note}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the `launcher` command and of `python -m launcher`."""
    debug = "--debug" in sys.argv
    if not debug:
        _quiet()
    try:
        app()
    except LauncherError as error:
        if debug:
            raise
        problems = error.problems if isinstance(error, SpecError) else (error.message,)
        for problem in problems:
            _ERR.print(problem, markup=False, highlight=False, soft_wrap=True)
        sys.exit(130 if isinstance(error, Interrupted) else 2 if isinstance(error, UserError) else 1)
    except Exception as error:  # process border: what nobody foresaw is a defect, told in one line
        if debug:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        remedy = "the same command with --debug after `launcher` shows where; please report it"
        _ERR.print(f"the launcher failed ({what}); {remedy}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _quiet() -> None:
    """Libraries say less: a person sees the launcher's own lines. `--debug` leaves them as they are."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.simplefilter("ignore")
    for name in ("ray", "ray.data", "ray.train", "transformers", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
