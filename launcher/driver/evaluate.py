"""Scores a finished run's exported model: on a split of its own data, or on data it never saw. Runs on the head.

The workers are those the run's job file asks for; what each does is `train/worker.py`. Results are
`scores-<name>.json`.
"""

from dataclasses import dataclass

from rich.console import Console

from launcher.data.checks import check_columns, check_first_rows_of_split, lost_notes
from launcher.data.ray_data import DeterministicDataConfig
from launcher.data.splits import Split, is_numbered
from launcher.driver.control import open_control_channel
from launcher.driver.preflight import check_model
from launcher.driver.prepare import open_part
from launcher.driver.worker_group import WorkerGroupConfig, ray_session, run_worker_group
from launcher.errors import DataError, RunError
from launcher.formatting import list_names
from launcher.report.render import write_report
from launcher.rundir.directory import RunDir, runnable_job
from launcher.rundir.plan import Plan
from launcher.rundir.records import ScoresRecord
from launcher.spec.job import JobSpec
from launcher.spec.messages import not_one_of
from launcher.spec.scored import SPLITS, check_scores_name, scores_name
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.train.entrypoint import train_loop_per_worker
from launcher.train.worker_config import WorkerConfig


@dataclass(frozen=True)
class Difference:
    """One metric on new data, beside the run's own.

    Args:
        name: of the metric.
        value: on the new data.
        own: on the run's test (or validation) data; None where it was not scored.
        baseline: of the new data; None where there is none.
    """

    name: str
    value: float
    own: float | None
    baseline: float | None

    @property
    def change(self) -> float | None:
        """How much more (or, negative, less) it is than on the run's own data."""
        return None if self.own is None else self.value - self.own


def evaluate_run(run: RunDir, split: str, console: Console, job: JobSpec | None = None) -> ScoresRecord:
    """Score a finished run's exported model on a split of its data, by the workers its job file asks for.

    Args:
        run: a finished run.
        split: `validation` or `test`.
        console: shows how far it is.
        job: the run's, with changes; None takes it as it is, if it asks for no permission.

    Raises:
        RunError: the run has no model yet, or no such split.
    """
    job = job or runnable_job(run)
    if split not in SPLITS:
        raise RunError(not_one_of("--split", split, SPLITS))
    check_model(run)
    locations = getattr(job.data, split)
    if locations is None:
        raise RunError(f"{run.uri}: its job file has no data.{split}; add it to the job file of a new run")
    part = open_part(job, split, locations)
    _try(run, job, part, console)
    return _score(run, job, part, console)


def evaluate_data(
    run: RunDir, location: str, console: Console, name: str | None = None, job: JobSpec | None = None
) -> ScoresRecord:
    """Score a finished run's exported model on other data with the same columns.

    Args:
        run: a finished run.
        location: file, directory, glob, URI or data set of the hub, as in the job file.
        console: shows how far it is.
        name: of `scores-<name>.json`; None makes one of the location.
        job: the run's, with changes; None takes it as it is, if it asks for no permission.

    Raises:
        RunError: the run has no model yet, or the name cannot be used.
        DataError: the data cannot be read, lacks a column, or has labels that the model does not know.
    """
    job = job or runnable_job(run)
    name = check_scores_name(name) if name is not None else scores_name(location)
    check_model(run)
    # Its rows may name files beside themselves, not beside what the run was trained on.
    data = job.data.model_copy(update={"train": (location,), "validation": None, "test": None})
    job = job.model_copy(update={"data": data})
    split = open_part(job, name, (location,))
    _try(run, job, split, console)
    _check_classes(split, build_task(job))
    return _score(run, job, split, console)


def differences(run: RunDir, scores: ScoresRecord) -> tuple[str, tuple[Difference, ...]]:
    """The split of the run that new scores are laid beside, "" where none was scored, and each metric on both."""
    own = next((found for split in ("test", "validation") if (found := _scores(run, split)) is not None), None)
    values = {**scores.metrics, "loss": scores.loss}
    other = {**own.metrics, "loss": own.loss} if own is not None else {}
    rows = (Difference(name, value, other.get(name), scores.baseline.get(name)) for name, value in values.items())
    return own.split if own is not None else "", tuple(rows)


def _scores(run: RunDir, split: str) -> ScoresRecord | None:
    return run.find_record(f"scores-{split}.json", ScoresRecord)


def exported(run: RunDir, job: JobSpec) -> JobSpec:
    """The job with the run's own model, as what it was made of may be gone; states need no disk where none change."""
    parallel = job.parallel.model_copy(update={"offload_path": None, "zero": job.zero_stage})
    return job.model_copy(update={"model": job.model.exported(run.path("model")), "parallel": parallel})


def _try(run: RunDir, job: JobSpec, split: Split, console: Console) -> None:
    """Look at columns, classes and first rows, before Ray starts."""
    task = build_task(exported(run, job))
    check_columns(split, task)
    check_first_rows_of_split(job, task, split)
    for note in lost_notes(task, [split]):
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def _check_classes(split: Split, task: Task) -> None:
    """Refuse numbers whose names are none of the model's: as places among these they would be scored as nonsense.

    Raises:
        DataError: The split has such.
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
    model_job = exported(run, job)
    splits = {split.name: split}
    data = DeterministicDataConfig(model_job, plan, splits)
    with ray_session(model_job), open_control_channel(plan, console) as line:
        order = WorkerConfig(run, model_job, plan, splits, line.client, evaluate_only=split.name)
        run_worker_group(
            WorkerGroupConfig(model_job, run, data, (split.name,)),
            train_loop_per_worker,
            {"worker": order},
            line.request_stop,
        )
    write_report(run)
    return run.read_record(f"scores-{split.name}.json", ScoresRecord)
