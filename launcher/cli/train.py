"""The commands of a run: check, train, tune, evaluate, predict, report. Runs on the client, or on the head."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from launcher.cli.options import EVALUATE_KEYS, OUT, JobFile, Overrides, Run, begin_ray, check_scored, load, load_run

if TYPE_CHECKING:
    from launcher.driver.evaluate import Difference
    from launcher.rundir.leakage import LeakageRecord
    from launcher.rundir.plan import Plan, WorkerMemory
    from launcher.rundir.records import ScoresRecord

commands = typer.Typer()

_PREDICT_KEYS = ("cluster", "task", "data.on_bad_row", "evaluation.batch_size")


@commands.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    chaos: Annotated[
        str | None,
        typer.Option(help="Faults on purpose, to try how the run survives: kill=1@step37,disk_full@step90,random=2."),
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            help="Begin from the weights of another run: of its model, or of its newest checkpoint.", metavar="RUN"
        ),
    ] = None,
) -> None:
    """Train a job, or go on with it; then export, score the test data, write the report."""
    from launcher.spec.fault_injection import parse_faults

    faults = parse_faults(chaos) if chaos is not None else None
    spec = load(job, overrides)
    begin_ray(spec)
    if fork is not None:
        from launcher.driver.fork import fork_job

        spec = fork_job(spec, fork, OUT)
    from launcher.driver.run import run_job

    run_job(spec, OUT, faults)


def _memory_words(memory: "WorkerMemory", limit: int | None) -> str:
    from launcher.formatting import format_bytes

    has = f" of {format_bytes(limit)}" if limit is not None else ""
    host = f", {format_bytes(memory.host)} more on the host" if memory.host else ""
    host += f", {format_bytes(memory.disk)} on the node's disk" if memory.disk else ""
    copy = (
        f", and {format_bytes(memory.copy_bytes)} for the copy that a checkpoint is written from"
        if memory.copy_bytes
        else ""
    )
    return (
        f"{format_bytes(memory.peak)}{has} per worker at the peak: weights {format_bytes(memory.weights)}, gradients "
        f"{format_bytes(memory.gradients)}, optimizer {format_bytes(memory.optimizer)}, DeepSpeed's buffers "
        f"{format_bytes(memory.buffers)}, activations {format_bytes(memory.activations)}{host}{copy}"
    )


@commands.command()
def tune(job: JobFile, overrides: Overrides = None) -> None:
    """Search the space of `tune:`, or go on with it; then export the best model, score it on test, write the report."""
    spec = load(job, overrides)
    begin_ray(spec, (spec.tune and spec.tune.max_concurrent) or 1)
    from launcher.tune.run import run_sweep

    run_sweep(spec, OUT)


@commands.command()
def check(job: JobFile, overrides: Overrides = None) -> None:
    """Validate all that can be without training, and print the plan."""
    spec = load(job, overrides)
    from launcher.driver.preflight import preflight
    from launcher.driver.prepare import prepare
    from launcher.driver.progress import reading_progress

    if spec.tune is not None:
        from launcher.tune.run import check_sweep, check_trials

        check_sweep(spec)
    with reading_progress(OUT) as on_progress:
        prepared = prepare(spec, on_progress, measure=True)
    if spec.tune is not None:
        check_trials(prepared)
    _print_plan(prepared.plan, preflight(prepared, "check"))


@commands.command()
def evaluate(
    run: Run,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="validation or test (the default) of the run's own data.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Other data instead: a file, directory, glob, URI or data set of the hub.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of scores-NAME.json for --data; made of the location.")] = None,
) -> None:
    """Score a run's exported model on a split of its data, or on other data beside it.

    Changes may be made to cluster, parallel, task (columns), data.format, data.on_bad_row and evaluation.batch_size.
    """
    from launcher.rundir.directory import find_run

    check_scored(split, data, name)
    found = find_run(run)
    job = load_run(found, overrides, EVALUATE_KEYS)
    begin_ray(job)
    from launcher.driver.evaluate import differences, evaluate_data, evaluate_run

    if data is None:
        scores = evaluate_run(found, split or "test", OUT, job)
    else:
        scores = evaluate_data(found, data, OUT, name, job)
    own, rows = differences(found, scores)
    _print_scores(scores, own if data is not None else "", rows)
    OUT.print(
        f"{scores.rows} rows; details in {found.path(f'scores-{scores.split}.json')}", highlight=False, soft_wrap=True
    )


@commands.command()
def predict(
    run: Run,
    input: Annotated[str, typer.Argument(help="File, directory or glob; local or a URI.", metavar="INPUT")],
    output: Annotated[str, typer.Option(help="Directory or URI for the Parquet files.")],
    overrides: Overrides = None,
) -> None:
    """Run a run's exported model over data of any size; keeps its columns, adds the prediction and scores.

    Interrupted, the same command goes on. Changes may be made to cluster, task (columns), data.on_bad_row and
    evaluation.batch_size.
    """
    from launcher.rundir.directory import find_run

    found = find_run(run)
    job = load_run(found, overrides, _PREDICT_KEYS)
    begin_ray(job)
    from launcher.predict.run import predict_run

    done = predict_run(found, input, output, OUT, job)
    left = f", {done.skipped_rows} of them without a prediction" if done.skipped_rows else ""
    before = "complete: " if done.found_rows == done.rows else ""
    OUT.print(f"{before}{done.rows} rows{left} in {output}", highlight=False, soft_wrap=True)


@commands.command()
def report(run: Run) -> None:
    """Write the reports of a run, and of its sweep if it has one, anew: self-contained HTML files."""
    from launcher.report.render import write_report
    from launcher.report.sweep import find_sweep, write_sweep_report
    from launcher.rundir.directory import find_run

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
    from launcher.spec.loader import job_schema
    from launcher.tasks import params_models

    typer.echo(json.dumps(job_schema(params_models()), indent=1))


def _print_scores(scores: "ScoresRecord", own: str, rows: "tuple[Difference, ...]") -> None:
    """The metrics; beside those of the run's own split where there is one."""
    table = Table("metric", scores.split, *((own, "difference") if own else ()), "baseline")
    for row in rows:
        beside = (_figure(row.own), "" if row.change is None else f"{row.change:+.4f}") if own else ()
        table.add_row(row.name, _figure(row.value), *beside, _figure(row.baseline))
    OUT.print(table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _print_plan(plan: "Plan", leaks: "LeakageRecord | None") -> None:
    from launcher.driver.preflight import leak_notes
    from launcher.formatting import format_bytes
    from launcher.rundir.leakage import clean_sentence

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
    if plan.memory is not None:
        rows["memory"] = _memory_words(plan.memory, plan.memory_limit_bytes)
        rows["checkpoint"] = f"{format_bytes(plan.memory.checkpoint)} each"
    if leaks is not None and not leaks.leaks:
        rows["leakage"] = clean_sentence(leaks)
    for name, value in rows.items():
        table.add_row(name, value)
    OUT.print(table)
    for note in (*plan.notes, *leak_notes(leaks)):
        OUT.print(f"note: {note}", highlight=False, soft_wrap=True)
