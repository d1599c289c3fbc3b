"""The order of a sweep: search, repeats, export of the best trial. Runs on the head (the driver).

Every stage skips what is complete on disk, so the same command resumes a sweep that was interrupted anywhere. At the
end `launcher/driver/run.py` trains, exports and scores the best job like any other.
Read `tune_driver.py` next, which runs the trials with Ray Tune.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rich.console import Console

from launcher.data.checks import check_columns
from launcher.data.files import list_files
from launcher.driver.mixture_plan import metric_modes
from launcher.driver.preflight import check_leakage_in_background, preflight
from launcher.driver.prepare import PreparedJob, absolute_model_name, prepare, with_absolute_paths
from launcher.driver.run import run_job
from launcher.driver.worker_group import ray_session
from launcher.errors import DataError, RunError, TrainingError, UserError
from launcher.formatting import format_param, print_line
from launcher.report.sweep import write_sweep_report
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.leakage import LeakageRecord
from launcher.rundir.trials import SweepRecord, TrialRecord
from launcher.spec.curve import spec_difference
from launcher.spec.data import DataSpec
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.spec.tune import TuneSpec
from launcher.tasks import build_task, params_class
from launcher.tasks.results import MetricMode
from launcher.train.loggers import mlflow, trackers
from launcher.tune.progress import watch_sweep
from launcher.tune.search import Search, compute_importances
from launcher.tune.space import Params, check_space, choose_metric, trial_job
from launcher.tune.sweep_dir import SweepDir
from launcher.tune.tables import write_tables
from launcher.tune.trial import SweepContext
from launcher.tune.tune_driver import TIME_LIMIT_REACHED, Listener, Phase, max_concurrent_trials, run_phase

_WORST = 1e30
"""Magnitude of a failed trial's value: Tune needs a finite number."""


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that is ready to start or resume."""

    prepared: PreparedJob
    """Resolved job without test data."""
    data: DataSpec
    """Data with the locations of the test data, which is not read before the best trial is known."""
    sweep: SweepDir
    search: Search
    leakage: LeakageRecord | None
    """Rows that the splits have in common, if they were compared already."""


@dataclass(frozen=True)
class SweepResult:
    """A completed sweep."""

    sweep: SweepDir
    best: TrialRecord
    job: JobSpec
    """Job of the best trial, with test data. This job is exported."""


def run_sweep(job: JobSpec, console: Console) -> RunDir:
    """Search the job's `tune.space`, then export the best trial's model and score it on the test data, once.

    Raises:
        UserError: The job file, the data or the model must be fixed first.
        TrainingError: No trial reached an evaluation. The records are kept.
    """
    prepared_sweep = prepare_sweep(job)
    sweep, prepared = prepared_sweep.sweep, prepared_sweep.prepared
    # Compared once per sweep. The test data are held out: they are compared when the best job runs.
    splits = prepared.splits if sweep.record.best is None else {}
    known_leakage = prepared_sweep.leakage if splits else None
    spec, metric, mode, run = sweep.spec, sweep.record.metric, sweep.record.mode, sweep.run
    print_line(
        console,
        f"{prepared.plan.task}: {spec.trials} trials by {spec.search} search, {spec.scheduler} scheduler, for {metric} "
        f"({mode}) on {prepared.plan.validation_rows} validation rows",
    )
    # Before the trials: their MLflow runs become children of this one.
    trackers.begin(run, prepared.job, {"tune.trials": spec.trials, "tune.metric": metric, "tune.mode": mode})
    try:
        with (
            watch_sweep(spec, metric, mode, console) as listener,
            check_leakage_in_background(prepared.job, run, splits, known_leakage, console),
        ):
            result = run_trials(prepared_sweep, listener)
    finally:
        write_sweep_report(run)
    best = result.best.best_evaluation(mode)
    assert best is not None
    values = "  ".join(f"{key} {format_param(value)}" for key, value in result.best.params.items())
    print_line(
        console,
        f"best: trial {result.best.number}, {metric} {best.value:.4f}  {values}",
    )
    # Before `run_job`, which finds the trial's checkpoints in the run and resumes from them. A finished trial is only
    # exported and scored.
    promote_best(result)
    run_job(result.job, console)
    report = write_sweep_report(run)
    print_line(
        console,
        f"best job  : {run.path('sweep/best.yaml')}\nsweep     : {report}",
    )
    return run


def tune_job(job: JobSpec, listener: Listener) -> SweepResult:
    """Run `prepare_sweep` and `run_trials`, without the export. Raises the same errors."""
    return run_trials(prepare_sweep(job), listener)


def check_sweep(job: JobSpec) -> JobSpec:
    """Check that a job is a sweep, and return it with absolute model directories in its space.

    Raises:
        UserError: The job file must be fixed first.
    """
    if job.tune is None:
        raise UserError("tune: missing; set what to search, as in `tune: {space: {train.learning_rate: ...}}`")
    if not job.data.locations("validation"):
        raise DataError("data.validation: missing; a sweep ranks its trials by the validation data")
    if job.tune.refit != "none" and job.data.mixture is not None and job.data.validation is not None:
        raise DataError(
            "tune.refit: trains on the validation data too, and data.validation belongs to no source of data.mixture; "
            "give each source its own validation, or drop refit"
        )
    job = job.model_copy(update={"tune": _with_absolute_models(job.tune)})
    assert job.tune is not None
    check_space(job, job.tune, params_class)
    for location in job.data.locations("test"):
        if not location.startswith("hub:"):
            list_files("test", location, job.data.format)  # checks that the files exist; their content stays unread
    return job


def check_trials(prepared: PreparedJob) -> tuple[str, MetricMode]:
    """Check that the models and columns of all trials exist, and that the task measures the metric.

    Returns:
        Metric that ranks the trials, and its direction.

    Raises:
        UserError: A searched value cannot be used, or there is no such metric.
    """
    job, spec = prepared.job, prepared.job.tune
    assert spec is not None
    for key, dimension in spec.space.items():
        # Each value alone, not each combination. Only these keys decide which columns and which model a trial reads.
        for value in (dimension.choice or dimension.ends or ()) if key.startswith(("model.", "task.")) else ():
            task = build_task(trial_job(job, {key: value}, params_class))
            try:
                for split in prepared.splits.values():
                    check_columns(split, task)
                task.check_model()
            except UserError as error:
                raise RunError(f"tune.space: {key} {value}: {error.message}") from error
    return choose_metric(spec, job, metric_modes(build_task(job), prepared.splits.get("validation")))


def prepare_sweep(job: JobSpec) -> PreparedSweep:
    """Prepare a sweep up to the start of its first trial. Does not read the test data.

    Raises:
        UserError: The job file or the data must be fixed first.
    """
    job = check_sweep(job)
    prepared = prepare(job.model_copy(update={"data": job.data.with_test_of(None)}))
    base, spec = prepared.job, prepared.job.tune
    assert spec is not None
    metric, mode = check_trials(prepared)
    leakage = preflight(prepared, "tune")
    # The metric that ranks the trials also chooses the best checkpoint of each trial.
    # One size of its batches for all trials: it is part of a loss over the batch, by which trials may be ranked.
    evaluation = base.evaluation.model_copy(
        update={"metric": metric, "mode": mode, "batch_size": base.evaluation_batch_size}
    )
    # Each trial's batch decides anew how many parts it is cut into.
    train = base.train.model_copy(update={"virtual_ranks": job.train.virtual_ranks})
    base = base.model_copy(update={"evaluation": evaluation, "train": train})
    plan = prepared.plan.model_copy(update={"metric": metric, "metric_mode": mode})
    prepared = replace(prepared, job=base, plan=plan)
    search = Search(spec, base.seed, mode)
    record = SweepRecord(
        name=base.name, metric=metric, mode=mode, trials=search.trials, search=spec.search,
        scheduler=spec.scheduler, cpus_per_worker=base.cluster.cpus_per_worker,
        space={key: d.model_dump(mode="json", exclude_none=True) for key, d in spec.space.items()},
    )  # fmt: skip
    # Last, because it is the first to write into the run directory: a refused sweep leaves nothing there.
    sweep = _open_sweep_dir(prepared, spec, record)
    return PreparedSweep(prepared, with_absolute_paths(job).data, sweep, search, leakage)


def run_trials(prepared_sweep: PreparedSweep, listener: Listener) -> SweepResult:
    """Run all trials of a sweep that are not complete yet.

    Raises:
        TrainingError: No trial reached an evaluation.
        RunInterrupted: The user pressed Ctrl-C.
    """
    base, sweep = prepared_sweep.prepared.job, prepared_sweep.sweep
    for trial in sweep.trials.values():
        if trial.status != "running":
            listener(trial)
    started = time.monotonic()
    earlier_s = sweep.record.seconds
    if sweep.record.best is None:
        try:
            _run_phases(base.model_copy(update={"tune": None}), sweep, prepared_sweep.search, listener)
        finally:
            # Also after Ctrl-C. The seconds of this attempt count against `tune.minutes` when the sweep is resumed.
            shares = compute_importances(sweep.spec.space, sweep.trials.values(), sweep.record.mode)
            sweep.save(seconds=earlier_s + time.monotonic() - started, importances=shares)
            write_tables(sweep)
    best = sweep.rank_trials()[0] if sweep.trials else None
    if best is None or best.best_evaluation(sweep.record.mode) is None:
        reason = next((t.reason for t in sweep.trials.values() if t.reason), "no reason is recorded")
        raise TrainingError(f"no trial reached an evaluation ({reason}); see {sweep.folder}")
    # Saved before the best job starts: from here on the same command runs no more trials.
    sweep.save(best=best.number)
    with_test = base.model_copy(update={"data": base.data.with_test_of(prepared_sweep.data)})
    job = _make_best_job(with_test, best, sweep.spec)
    named = job.model_copy(update={"name": f"{base.name}-best"})
    sweep.run.write_bytes("sweep/best.yaml", dump_job(named).encode())
    return SweepResult(sweep, best, job)


def promote_best(result: SweepResult) -> None:
    """Copy the best trial's checkpoints and logs into the run, to be exported and scored. A refit trains from scratch.

    Does nothing if the export has begun.
    """
    run, spec = result.sweep.run, result.sweep.spec
    # `run_job` writes job.yaml before it trains here. A copy after that would replace its newer log with the trial's.
    if run.exists("job.yaml") or spec.refit != "none":
        return
    trial = result.sweep.trial_run(result.best.number)
    for name in ("checkpoints", "tensorboard", *trial.metrics_parts(), "scores-validation.json"):
        if trial.exists(name):
            # Only checkpoint files never change. Logs are appended to, so a hard link would change the trial's own log.
            run.copy_from(trial, name, immutable=name == "checkpoints")


def _make_best_job(base: JobSpec, best: TrialRecord, spec: TuneSpec) -> JobSpec:
    """Return the job with the best trial's values. A refit trains on training and validation data together."""
    job = trial_job(base, best.params, params_class).model_copy(update={"tune": None})
    if spec.refit == "none":
        return job
    return job.model_copy(update={"data": job.data.with_validation_in_training()})


