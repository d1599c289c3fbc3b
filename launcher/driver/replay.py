"""Trains a run again under another name and compares the two curves: `launcher replay`. Runs on the head (the driver).

The job file decides the curve; only the cluster and the cut of the batches may differ. `report/curves_match.py` says
when two curves are the same.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from launcher.driver.preflight import check_same_data
from launcher.driver.prepare import PreparedJob, prepare
from launcher.driver.run import run_job
from launcher.errors import RunError
from launcher.formatting import print_line
from launcher.report.compare import Comparison, compare, render_comparison
from launcher.report.curves_match import CurveComparison, compare_curves
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.uri import join, parent
from launcher.spec.job import INVALID_NAME, JobSpec, is_name
from launcher.tasks import build_task

# Another machine or commit explains nothing by itself.
_UNRELATED = ("hosts", "git commit")


@dataclass(frozen=True)
class ReplayResult:
    """A run that was trained again."""

    run: RunDir
    """Second run."""
    agreement: CurveComparison
    comparison: Comparison
    page: str
    """Path or URI of the page that compares both."""
    known_differences: tuple[str, ...]
    """Reasons for which the curves cannot be equal."""


def replay_run(run: RunDir, job: JobSpec, name: str | None, console: Console) -> ReplayResult:
    """Train a finished run's job again, or resume that, and compare.

    Args:
        run: Finished run.
        job: Job of the run, with another cluster or another cut of the batches.
        name: Name of the new run; None takes NAME-replay, or the first of -2, -3 ... that is not finished.
        console: Console for progress.

    Raises:
        RunError: The training data of the run changed, or the name cannot be used.
        LauncherError: `run_job` raised it.
    """
    storage = parent(run.uri)
    prepared = prepare_replay(run, job, _check_name(run, name) if name is not None else _free_name(run, storage))
    replay, old = prepared.run, run.read_record("plan.json", Plan)
    known_differences = find_known_differences(old, prepared)
    for difference in known_differences:
        print_line(console, f"note: {difference}")
    run_job(prepared.job, console)
    comparison = compare((run, replay))
    replay.write_bytes("compare.html", render_comparison(comparison).encode())
    page = replay.path("compare.html")
    return ReplayResult(replay, compare_curves(*comparison.runs), comparison, page, known_differences)


def prepare_replay(run: RunDir, job: JobSpec, name: str) -> PreparedJob:
    """Prepare a run's job to be trained again beside it, under another name.

    Raises:
        RunError: The training data are not those of the run.
    """
    output = job.output.model_copy(update={"storage": parent(run.uri)})
    # Before anything is trained: a replay on other data takes hours and shows nothing.
    prepared = prepare(job.model_copy(update={"name": name, "output": output}))
    old = run.read_record("plan.json", Plan)
    check_same_data(run, old, prepared.plan.fingerprint)
    return prepared


def _check_name(run: RunDir, name: str) -> str:
    if not is_name(name):
        raise RunError(f"--name: {name} is {INVALID_NAME}; give one that is")
    if name == run.name:
        raise RunError(f"--name: {name} is the run itself; give another name")
    return name


def name_with_ending(run: RunDir, ending: str) -> str:
    """Return the name of a run with an ending, cut to the 63 characters of a name (`spec/job.py`)."""
    return run.name[: 63 - len(ending)] + ending


def _free_name(run: RunDir, storage: str) -> str:
    """Return the first name whose run is not finished, so that an interrupted replay is resumed."""
    for number in itertools.count(1):
        name = name_with_ending(run, "-replay" if number == 1 else f"-replay-{number}")
        if not RunDir(join(storage, name)).exists("result.json"):
            return name
    raise AssertionError("itertools.count never ends")


def find_known_differences(old: Plan, prepared: PreparedJob) -> tuple[str, ...]:
    """Return the reasons for which the bits of two curves may differ; () if they must not.

    Args:
        old: Plan of the first run.
        prepared: Job of the second one.
    """
    job, plan = prepared.job, prepared.plan
    reasons = []
    if old.micro_batch != plan.micro_batch:
        # The noise of a part is drawn for each of its micro-batches.
        if build_task(job).model.dropout != 0.0 or (job.model.lora is not None and job.model.lora.dropout > 0):
            reasons.append(
                "dropout noise depends on the micro-batch, so with another one the losses differ from the first step on"
            )
        if job.train.precision != "fp32":
            reasons.append(
                f"in {job.train.precision} each micro-batch's gradient is rounded, so with another one the losses "
                "differ in the third digit"
            )
        if job.model.trains_batch_norm and plan.model.get("batch_norms"):
            reasons.append("BatchNorm sees one micro-batch, so another size changes the curve")
        if not reasons:
            reasons.append("another micro-batch adds gradients in other groups, which changes their last bits")
    reasons += plan.inexact
    reasons += [f"of the first run: {reason}" for reason in old.inexact if reason not in plan.inexact]
    return tuple(reasons)


def describe_replay(replayed: ReplayResult) -> Sequence[str]:
    """Return the result of a replay in sentences."""
    lines = [*replayed.agreement.sentences]
    if not replayed.agreement.is_same_curve:
        lines += [f"to be expected: {difference}" for difference in replayed.known_differences]
        changed = replayed.comparison.environment_differences
        versions = [f"{row.name} {row.values[0]} -> {row.values[1]}" for row in changed if row.name not in _UNRELATED]
        if versions:
            lines.append(f"the environments differ: {', '.join(versions)}")
    return lines
