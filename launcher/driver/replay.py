"""A run once more under another name, and whether the two curves are one. Runs on the head (the driver).

The job file says what the curve is; only how its batches are cut, and where, may be another. Read
`report/curves_match.py`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from launcher.driver.prepare import PreparedJob, prepare
from launcher.driver.run import run_job
from launcher.errors import RunError
from launcher.report.compare import Comparison, compare, render_comparison
from launcher.report.curves_match import Agreement, agreement
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.uri import join, parent
from launcher.spec.job import NO_NAME, JobSpec, is_name


@dataclass(frozen=True)
class ReplayResult:
    """A run that was run again."""

    run: RunDir
    """The second one."""
    agreement: Agreement
    comparison: Comparison
    page: str
    """Path or URI of the page with both."""
    known_differences: tuple[str, ...]
    """Why the curves could not be equal."""


def replay_run(run: RunDir, job: JobSpec, name: str | None, console: Console) -> ReplayResult:
    """Train a finished run's job again, or go on with that, and compare.

    Args:
        run: a finished run.
        job: its job, with another cluster or another cut of the batches.
        name: of the new run; None takes NAME-replay, or the first of -2, -3 ... that is not finished.
        console: shows how far it is.

    Raises:
        RunError: the run is not finished, its training data changed, or the name cannot be used.
        LauncherError: as `run_job` raises.
    """
    if not run.exists("result.json") or not run.exists("metrics.jsonl"):
        raise RunError(f"{run.uri}: is not finished; finish the run with `launcher train` before it is run again")
    storage = parent(run.uri)
    again = RunDir(join(storage, _checked(run, name) if name is not None else _free_name(run, storage)))
    output = job.output.model_copy(update={"storage": storage})
    job = job.model_copy(update={"name": again.name, "output": output})
    prepared = prepare(job)
    old = run.read_record("plan.json", Plan)
    if prepared.plan.fingerprint != old.fingerprint:
        raise RunError(
            f"{run.uri}: the training data are not those of the run (fingerprint {prepared.plan.fingerprint[:12]}, "
            f"the run's is {old.fingerprint[:12]}); put back the files it was trained on"
        )
    excuses = _excuses(old, prepared)
    for excuse in excuses:
        console.print(f"note: {excuse}", highlight=False, soft_wrap=True, markup=False)
    run_job(job, console)
    both = compare((run, again))
    again.write_bytes("compare.html", render_comparison(both).encode())
    return ReplayResult(again, agreement(*both.runs), both, again.path("compare.html"), excuses)


def _checked(run: RunDir, name: str) -> str:
    if not is_name(name):
        raise RunError(f"--name: {name} is {NO_NAME}; give one that is")
    if name == run.name:
        raise RunError(f"--name: {name} is the run itself; give another name")
    return name


def _free_name(run: RunDir, storage: str) -> str:
    """The first name whose run is not finished: one that was interrupted is gone on with."""
    for number in itertools.count(1):
        ending = "-replay" if number == 1 else f"-replay-{number}"
        name = run.name[: 63 - len(ending)] + ending
        if not RunDir(join(storage, name)).exists("result.json"):
            return name
    raise AssertionError("there is always one more number")


def _excuses(old: Plan, prepared: PreparedJob) -> tuple[str, ...]:
    """What keeps the curves from being equal, whatever the promise says."""
    job, plan = prepared.job, prepared.plan
    said = []
    other_cut = (old.workers, old.micro_batch) != (plan.workers, plan.micro_batch)
    lora_noise = job.model.lora is not None and job.model.lora.dropout > 0
    if other_cut and (job.model.dropout != 0.0 or lora_noise):
        said.append(
            "dropout draws its noise by rank and micro-batch, so with another number of workers or micro-batch the "
            "losses differ from the first step on; only a run with model.dropout: 0.0 has the same curve under any cut"
        )
    if other_cut and job.train.precision != "fp32":
        said.append(
            f"in {job.train.precision} each micro-batch's gradient is rounded, so with another number of workers or "
            "micro-batch the losses differ in the third digit; only fp32 has the same curve under any cut"
        )
    if other_cut and job.model.syncs_batch_norm and plan.model.get("batch_norms"):
        said.append("BatchNorm sees one micro-batch of all workers, so another micro-batch changes the curve")
    if job.cluster.gpus_per_worker and not job.train.deterministic:
        said.append("GPU kernels may differ in the last bits from run to run, which adds up over many steps")
    return tuple(said)


def outcome(replayed: ReplayResult) -> Sequence[str]:
    """What came of it, in sentences."""
    lines = [*replayed.agreement.sentences]
    if not replayed.agreement.agrees:
        lines += [f"to be expected: {excuse}" for excuse in replayed.known_differences]
        changed = replayed.comparison.environment_differences
        versions = [f"{row.name} {row.values[0]} -> {row.values[1]}" for row in changed if row.name not in _PLACES]
        lines += [f"the environments differ: {', '.join(versions)}"] if versions else []
    return lines


# Another machine or commit is no reason in itself.
_PLACES = ("hosts", "git commit")