def _run_phases(base: JobSpec, sweep: SweepDir, search: Search, listener: Listener) -> None:
    """Run the searched trials, then the repetitions of the best one, on one Ray session."""
    spec = sweep.spec
    with ray_session(base, spec.max_concurrent or 1):
        concurrent = max_concurrent_trials(base, spec.max_concurrent)
        tracker = mlflow.find(sweep.run, base)
        context = SweepContext(
            base=base,
            trials=sweep.folder,
            metric=sweep.record.metric,
            worst=-_WORST if sweep.record.mode == "max" else _WORST,
            grace=spec.grace,
            mlflow_parent=tracker.run_id if tracker is not None else None,
            snapshots=sweep.run.path("sweep/snapshots") if spec.scheduler == "pbt" else None,
        )

        def suggest(number: int) -> tuple[Params, int]:
            known = sweep.trials.get(number)
            if known is None:
                return search.suggest(number), base.seed
            # A recorded trial keeps its values and its seed; the search only learns that it exists.
            search.replay(number, known.params)
            return known.params, known.seed

        numbers = tuple(range(search.trials))
        seconds = None if spec.minutes is None else 60 * spec.minutes - sweep.record.seconds
        reason = TIME_LIMIT_REACHED if seconds is not None and seconds <= 0 else ""
        if not reason and not _are_completed(sweep, numbers):
            reason = run_phase(Phase(spec, context, numbers, suggest, concurrent, seconds), sweep, search, listener)
        sweep.save(stopped=reason)
        _repeat_best(sweep, context, search.trials, concurrent, listener)


