"""Starts a new run from the weights of another: `train JOB.yaml --fork RUN`. Runs on the head (the driver).

The weights become a model directory in the storage's cache, which the new run's job file names from then on. Such a run
is like any other: it is resumed, replayed and compared in the same way.
"""

import hashlib

from rich.console import Console

from launcher.data.ray_data import DeterministicDataConfig
from launcher.driver.control import open_control_channel
from launcher.driver.prepare import open_splits, with_absolute_paths
from launcher.driver.worker_group import WorkerGroupConfig, ray_session, run_worker_group
from launcher.errors import RunError
from launcher.formatting import print_line
from launcher.rundir.directory import RunDir, find_run, read_job
from launcher.rundir.plan import Plan
from launcher.rundir.records import Record, ResultRecord
from launcher.rundir.uri import join, parent
from launcher.spec.job import JobSpec
from launcher.spec.permissions import with_permissions_of
from launcher.train.checkpoint import catalog
from launcher.train.entrypoint import train_loop_per_worker
from launcher.train.worker_config import WorkerConfig


class ForkRecord(Record):
    """fork.json next to a model directory in the cache: origin of the weights."""

    origin: str
    """Directory or URI of the run."""
    step: int


def fork_job(job: JobSpec, origin: str, console: Console) -> JobSpec:
    """Return the job with another run's weights as its model.

    They are the best ones of a finished run, or those of an unfinished run's newest checkpoint.

    Args:
        job: Job of the new run.
        origin: Path or URI of the other run.
        console: Console that says where the weights are from.

    Raises:
        RunError: There is no such run, it has no weights yet, or the new run has started from others.
    """
    old = find_run(origin)
    storage = with_absolute_paths(job).output.storage
    run = RunDir(join(storage, job.name))
    if run.uri == old.uri:
        raise RunError(f"--fork: {old.uri} is the run itself; change `name`, the new run needs its own")
    # A fork that has started keeps its weights, even if the other run has newer ones by now.
    if run.exists("job.yaml"):
        return _with_model(job, _model_of_started_run(run, old))
    step, is_exported = _newest_weights(old)
    version = _checkpoint_version(old, step)
    # Names the weights alone, so that all runs forked from one checkpoint share a copy.
    key = hashlib.sha256(f"{old.uri} {step} {is_exported} {version}".encode()).hexdigest()[:24]
    cache = RunDir(join(storage, f".cache/models/fork-{key}"))
    if not cache.exists("fork.json"):
        if is_exported:
            cache.copy_from(old, "model")
        else:
            # Security: the old run may be another person's, so only the permissions of the user's own job file count.
            _export(old, with_permissions_of(read_job(old), with_absolute_paths(job)), step, cache, console)
        # Last: it marks the copy as complete.
        cache.write_record("fork.json", ForkRecord(origin=old.uri, step=step))
    print_line(console, f"starting from the weights of {old.uri}, step {step}")
    return _with_model(job, cache.path("model"))


def _with_model(job: JobSpec, model: str) -> JobSpec:
    spec = job.model.model_copy(update={"name": model, "revision": None, "from_config": None})
    return job.model_copy(update={"model": spec})


def _model_of_started_run(run: RunDir, old: RunDir) -> str:
    """Return the model directory that a run started from.

    Raises:
        RunError: It is not a copy of the old run's weights.
    """
    model = read_job(run).model.name
    record = RunDir(parent(model)).find_record("fork.json", ForkRecord) if "/" in model else None
    if record is None or record.origin != old.uri:
        raise RunError(
            f"{run.uri}: has started, and not from {old.uri}; change `name`, or leave --fork out to resume it"
        )
    return model


def _newest_weights(old: RunDir) -> tuple[int, bool]:
    """Return the step of a run's weights, and True if they are exported already.

    Raises:
        RunError: The run has no weights.
    """
    result = old.find_record("result.json", ResultRecord)
    # result.json is written after the export, so the exported model is complete.
    if result is not None and old.exists("model/config.json"):
        return result.best_step, True
    step = catalog.latest_step(old)
    if not step:
        raise RunError(f"{old.uri}: has neither a model nor a checkpoint yet; leave --fork out to start without it")
    return step, False


def _checkpoint_version(old: RunDir, step: int) -> str:
    """Return the hashes of a checkpoint's files: another run may have been trained in the same directory since."""
    # An exported model outlives its checkpoint, which may be pruned.
    if not catalog.is_complete(old, step):
        return ""
    return " ".join(entry.sha256 for entry in catalog.read_manifest(old, step).files)


def _export(old: RunDir, job: JobSpec, step: int, target: RunDir, console: Console) -> None:
    """Export a checkpoint's model with the workers of the unfinished run's own job."""
    plan = old.read_record("plan.json", Plan)
    splits = open_splits(job)
    config = WorkerConfig(old, job, plan, splits, resume_step=step, export_to=target)
    # Ray Train's files go to the target: the old run may still be training, and nothing is written to it. No streams,
    # as the workers only load and export.
    group = WorkerGroupConfig(job, target, DeterministicDataConfig(job, plan, splits), ())
    with ray_session(job), open_control_channel(plan, console) as control:
        run_worker_group(group, train_loop_per_worker, {"worker": config}, control.request_stop)
