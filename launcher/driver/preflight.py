"""Whether a job may begin its run, or go on with what is there, told before anything is written. Client and head.

Contents of checkpoints are verified by the workers that read them (`train/checkpoint/reader.py`): hashing takes
minutes.
"""

from launcher.driver.prepare import PreparedJob
from launcher.errors import RunError
from launcher.rundir import metrics_log
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.leakage import LeakageRecord
from launcher.rundir.plan import Plan
from launcher.rundir.records import ResultRecord
from launcher.spec.curve import spec_difference
from launcher.train.checkpoint import catalog


def check_resumable(prepared: PreparedJob) -> None:
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
    _refuse_another(run, prepared)
    run.find_record("leakage.json", LeakageRecord)
    run.find_record("result.json", ResultRecord)
    metrics_log.validate_log(run)
    _check_checkpoint(run, prepared.plan.zero)


def _refuse_another(run: RunDir, prepared: PreparedJob) -> None:
    """What a run goes on with must be what it began with.

    Raises:
        RunError: its job, its data or its model is another; says in what.
    """
    different = spec_difference(read_job(run), prepared.job)
    new = f"change `name` to start a new run, from the old weights with `--fork {run.uri}`"
    if different:
        raise RunError(
            f"{run.uri}: belongs to another job ({'; '.join(different[:5])}); {new}, or take the change back to go on "
            "with this one"
        )
    old = run.find_record("plan.json", Plan)
    if old is None:
        return
    if old.fingerprint != prepared.plan.fingerprint:
        was, now = (f"{plan.train_rows} rows, fingerprint {plan.fingerprint[:12]}" for plan in (old, prepared.plan))
        raise RunError(
            f"{run.uri}: the training data changed since the run began ({was} -> {now}); put it back, or {new}"
        )
    changed = _changed(old.model_files, prepared.plan.model_files)
    if changed:
        raise RunError(
            f"{run.uri}: the model {prepared.job.model.name} changed since the run began ({'; '.join(changed[:5])}); "
            f"put its files back, or {new}"
        )


def _changed(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Files that are not what they were, as `tokenizer.json: sha256 12ab -> sha256 34cd`."""
    names = sorted({*old, *new}) if old else ()
    return [f"{n}: {old.get(n, 'absent')} -> {new.get(n, 'absent')}" for n in names if old.get(n) != new.get(n)]


def _check_checkpoint(run: RunDir, zero: int) -> None:
    """Check the newest checkpoint that looks whole; `driver/controller.py` leaves out those that do not."""
    if run.exists("result.json"):
        return
    for step in reversed(catalog.complete_steps(run)):
        if catalog.find_corruption(run, step) is None:
            catalog.check_stage(catalog.read_manifest(run, step), zero)
            return


def check_model(run: RunDir) -> None:
    """Refuse to use the model of a run that has none.

    Raises:
        RunError: it has none.
    """
    if not run.exists("model/config.json"):
        raise RunError(f"{run.uri}: has no model yet; finish the run with `launcher train` first")
