"""A new run that begins from the weights of another: `train JOB.yaml --fork RUN`. Runs on the head (the driver).

The weights become a model directory in the storage's cache, which the new run's job file names from then on: such a run
is like any other, and goes on, is replayed and compared as they are.
"""

import hashlib

from rich.console import Console

from launcher.data.ray_data import DeterministicDataConfig
from launcher.driver.control import open_control_channel
from launcher.driver.prepare import open_splits, with_absolute_paths
from launcher.driver.worker_group import WorkerGroupConfig, ray_session, run_worker_group
from launcher.errors import RunError
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
    """fork.json beside a model directory in the cache: whose weights they are."""

    origin: str
    """The run's directory or URI."""
    step: int


def fork_job(job: JobSpec, origin: str, console: Console) -> JobSpec:
    """The job with another run's weights as its model: the best of a finished run, or those of the newest checkpoint.

    Args:
        job: of the new run.
        origin: path or URI of the other run.
        console: says whose weights they are.

    Raises:
        RunError: there is no such run, it has no weights yet, or the new run has begun from others.
    """
    old, storage = find_run(origin), with_absolute_paths(job).output.storage
    run = RunDir(join(storage, job.name))
    if run.uri == old.uri:
        raise RunError(f"--fork: {old.uri} is the run itself; change `name`, the new run needs one of its own")
    if run.exists("job.yaml"):
        return _from(job, _begun_from(run, old))
    step, finished = _source(old)
    key = hashlib.sha256(f"{old.uri} {step} {finished} {_version(old, step)}".encode()).hexdigest()[:24]
    place = RunDir(join(storage, f".cache/models/fork-{key}"))
    if not place.exists("fork.json"):
        if finished:
            place.copy_from(old, "model")
        else:
            _export(old, with_permissions_of(read_job(old), with_absolute_paths(job)), step, place, console)
        place.write_record("fork.json", ForkRecord(origin=old.uri, step=step))
    console.print(f"begins from the weights of {old.uri}, step {step}", highlight=False, soft_wrap=True, markup=False)
    return _from(job, place.path("model"))


def _from(job: JobSpec, model: str) -> JobSpec:
    spec = job.model.model_copy(update={"name": model, "revision": None, "from_config": None})
    return job.model_copy(update={"model": spec})


def _begun_from(run: RunDir, old: RunDir) -> str:
    """The model directory that a run began from.

    Raises:
        RunError: it is not one of the old run's.
    """
    model = read_job(run).model.name
    record = RunDir(parent(model)).find_record("fork.json", ForkRecord) if "/" in model else None
    if record is None or record.origin != old.uri:
        raise RunError(
            f"{run.uri}: has begun, and not from {old.uri}; change `name`, or leave --fork out to go on with it"
        )
    return model


def _source(old: RunDir) -> tuple[int, bool]:
    """Step of the weights, and whether they are exported already.

    Raises:
        RunError: there are none.
    """
    result = old.find_record("result.json", ResultRecord)
    if result is not None and old.exists("model/config.json"):
        return result.best_step, True
    step = catalog.latest_step(old)
    if not step:
        raise RunError(f"{old.uri}: has neither a model nor a checkpoint yet; leave --fork out to begin anew")
    return step, False


def _version(old: RunDir, step: int) -> str:
    """A run may be removed, and another trained under its name: of its checkpoint's files."""
    if not catalog.is_complete(old, step):
        return ""
    return " ".join(entry.sha256 for entry in catalog.read_manifest(old, step).files)


def _export(old: RunDir, job: JobSpec, step: int, place: RunDir, console: Console) -> None:
    """Let the own kind of workers of a run that is not finished read its checkpoint and write the model."""
    plan = old.read_record("plan.json", Plan)
    splits = open_splits(job)
    order = WorkerConfig(old, job, plan, splits, resume_step=step, export_to=place)
    with ray_session(job), open_control_channel(plan, console) as line:
        run_worker_group(
            WorkerGroupConfig(job, place, DeterministicDataConfig(job, plan, splits), ()),
            train_loop_per_worker,
            {"worker": order},
            line.request_stop,
        )
