"""The order of a job: prepare, check, train, export, evaluate, report. Runs on the head (the driver).

A stage with a valid record is skipped, so the same command resumes the run. Training, export and test scores happen in
the train workers while they are warm (`train/worker.py`); `controller.py` starts and restarts these.
"""

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata

import ray
from rich.console import Console

from launcher.data.ray_data import warm_up
from launcher.data.splits import Split
from launcher.data.stream import StreamSource
from launcher.driver.control import ControlActor, open_control_channel, start_control_actor
from launcher.driver.controller import TrainController
from launcher.driver.preflight import check_leakage_in_background, is_finished, preflight, require_local_resources
from launcher.driver.prepare import PreparedJob, prepare
from launcher.driver.progress import reading_progress
from launcher.driver.worker_group import ray_session
from launcher.errors import ClusterError, RunInterrupted
from launcher.formatting import print_line
from launcher.processes import local_ray
from launcher.report.render import write_report
from launcher.rundir.certificate import describe_workers
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

# Everything that a run directory can hold before a cluster has accepted the run.
_FILES_BEFORE_TRAINING = ("job.yaml", "plan.json", "leakage.json", "attempts", "heartbeat.json")


def run_job(job: JobSpec, console: Console, faults: Faults | None = None) -> RunDir:
    """Train a job to completion, resuming its run if there is one; export, evaluate and report.

    Args:
        job: Job as the user gave it.
        console: Console for progress and results.
        faults: Faults to inject; None injects none.

    Raises:
        UserError: The user has to fix something in the job file, the data or the model first.
        TrainingError: The run stopped. Its checkpoints are kept.
    """
    with ExitStack() as stack:
        control_actor = _start_ray_early(stack, job)

        def on_data(resolved: JobSpec, splits: dict[str, Split]) -> None:
            if control_actor is not None:
                # Now rather than later: the memory estimate that follows takes another second or two.
                warm_up(StreamSource(resolved, splits, resolved.cluster.workers))

        with reading_progress(console) as on_progress:
            prepared = prepare(job, on_progress, measure=True, on_data=on_data)
        run = prepared.run
        injected = faults.resolve(prepared.plan.total_steps, prepared.plan.workers) if faults is not None else ()
        leakage = preflight(prepared, "train")
        if is_finished(prepared):
            print_line(console, f"run {run.uri} is complete; change `name` to train again")
        else:
            _print_plan(prepared, console)
            with (
                # The lease comes first, as the comparison writes into the run. On a failure the comparison is cancelled
                # before `_claimed` removes a new directory.
                _claimed(prepared) as lease,
                check_leakage_in_background(prepared.job, run, prepared.splits, leakage, console),
            ):
                _train(prepared, job, console, injected, control_actor, lease)
            # After the training: by now each worker has written its own record.
            _write_environment(run, prepared.plan)
        report = write_report(run)
        _print_results(run, report, console)
        return run


def _start_ray_early(stack: ExitStack, job: JobSpec) -> ControlActor | None:
    """Connect to the Ray that the command has begun to start, while the job is prepared.

    The first actor takes Ray a second or two; so it is started here, with nobody waiting for it.

    Returns:
        The control actor; None if there is no such Ray, or if the run is finished.
    """
    run = RunDir(join(job.output.storage, job.name))
    if local_ray.current() is None or run.exists("result.json"):
        return None
    # Before the session: once Ray is initialized, this checks nothing.
    require_local_resources(job)
    stack.enter_context(ray_session(job))
    control_actor = start_control_actor()
    # Registered after the session, so it runs before `ray.shutdown`.
    stack.callback(ray.kill, control_actor)
    return control_actor


