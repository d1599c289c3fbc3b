"""Whether a job may begin its run, or go on with what is there, told before anything is written. Client and head.

Contents of checkpoints are verified by the workers that read them (`train/checkpoint.py`): hashing takes minutes.
"""

from pathlib import Path

from launcher.errors import RunError
from launcher.leaks import LeakageRecord
from launcher.plan import Plan
from launcher.prepare import Prepared
from launcher.records import ManifestRecord, ResultRecord, RunStateRecord
from launcher.rundir import RunDir, read_job
from launcher.spec.identity import spec_difference
from launcher.train import saved


def check_run(prepared: Prepared) -> None:
    """Refuse to go on with a run that is another job's, or that cannot be read; nothing is written.

    Raises:
        RunError: it is, or it cannot; names the file.
    """
    run = prepared.run
    if run.local is not None and run.local.is_file():
        raise RunError(
            f"{run.uri}: is a file, where the directory of the run should be; change `name`, or move it away"
        )
    if not run.exists("job.yaml"):
        return
    different = spec_difference(read_job(run), prepared.job)
    if different:
        raise RunError(
            f"{run.uri}: belongs to another job ({'; '.join(different[:5])}); change `name` to start a new run, "
            "or take the change back to go on with this one"
        )
    old = run.find_record("plan.json", Plan)
    if old is not None and old.fingerprint != prepared.plan.fingerprint:
        raise RunError(f"{run.uri}: the training data changed since the run began; change `name` to start a new run")
    run.find_record("leakage.json", LeakageRecord)
    run.find_record("result.json", ResultRecord)
    for _ in run.read_metrics():
        pass
    _check_checkpoint(run, prepared.plan.zero)


def _check_checkpoint(run: RunDir, zero: int) -> None:
    """The newest complete one: where the run would go on."""
    newest = saved.latest_step(run)
    if not newest or run.exists("result.json"):
        return
    folder = saved.directory_of(newest)
    manifest = run.read_record(f"{folder}/manifest.json", ManifestRecord)
    run.read_record(f"{folder}/state.json", RunStateRecord)
    for entry in manifest.files if run.local is not None else ():
        path = Path(run.path(folder)) / entry.path
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            raise RunError(
                f"{path}: missing or cut short; delete {run.path(folder)} to go on from the checkpoint before it"
            )
    saved.refuse_stage(manifest, zero)


def check_model(run: RunDir) -> None:
    """Refuse to use the model of a run that has none.

    Raises:
        RunError: it has none.
    """
    if not run.exists("model/config.json"):
        raise RunError(f"{run.uri}: has no model yet; finish the run with `launcher train` first")
