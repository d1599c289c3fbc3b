"""The commands `check` and `train`. Runs on the client, or on the head in a submitted job.

Read `driver/run.py` next: the order of a run.
"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT, JobFile, Overrides, load, print_line, start_ray_early

if TYPE_CHECKING:
    from launcher.rundir.leakage import LeakageRecord
    from launcher.rundir.plan import Plan, WorkerMemory

commands = typer.Typer()


@commands.command()
def check(job: JobFile, overrides: Overrides = None) -> None:
    """Validate a job without training; print its steps and memory.

    Checks the job file, all data files, the columns and first rows, the labels and the model.
    """
    spec = load(job, overrides)
    from launcher.driver.preflight import preflight
    from launcher.driver.prepare import prepare
    from launcher.driver.progress import reading_progress

    if spec.tune is not None:
        from launcher.tune.run import check_sweep, check_trials

        # Before `prepare`, which reads the data.
        check_sweep(spec)
    with reading_progress(OUT) as on_progress:
        prepared = prepare(spec, on_progress, measure=True)
    if spec.tune is not None:
        check_trials(prepared)
    _print_plan(prepared.plan, preflight(prepared, "check"))


@commands.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    chaos: Annotated[
        str | None, typer.Option(help="Inject faults, to test recovery: kill=1@step37,disk_full@step90,random=2.")
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option(help="Start from another run's weights: exported model or newest checkpoint.", metavar="RUN"),
    ] = None,
) -> None:
    """Train a job, export and test the best model, write a report.

    Run the same command again to resume an interrupted run.
    """
    from launcher.spec.fault_injection import parse_faults

    # First, since it costs nothing: a wrong fault is refused before anything starts.
    faults = parse_faults(chaos) if chaos is not None else None
    spec = load(job, overrides)
    # Ray starts in the background, while the imports below take seconds.
    start_ray_early(spec)
    if fork is not None:
        from launcher.driver.fork import fork_job

        # This may copy weights from remote storage, while Ray starts.
        spec = fork_job(spec, fork, OUT)
    from launcher.driver.run import run_job

    run_job(spec, OUT, faults)


def _print_plan(plan: "Plan", leaks: "LeakageRecord | None") -> None:
    from launcher.driver.preflight import leak_notes
    from launcher.formatting import format_bytes
    from launcher.rundir.leakage import no_leak_sentence

    table = Table(show_header=False, box=None)
    rows = {
        "task": plan.task,
        "model": ", ".join(f"{key} {value}" for key, value in plan.model.items()),
        "rows": f"{plan.train_rows} train, {plan.validation_rows} validation, {plan.test_rows} test",
        "steps": f"{plan.total_steps} ({plan.steps_per_epoch} per epoch, {plan.epochs} epochs) of {plan.batch_size}",
        "evaluation": f"{plan.metric} ({plan.metric_mode}) every {plan.evaluate_every_steps or plan.steps_per_epoch}",
        "workers": f"{plan.workers}, ZeRO-{plan.zero}, {plan.accumulation} x {plan.micro_batch} samples each per step",
        "bits": _describe_bits(plan),
        "states": f"{plan.state_bytes_per_worker / 2**30:.2f} GiB of weights, gradients, optimizer states per worker",
    }
    if plan.memory is not None:
        rows["memory"] = _describe_memory(plan.memory, plan.memory_limit_bytes)
        rows["checkpoint"] = f"{format_bytes(plan.memory.checkpoint)} each"
    if leaks is not None and not leaks.leaks:
        rows["leakage"] = no_leak_sentence(leaks)
    for name, value in rows.items():
        # Text, as rich reads the brackets of a path as markup.
        table.add_row(name, Text(value))
    OUT.print(table)
    for note in (*plan.notes, *leak_notes(leaks)):
        print_line(f"note: {note}")


def _describe_bits(plan: "Plan") -> str:
    from launcher.spec.exactness import exact_workers

    if plan.inexact:
        return f"equal to about 1e-6 on other numbers of workers: {'; '.join(plan.inexact)}"
    return f"the same on {', '.join(map(str, exact_workers(plan.virtual_ranks)))} workers, and after any stop"


def _describe_memory(memory: "WorkerMemory", limit: int | None) -> str:
    from launcher.formatting import format_bytes

    of_limit = f" of {format_bytes(limit)}" if limit is not None else ""
    host = f", {format_bytes(memory.host)} more on the host" if memory.host else ""
    disk = f", {format_bytes(memory.disk)} on the node's disk" if memory.disk else ""
    staging = f", and {format_bytes(memory.copy_bytes)} to stage checkpoints" if memory.copy_bytes else ""
    return (
        f"{format_bytes(memory.peak)}{of_limit} per worker at the peak: weights {format_bytes(memory.weights)}, "
        f"gradients {format_bytes(memory.gradients)}, optimizer {format_bytes(memory.optimizer)}, DeepSpeed's buffers "
        f"{format_bytes(memory.buffers)}, activations {format_bytes(memory.activations)}{host}{disk}{staging}"
    )