def _train(
    prepared: PreparedJob,
    requested_job: JobSpec,
    console: Console,
    faults: tuple[Fault, ...],
    control_actor: ControlActor | None,
    lease: Lease,
) -> None:
    """Train on a cluster: connect to Ray and to the trackers, and run the controller.

    Raises:
        RunInterrupted: The user asked to stop. A checkpoint has been saved.
    """
    run, job, plan = prepared.run, prepared.job, prepared.plan
    # Before the workers start: a tracker that cannot be reached stops the command here.
    trackers.begin(run, job, curve_values(job))
    injector = FaultInjector(run, faults)

    def on_metrics(line: MetricsLine) -> None:
        if isinstance(line, StepRecord):
            injector.inject_at_step(line.step)

    hang_s = job.fault_tolerance.hang_s
    # Left in reverse order: the run's status is written first, `count_attempt` needs the Ray session, and the trackers
    # report the outcome last.
    with (
        _tracked(run, job), ray_session(job), prometheus.count_attempt(job),
        open_control_channel(plan, console, on_metrics, hang_s, control_actor) as control, publish_run_status(run),
    ):  # fmt: skip
        if control_actor is None:  # otherwise `prepare` has done it
            warm_up(StreamSource(job, prepared.splits, plan.workers))
        TrainController(prepared, requested_job, console, control, lease, faults).run()


@contextmanager
def _tracked(run: RunDir, job: JobSpec) -> Iterator[None]:
    """Report to the experiment trackers how the training ended."""
    try:
        yield
    except RunInterrupted:
        trackers.end(run, job, "KILLED")
        raise
    except BaseException:
        trackers.end(run, job, "FAILED")
        raise
    record = run.find_record("scores-test.json", ScoresRecord)
    scores = {f"test/{name}": value for name, value in record.metrics.items()} if record is not None else {}
    trackers.end(run, job, "FINISHED", scores)


@contextmanager
def _claimed(prepared: PreparedJob) -> Iterator[Lease]:
    """Create the run directory with its job and plan; remove a new one if no cluster accepts the run.

    Yields:
        The right to write to the run: from here on a second command is refused.
    """
    run = prepared.run
    is_new = not run.exists("job.yaml")
    # Again: the preflight may have taken minutes.
    check_not_running(run)
    _write_job_and_plan(prepared)
    lease = Lease.acquire(run)
    try:
        yield lease
    except ClusterError:
        if is_new and not run.exists("metrics.jsonl"):
            # Only what this command has written, and the directory only if it is empty: the user may keep other files
            # there.
            for name in _FILES_BEFORE_TRAINING:
                run.delete(name)
            if not run.list(""):
                run.delete("")
        raise


def _write_job_and_plan(prepared: PreparedJob) -> None:
    prepared.run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    prepared.run.write_record("plan.json", prepared.plan)


def _write_environment(run: RunDir, plan: Plan) -> None:
    workers = [run.find_record(f"workers/rank-{rank}.json", WorkerRecord) for rank in range(plan.workers)]
    run.write_record(
        "environment.json",
        EnvironmentRecord(
            packages={name: metadata.version(name) for name in _PACKAGES if _is_installed(name)},
            python=sys.version.split()[0],
            platform=platform.platform(),
            git_commit=_git_commit(),
            workers=tuple(worker for worker in workers if worker is not None),
        ),
    )


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False  # the launcher itself, run from a source tree
    return True


def _git_commit() -> str | None:
    try:
        # Of the current directory, which holds the user's code; not of the launcher.
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # not a git checkout
    return head.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def _print_plan(prepared: PreparedJob, console: Console) -> None:
    plan = prepared.plan
    resume_step = catalog.latest_step(prepared.run)
    resuming = f"; resuming from step {resume_step}" if resume_step else ""
    print_line(
        console,
        f"{plan.task}: {plan.train_rows} rows, {plan.total_steps} steps of {plan.batch_size} on "
        f"{describe_workers((plan.workers,))}, ZeRO-{plan.zero}{resuming}",
    )
    for note in plan.notes:
        print_line(console, f"note: {note}")


def _print_results(run: RunDir, report: str, console: Console) -> None:
    result = run.read_record("result.json", ResultRecord)
    for reduction in read_reductions(run):
        if not reduction.restarted:  # the controller printed the others
            print_line(console, reduction.sentence())
    early = ", stopped early" if result.stopped_early else ""
    skipped = f", {result.skipped_rows} rows skipped" if result.skipped_rows else ""
    print_line(console, f"done: {result.steps} steps, best at step {result.best_step}{early}{skipped}")
    for split in ("validation", "test"):
        scores = run.find_record(f"scores-{split}.json", ScoresRecord)
        if scores is not None:
            values = "  ".join(f"{name} {value:.4f}" for name, value in scores.metrics.items())
            print_line(console, f"{split:<10}: {values}")
    print_line(console, f"model     : {run.path('model')}")
    print_line(console, f"report    : {report}")
