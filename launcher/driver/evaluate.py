"""Scores a finished run's exported model, on a split of its own data or on new data. Runs on the head (the driver).

The workers are those that the run's job file asks for; each runs `train/worker.py`. Results are `scores-<name>.json`.
"""

from dataclasses import dataclass

from rich.console import Console

from launcher.data.checks import check_columns, check_first_rows_of_split, note_lost_labels
from launcher.data.files import errors_without_keys
from launcher.data.ray_data import DeterministicDataConfig
from launcher.data.splits import Split, is_numbered
from launcher.driver.control import open_control_channel
from launcher.driver.preflight import check_model
from launcher.driver.prepare import open_split_file, open_splits
from launcher.driver.worker_group import WorkerGroupConfig, ray_session, run_worker_group
from launcher.errors import DataError, RunError
from launcher.formatting import list_names, print_line
from launcher.report.render import write_report
from launcher.rundir.directory import RunDir, runnable_job
from launcher.rundir.plan import Plan
from launcher.rundir.records import ScoresRecord
from launcher.spec.job import JobSpec, TaskSpec
from launcher.spec.messages import not_one_of
from launcher.spec.scored import EVALUATION_SPLITS, check_scores_name, scores_name
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.train.entrypoint import train_loop_per_worker
from launcher.train.worker_config import WorkerConfig


@dataclass(frozen=True)
class Difference:
    """One metric on new data, next to the run's own.

    Args:
        name: Name of the metric.
        value: Value on the new data.
        own: Value on the run's test (or validation) data; None if it was not scored.
        baseline: Value of the baseline on the new data; None if there is none.
    """

    name: str
    value: float
    own: float | None
    baseline: float | None

    @property
    def change(self) -> float | None:
        """Return the value minus the run's own."""
        return None if self.own is None else self.value - self.own


def evaluate_run(run: RunDir, split: str, console: Console, job: JobSpec | None = None) -> ScoresRecord:
    """Score a finished run's exported model on a split of its data.

    Args:
        run: Finished run.
        split: Name of the split, `validation` or `test`.
        console: Console for progress.
        job: Job of the run, with changes; None takes it as it is, if it needs no permission.

    Raises:
        RunError: The run has no model yet, or no such split.
    """
    job = job or runnable_job(run)
    if split not in EVALUATION_SPLITS:
        raise RunError(not_one_of("--split", split, EVALUATION_SPLITS))
    check_model(run)
    if not job.data.locations(split):
        raise RunError(f"{run.uri}: its job file has no data.{split}; add it to the job file of a new run")
    # This split alone: the training data may be gone.
    part = open_splits(job, names=(split,))[split]
    _check_rows(run, job, part, console)
    return _score(run, job, part, console)


def evaluate_data(
    run: RunDir, location: str, console: Console, name: str | None = None, job: JobSpec | None = None
) -> ScoresRecord:
    """Score a finished run's exported model on other data with the same columns.

    Args:
        run: Finished run.
        location: File, directory, glob, URI or data set of the Hub, as in the job file.
        console: Console for progress.
        name: Name in `scores-<name>.json`; None derives it from the location.
        job: Job of the run, with changes; None takes it as it is, if it needs no permission.

    Raises:
        RunError: The run has no model yet, or the name cannot be used.
        DataError: The data cannot be read, lacks a column, or has labels that the model does not know.
    """
    job = job or runnable_job(run)
    name = check_scores_name(name) if name is not None else scores_name(location)
    check_model(run)
    # As training data: rows that name files (images) name them relative to their own file, not to the run's data.
    data = job.data.model_copy(update={"train": (location,), "validation": None, "test": None})
    job = job.model_copy(update={"data": data})
    with errors_without_keys(name, can_set_format=True):
        split = open_split_file(job, name, (location,))
    _check_rows(run, job, split, console)
    _check_classes(split, build_task(job))
    return _score(run, job, split, console)


def compare_with_own_scores(run: RunDir, scores: ScoresRecord) -> tuple[str, tuple[Difference, ...]]:
    """Compare new scores with the run's own.

    Returns:
        Name of the run's split that they are compared with, "" if none was scored; and each metric on both.
    """
    records = [run.find_record(f"scores-{split}.json", ScoresRecord) for split in ("test", "validation")]
    own = next((record for record in records if record is not None), None)
    values = {**scores.metrics, "loss": scores.loss}
    own_values = {**own.metrics, "loss": own.loss} if own is not None else {}
    rows = (Difference(name, value, own_values.get(name), scores.baseline.get(name)) for name, value in values.items())
    return own.split if own is not None else "", tuple(rows)


def with_exported_model(run: RunDir, job: JobSpec) -> JobSpec:
    """Return the job with the run's exported model, as the base model may be gone.

    Nothing is offloaded to a disk: no optimizer states change in an evaluation.
    """
    parallel = job.parallel.model_copy(update={"offload_path": None, "zero": job.zero_stage})
    parameters = build_task(job).exported_params().model_dump(mode="json")
    task = TaskSpec.model_validate({"type": job.task.type, **parameters})
    return job.model_copy(update={"model": job.model.exported(run.path("model")), "parallel": parallel, "task": task})


def _check_rows(run: RunDir, job: JobSpec, split: Split, console: Console) -> None:
    """Check columns, classes and first rows before Ray starts."""
    task = build_task(with_exported_model(run, job))
    check_columns(split, task)
    check_first_rows_of_split(job, task, split)
    for note in note_lost_labels(task, [split]):
        print_line(console, f"note: {note}")


def _check_classes(split: Split, task: Task) -> None:
    """Refuse numbered classes whose names are not the model's: read as the model's numbers, scores would be nonsense.

    Raises:
        DataError: The split has such classes.
    """
    known = getattr(task.params, "labels", None)
    for column in task.target_columns:
        names = dict(split.class_names).get(column)
        if known and names and names != tuple(known) and is_numbered(split.schema.field(column).type):
            raise DataError(
                f"{split.locate(0)[0]}: the classes of {column} are {list_names(names)}, but the model knows "
                f"{list_names(known)}; write the model's names instead of numbers"
            )


def _score(run: RunDir, job: JobSpec, split: Split, console: Console) -> ScoresRecord:
    plan = run.read_record("plan.json", Plan)
    model_job = with_exported_model(run, job)
    splits = {split.name: split}
    group = WorkerGroupConfig(model_job, run, DeterministicDataConfig(model_job, plan, splits), (split.name,))
    # Without a limit for hangs, as `evaluate_worker` sends no heartbeats.
    with ray_session(model_job), open_control_channel(plan, console) as control:
        config = WorkerConfig(run, model_job, plan, splits, control.client, evaluate_only=split.name)
        run_worker_group(group, train_loop_per_worker, {"worker": config}, control.request_stop)
    write_report(run)
    return run.read_record(f"scores-{split.name}.json", ScoresRecord)
