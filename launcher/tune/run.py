"""The order of a sweep: trials, repeats, what is kept of the best. Runs on the head (the driver).

What exists on disk is not done again, so the same command goes on with a sweep that was interrupted anywhere.
`tune_driver.py` is Ray Tune at work; `launcher/driver/run.py` then trains, exports and scores the best job as any
other.
"""

import os
import time
from dataclasses import dataclass, replace

import ray
from rich.console import Console

from launcher.data.checks import check_columns
from launcher.data.files import list_files
from launcher.driver.preflight import check_leakage_in_background, preflight
from launcher.driver.prepare import PreparedJob, absolute_model_name, prepare, with_absolute_paths
from launcher.driver.run import run_job
from launcher.driver.worker_group import ray_session
from launcher.errors import DataError, ModelError, RunError, TrainingError, UserError
from launcher.report.sweep import write_sweep_report
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.leakage import LeakageRecord
from launcher.rundir.trials import SweepRecord, TrialRecord
from launcher.spec.curve import spec_difference
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.spec.tune import TuneSpec
from launcher.tasks import build_task, params_of
from launcher.tasks.base import MetricMode
from launcher.train.loggers import mlflow, trackers
from launcher.tune.progress import watch_sweep
from launcher.tune.search import Search, importances
from launcher.tune.space import Params, check_space, metric_of, trial_job
from launcher.tune.sweep_dir import SweepDir
from launcher.tune.tables import write_tables
from launcher.tune.trial import SweepContext
from launcher.tune.tune_driver import Listener, Phase, max_concurrent_trials, run_phase

_WORST = 1e30


@dataclass(frozen=True)
class SweepResult:
    """A sweep that is over."""

    sweep: SweepDir
    best: TrialRecord
    job: JobSpec
    """The best trial's job with test data: what is exported."""


def run_sweep(job: JobSpec, console: Console) -> RunDir:
    """Search the job's `tune.space`, then export the best trial's model and score it on the test data, once.

    Raises:
        UserError: something in the job file, data or model must be mended first.
        TrainingError: no trial got anywhere; what is saved is kept.
    """
    opened = open_sweep(job)
    sweep, prepared, plan = opened.sweep, opened.prepared, opened.prepared.plan
    # Once per sweep, and the test data stays shut: it is compared when the best job runs.
    compared = prepared.splits if sweep.record.best is None else {}
    known = opened.leakage if compared else None
    spec, metric, mode, run = sweep.spec, sweep.record.metric, sweep.record.mode, sweep.run
    console.print(
        f"{plan.task}: {spec.trials} trials by {spec.search} search, {spec.scheduler} scheduler, for {metric} "
        f"({mode}) on {plan.validation_rows} validation rows",
        highlight=False,
        soft_wrap=True,
    )
    trackers.begin(run, prepared.job, {"tune.trials": spec.trials, "tune.metric": metric, "tune.mode": mode})
    try:
        with (
            watch_sweep(spec, metric, mode, console) as listener,
            check_leakage_in_background(prepared.job, run, compared, known, console),
        ):
            tuned = run_trials(opened, listener)
    finally:
        write_sweep_report(run)
    best = tuned.best.best(mode)
    assert best is not None
    values = "  ".join(f"{key} {value}" for key, value in tuned.best.params.items())
    console.print(
        f"best: trial {tuned.best.number}, {metric} {best.value:.4f}  {values}", highlight=False, soft_wrap=True
    )
    promote_best(tuned)
    run_job(tuned.job, console)
    report = write_sweep_report(run)
    console.print(f"best job  : {run.path('sweep/best.yaml')}\nsweep     : {report}", highlight=False, soft_wrap=True)
    return run


def check_sweep(job: JobSpec) -> JobSpec:
    """Check what makes a job a sweep; the job with the model directories of its space made absolute.

    Raises:
        UserError: something in the job file must be mended first.
    """
    if job.tune is None:
        raise UserError("tune: missing; say what to search, as `tune: {space: {train.learning_rate: ...}}`")
    if job.data.validation is None:
        raise DataError("data.validation: missing; a sweep ranks its trials by the validation data")
    job = job.model_copy(update={"tune": _with_absolute_models(job.tune)})
    assert job.tune is not None
    check_space(job, job.tune, params_of)
    for location in job.data.test or ():
        if not location.startswith("hub:"):
            list_files("test", location, job.data.format)  # that it is there; what is in it is nobody's business yet
    return job


def _with_absolute_models(spec: TuneSpec) -> TuneSpec:
    """Model directories of the space made absolute: trials run in other processes."""
    found = spec.space.get("model.name")
    if found is None or found.choice is None:
        return spec
    names = [absolute_model_name(name) if isinstance(name, str) else name for name in found.choice]
    dimension = found.model_copy(update={"choice": tuple(names)})
    return spec.model_copy(update={"space": {**spec.space, "model.name": dimension}})


