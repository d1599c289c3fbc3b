"""The order of a job: prepare, train, export, evaluate, report. Runs on the head (the driver).

A stage with a valid record is skipped, so running the same job file again goes on with the same run. Training,
export and the test score happen in the train workers while they are warm (`train/worker.py`).
"""

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata

import ray
from rich.console import Console

from launcher.data.checks import check_first_rows
from launcher.data.splits import Split
from launcher.data.stream import StreamSource
from launcher.data.warm import warm_up
from launcher.driver.control import ControlActor, open_control_channel, start_control_actor
from launcher.driver.controller import TrainController, is_finished
from launcher.driver.leakage import check_leakage_in_background, require_no_leakage
from launcher.driver.machine import check_machine
from launcher.driver.preflight import check_resumable
from launcher.driver.prepare import PreparedJob, prepare
from launcher.driver.progress import reading_progress
from launcher.driver.worker_group import ray_session
from launcher.errors import ClusterError, RunInterrupted
from launcher.processes import local_ray
from launcher.report.render import write_report
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import Lease, check_not_running
from launcher.rundir.plan import Plan
from launcher.rundir.records import EnvironmentRecord, MetricsLine, ResultRecord, ScoresRecord, StepRecord, WorkerRecord
from launcher.rundir.recovery import read_reductions
from launcher.rundir.run_status import publish_run_status
from launcher.rundir.uri import join
from launcher.spec.curve import curve_values
from launcher.spec.fault_injection import Fault, Faults
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.train.checkpoint import catalog
from launcher.train.fault_injection import FaultInjector
from launcher.train.loggers import prometheus, trackers

_PACKAGES = ("torch", "transformers", "deepspeed", "ray", "tokenizers", "torchmetrics", "pyarrow", "numpy", "launcher")

# As many as cost no time to speak of, also where they are pictures; `check` tries more.
_TRIED_ROWS = 64
# What a run holds before a cluster has taken it.
_FIRST = ("job.yaml", "plan.json", "leakage.json", "attempts", "heartbeat.json")


def run_job(job: JobSpec, console: Console, faults: Faults | None = None) -> RunDir:
    """Train a job to its end, or go on where it stopped.

    Args:
        job: the job.
        console: where the run says what happens.
        faults: that are to happen to it.

    Raises:
        UserError: something in the job file, data or model must be mended first.
        TrainingError: the run stopped; what is saved is kept.
    """
    with ExitStack() as stack:
        mailbox = _begin_workers(stack, job)

        def on_data(resolved: JobSpec, splits: dict[str, Split]) -> None:
            if mailbox is not None:
                warm_up(StreamSource(resolved, splits, resolved.cluster.workers))

        with reading_progress(console) as told:
            prepared = prepare(job, told, measure=True, on_data=on_data)
        return _run_prepared(prepared, job, console, faults, mailbox)


def _begin_workers(stack: ExitStack, job: JobSpec) -> ControlActor | None:
    """Connect to the Ray that the command has begun, and start its first process, while the job is prepared.

    Returns:
        The actor between driver and workers; None where there is no such Ray, or nothing to be done on it.
    """
    run = RunDir(join(job.output.storage, job.name))
    if local_ray.current() is None or run.exists("result.json"):
        return None
    check_machine(job)
    stack.enter_context(ray_session(job))
    mailbox = start_control_actor()
    stack.callback(ray.kill, mailbox)
    return mailbox


def _run_prepared(
    prepared: PreparedJob, job: JobSpec, console: Console, faults: Faults | None, mailbox: ControlActor | None
) -> RunDir:
    run, plan, finished = prepared.run, prepared.plan, is_finished(prepared)
    check_resumable(prepared)
    chaos = faults.of(plan.total_steps, plan.workers) if faults is not None else ()
    if not finished:
        check_not_running(run)
        check_machine(prepared.job)
        check_first_rows(prepared.job, prepared.splits, _TRIED_ROWS)
    leaks = None if finished else require_no_leakage(prepared.job, run, prepared.splits)
    if finished:
        _open_run(prepared)
        console.print(
            f"run {run.uri} is complete; give the job another name to train again", highlight=False, soft_wrap=True
        )
    else:
        resumed = catalog.latest_step(run)
        _say_what_comes(prepared, resumed, console)
        with (
            _opened(prepared) as lease,
            check_leakage_in_background(prepared.job, run, prepared.splits, leaks, console),
        ):
            _work_to_the_end(prepared, job, console, chaos, mailbox, lease)
        _write_environment(run, plan)
    report = write_report(run)
    _say_what_came(run, report, console)
    return run