def _repeat_best(
    sweep: SweepDir, context: SweepContext, first_number: int, concurrent: int, listener: Listener
) -> None:
    """Run the best trial again with other seeds, to measure the noise of the metric. Ignores the time limit."""
    spec, ranked = sweep.spec, sweep.rank_trials()
    if not spec.repeats or not ranked or ranked[0].best_evaluation(sweep.record.mode) is None:
        return
    best = ranked[0]
    numbers = tuple(range(first_number, first_number + spec.repeats))

    def suggest(number: int) -> tuple[Params, int]:
        return best.params, best.seed + 1 + number - first_number

    if not _are_completed(sweep, numbers):
        # A repetition that is stopped early says nothing about the noise of the final metric. The search is replaced
        # too, as `bohb` implies the hyperband scheduler.
        without_pruning = spec.model_copy(update={"scheduler": "none", "search": "random", "target": None})
        phase = Phase(without_pruning, context, numbers, suggest, concurrent, repeat_of=best.number)
        run_phase(phase, sweep, None, listener)


def _are_completed(sweep: SweepDir, numbers: Iterable[int]) -> bool:
    return all(number in sweep.trials and sweep.trials[number].status != "running" for number in numbers)


def _with_absolute_models(spec: TuneSpec) -> TuneSpec:
    """Return the sweep with absolute model directories: trials run in other processes."""
    models = spec.space.get("model.name")
    if models is None or models.choice is None:
        return spec
    names = [absolute_model_name(name) if isinstance(name, str) else name for name in models.choice]
    dimension = models.model_copy(update={"choice": tuple(names)})
    return spec.model_copy(update={"space": {**spec.space, "model.name": dimension}})