def check_trials(prepared: PreparedJob) -> tuple[str, MetricMode]:
    """Refuse a sweep in which a model or a column of some trial is not there, or no such metric is measured.

    Returns:
        The metric that ranks the trials, and whether more of it is better.

    Raises:
        UserError: names the key and the value.
    """
    job, spec = prepared.job, prepared.job.tune
    assert spec is not None
    for key, dimension in spec.space.items():
        for value in (dimension.choice or dimension.ends or ()) if key.startswith(("model.", "task.")) else ():
            task = build_task(trial_job(job, {key: value}, params_of))
            try:
                for split in prepared.splits.values():
                    check_columns(split, task)
                if task.check_model().get("packs") is False:
                    raise ModelError("packed samples would see each other in this model; set task.packing: false")
            except UserError as error:
                raise RunError(f"tune.space: {key} {value}: {error.message}") from error
    return metric_of(spec, job, build_task(job).metric_modes)


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that can begin, or go on."""

    prepared: PreparedJob
    """The job, resolved; its test data shut."""
    test: tuple[str, ...] | None
    """Where the test data is."""
    sweep: SweepDir
    search: Search
    leakage: LeakageRecord | None
    """Rows in common, where they were compared already."""


def open_sweep(job: JobSpec) -> PreparedSweep:
    """Do all of a sweep that can be done without training. Test data stays shut.

    Raises:
        UserError: something in the job file or the data must be mended first.
    """
    job = check_sweep(job)
    prepared = prepare(job.model_copy(update={"data": job.data.model_copy(update={"test": None})}))
    base, spec = prepared.job, prepared.job.tune
    assert spec is not None
    metric, mode = check_trials(prepared)
    leakage = preflight(prepared, "tune")
    # What ranks the trials also chooses the checkpoint that each keeps as its best.
    evaluation = base.evaluation.model_copy(update={"metric": metric, "mode": mode})
    base = base.model_copy(update={"evaluation": evaluation})
    plan = prepared.plan.model_copy(update={"metric": metric, "metric_mode": mode})
    prepared = replace(prepared, job=base, plan=plan)
    search = Search(spec, base.seed, mode)
    record = SweepRecord(
        name=base.name, metric=metric, mode=mode, trials=search.trials, search=spec.search,
        scheduler=spec.scheduler, cpus_per_worker=base.cluster.cpus_per_worker,
        space={key: d.model_dump(mode="json", exclude_none=True) for key, d in spec.space.items()},
    )  # fmt: skip
    return PreparedSweep(prepared, with_absolute_paths(job).data.test, _open(prepared, spec, record), search, leakage)


def tune_job(job: JobSpec, listener: Listener) -> SweepResult:
    """`open_sweep` and `run_trials` in one; raises as they do."""
    return run_trials(open_sweep(job), listener)


def run_trials(opened: PreparedSweep, listener: Listener) -> SweepResult:
    """Run all trials of a sweep, or go on with it.

    Raises:
        TrainingError: no trial reached an evaluation.
        RunInterrupted: by Ctrl-C.
    """
    base, sweep = opened.prepared.job, opened.sweep
    spec = sweep.spec
    for trial in sweep.trials.values():
        if trial.status != "running":
            listener(trial)
    started = time.monotonic()
    earlier = sweep.record.seconds
    if sweep.record.best is None:
        try:
            _drive(base.model_copy(update={"tune": None}), sweep, opened.search, listener)
        finally:
            shares = importances(spec.space, sweep.trials.values(), sweep.record.mode)
            sweep.save(seconds=earlier + time.monotonic() - started, importances=shares)
            write_tables(sweep)
    best = sweep.ranked()[0] if sweep.trials else None
    if best is None or best.best(sweep.record.mode) is None:
        reasons = next((t.reason for t in sweep.trials.values() if t.reason), "there was none")
        raise TrainingError(f"no trial reached an evaluation ({reasons}); see {sweep.folder}")
    sweep.save(best=best.number)
    tested = base.model_copy(update={"data": base.data.model_copy(update={"test": opened.test})})
    found = best_job(tested, best, spec)
    named = found.model_copy(update={"name": f"{base.name}-best"})
    sweep.run.write_bytes("sweep/best.yaml", dump_job(named).encode())
    return SweepResult(sweep, best, found)


def best_job(base: JobSpec, best: TrialRecord, spec: TuneSpec) -> JobSpec:
    """The job with the best trial's values; with `refit`, on training and validation data together."""
    job = trial_job(base, best.params, params_of).model_copy(update={"tune": None})
    if spec.refit == "none":
        return job
    assert job.data.validation is not None
    both = {"train": (*job.data.train, *job.data.validation), "validation": None}
    return job.model_copy(update={"data": job.data.model_copy(update=both)})