def _work_to_the_end(
    prepared: PreparedJob,
    asked: JobSpec,
    console: Console,
    faults: tuple[Fault, ...],
    mailbox: ControlActor | None,
    lease: Lease,
) -> None:
    """Everything that needs a cluster.

    Raises:
        RunInterrupted: somebody asked to stop; the checkpoint is there.
    """
    run, job, plan = prepared.run, prepared.job, prepared.plan
    trackers.begin(run, job, curve_values(job))
    chaos = FaultInjector(run, faults)

    def hear(line: MetricsLine) -> None:
        if isinstance(line, StepRecord):
            chaos.at_step(line.step)

    hang_s = job.fault_tolerance.hang_s
    with (
        _tracked(run, job), ray_session(job), prometheus.count_attempt(job),
        open_control_channel(plan, console, hear, hang_s, mailbox) as line, publish_run_status(run),
    ):  # fmt: skip
        if mailbox is None:  # otherwise it was started while the rest was planned
            warm_up(StreamSource(job, prepared.splits, plan.workers))
        TrainController(prepared, asked, console, line, lease, faults).run()


@contextmanager
def _tracked(run: RunDir, job: JobSpec) -> Iterator[None]:
    """Tell the tracker how the training ended."""
    try:
        yield
    except RunInterrupted:
        trackers.end(run, job, "KILLED")
        raise
    except BaseException:
        trackers.end(run, job, "FAILED")
        raise
    found = run.find_record("scores-test.json", ScoresRecord)
    scores = {f"test/{name}": value for name, value in found.metrics.items()} if found is not None else {}
    trackers.end(run, job, "FINISHED", scores)


@contextmanager
def _opened(prepared: PreparedJob) -> Iterator[Lease]:
    """Lay out the run directory with its job and plan; where no cluster takes a new run, nothing of it stays.

    Yields:
        The right to write to it: from here on a second command is refused.
    """
    run = prepared.run
    is_new = not run.exists("job.yaml")
    check_not_running(run)
    _open_run(prepared)
    lease = Lease.acquire(run)
    try:
        yield lease
    except ClusterError:
        if is_new and not run.exists("metrics.jsonl"):
            for name in _FIRST:
                run.delete(name)
            if not run.list(""):
                run.delete("")
        raise


def _open_run(prepared: PreparedJob) -> None:
    prepared.run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    prepared.run.write_record("plan.json", prepared.plan)


def _write_environment(run: RunDir, plan: Plan) -> None:
    found = [run.find_record(f"workers/rank-{rank}.json", WorkerRecord) for rank in range(plan.workers)]
    versions = {name: metadata.version(name) for name in _PACKAGES if _installed(name)}
    run.write_record(
        "environment.json",
        EnvironmentRecord(
            packages=versions,
            python=sys.version.split()[0],
            platform=platform.platform(),
            git_commit=_git_commit(),
            workers=tuple(worker for worker in found if worker is not None),
        ),
    )


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False  # the launcher itself, run from a source tree
    return True


def _git_commit() -> str | None:
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # not a git checkout
    return head.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def _say_what_comes(prepared: PreparedJob, resumed: int, console: Console) -> None:
    plan = prepared.plan
    console.print(
        f"{plan.task}: {plan.train_rows} rows, {plan.total_steps} steps of {plan.batch_size} on {plan.workers} workers"
        f", ZeRO-{plan.zero}" + (f"; going on from step {resumed}" if resumed else ""),
        highlight=False,
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _say_what_came(run: RunDir, report: str, console: Console) -> None:
    result = run.read_record("result.json", ResultRecord)
    early = ", stopped early" if result.stopped_early else ""
    skipped = f", {result.skipped_rows} rows skipped" if result.skipped_rows else ""
    for halving in read_reductions(run):
        if not halving.restarted:  # those that are were told when it happened
            console.print(halving.sentence(), highlight=False, soft_wrap=True)
    lines = [f"done: {result.steps} steps, best at step {result.best_step}{early}{skipped}"]
    for split in ("validation", "test"):
        scores = run.find_record(f"scores-{split}.json", ScoresRecord)
        if scores is not None:
            lines.append(f"{split:<10}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores.metrics.items()))
    lines += [f"model     : {run.path('model')}", f"report    : {report}"]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