def _open_sweep_dir(prepared: PreparedJob, spec: TuneSpec, new: SweepRecord) -> SweepDir:
    """Create the directory of a sweep, or open the existing one to resume it.

    Raises:
        RunError: The directory belongs to another job or sweep.
    """
    run, job = prepared.run, prepared.job
    record = run.find_record("sweep/sweep.json", SweepRecord)
    if record is None:
        if run.exists("job.yaml"):
            raise RunError(f"{run.uri}: contains a run that is not a sweep; change `name` to start a sweep")
        record = new
    else:
        _check_same_sweep(run, job, spec)
        if new.trials != record.trials:
            if run.exists("job.yaml"):
                raise RunError(
                    f"{run.uri}: the sweep is complete and its best model exported; change `name` to run more trials"
                )
            record = record.model_copy(update={"trials": new.trials, "best": None})
    # Before sweep.json, whose existence means that there is a job to compare with.
    run.write_bytes("sweep/job.yaml", dump_job(job).encode())
    sweep = SweepDir(run, record, spec, job)
    sweep.load()
    sweep.save()
    return sweep


def _check_same_sweep(run: RunDir, job: JobSpec, spec: TuneSpec) -> None:
    old = read_job(run, "sweep/job.yaml")
    assert old.tune is not None
    different = spec_difference(old, job)
    if old.tune.space != spec.space:
        different.append("tune.space: other keys or values")
    # These decide what the recorded trials mean. Number of trials and time limit may change between attempts.
    for key in ("search", "metric", "mode"):
        if getattr(old.tune, key) != getattr(spec, key):
            different.append(f"tune.{key}: {getattr(old.tune, key)} -> {getattr(spec, key)}")
    if different:
        raise RunError(
            f"{run.uri}: belongs to another sweep ({'; '.join(different[:5])}); change `name` to start a new one, or "
            "undo the change to resume this one"
        )