def promote_best(tuned: SweepResult) -> None:
    """Give the run what the best trial left, to be exported and scored; a refit starts anew."""
    run, spec = tuned.sweep.run, tuned.sweep.spec
    if run.exists("job.yaml") or spec.refit != "none":
        return
    trial = tuned.sweep.trial_run(tuned.best.number)
    for name in ("checkpoints", "tensorboard", *trial.metrics_parts(), "scores-validation.json"):
        if trial.exists(name):
            run.copy_from(trial, name, immutable=name == "checkpoints")


def _drive(base: JobSpec, sweep: SweepDir, search: Search, listener: Listener) -> None:
    spec, total = sweep.spec, search.trials
    with ray_session(base, spec.max_concurrent or 1):
        concurrent = max_concurrent_trials(base, spec.max_concurrent)
        threads = _threads(base, concurrent)
        worst = -_WORST if sweep.record.mode == "max" else _WORST
        snapshots = sweep.run.path("sweep/snapshots") if spec.scheduler == "pbt" else None
        found = mlflow.find(sweep.run, base)
        parent = found.run_id if found is not None else None
        order = SweepContext(base, sweep.folder, sweep.record.metric, worst, threads, spec.grace, parent, snapshots)
        started = time.monotonic()

        def left() -> float | None:
            spent = sweep.record.seconds + time.monotonic() - started
            return None if spec.minutes is None else 60 * spec.minutes - spent

        def suggest(number: int) -> tuple[Params, int]:
            known = sweep.trials.get(number)
            if known is None:
                return search.suggest(number), base.seed
            search.replay(number, known.params)
            return known.params, known.seed

        seconds = left()
        why = "the time was over" if seconds is not None and seconds <= 0 else ""
        if not why and not _all_over(sweep, range(total)):
            phase = Phase(spec, order, tuple(range(total)), suggest, concurrent, seconds)
            why = run_phase(phase, sweep, search, listener)
        sweep.save(stopped=why)
        _repeat(Phase(spec, order, (), suggest, concurrent, left()), sweep, total, listener)


def _repeat(phase: Phase, sweep: SweepDir, total: int, listener: Listener) -> None:
    """The best trial again with other seeds."""
    spec, ranked = phase.spec, sweep.ranked()
    if not spec.repeats or not ranked or ranked[0].best(sweep.record.mode) is None:
        return
    best = ranked[0]
    numbers = tuple(range(total, total + spec.repeats))

    def again(number: int) -> tuple[Params, int]:
        return best.params, best.seed + 1 + number - total

    calm = spec.model_copy(update={"scheduler": "none", "search": "random", "target": None})
    if not _all_over(sweep, numbers):
        run_phase(Phase(calm, phase.order, numbers, again, phase.concurrent, None, best.number), sweep, None, listener)


def _all_over(sweep: SweepDir, numbers: "range | tuple[int, ...]") -> bool:
    return all(n in sweep.trials and sweep.trials[n].status != "running" for n in numbers)


def _open(prepared: PreparedJob, spec: TuneSpec, new: SweepRecord) -> SweepDir:
    """Begin a sweep, or go on with the one that is there.

    Raises:
        RunError: the directory belongs to another job or sweep.
    """
    run, job = prepared.run, prepared.job
    record = run.find_record("sweep/sweep.json", SweepRecord)
    if record is None:
        if run.exists("job.yaml"):
            raise RunError(f"{run.uri}: holds a run that is no sweep; change `name` to start a sweep")
        record = new
    else:
        _same_sweep(run, job, spec)
        if new.trials != record.trials:
            if run.exists("job.yaml"):
                raise RunError(
                    f"{run.uri}: the sweep is over and its best model exported; change `name` for more trials"
                )
            record = record.model_copy(update={"trials": new.trials, "best": None})
    run.write_bytes("sweep/job.yaml", dump_job(job).encode())
    sweep = SweepDir(run, record, spec, job)
    sweep.load()
    sweep.save()
    return sweep


def _same_sweep(run: RunDir, job: JobSpec, spec: TuneSpec) -> None:
    old = read_job(run, "sweep/job.yaml")
    assert old.tune is not None
    different = spec_difference(old, job)
    if old.tune.space != spec.space:
        different.append("tune.space: other keys or values")
    for key in ("search", "metric", "mode"):
        if getattr(old.tune, key) != getattr(spec, key):
            different.append(f"tune.{key}: {getattr(old.tune, key)} -> {getattr(spec, key)}")
    if different:
        raise RunError(
            f"{run.uri}: belongs to another sweep ({'; '.join(different[:5])}); change `name` to start a new one, or "
            "take the change back to go on with this one"
        )


def _threads(base: JobSpec, concurrent: int) -> int:
    """CPU threads of each worker: the cores of the cluster, shared among all workers at work."""
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    cores = (os.cpu_count() or 1) * nodes
    return max(1, cores // (concurrent * base.cluster.workers))
