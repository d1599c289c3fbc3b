"""Checks before Ray starts, for `check`, `train` and `tune` alike: `preflight`. Runs on the client and the head.

Nothing is written before they have passed. Contents of checkpoints are verified later, by the workers that read them
(`train/checkpoint/reader.py`), as hashing takes minutes; `data/leakage/duplicates.py` finds rows in common.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from rich.console import Console

from launcher.data.checks import check_first_rows
from launcher.data.leakage.duplicates import SearchStopped, find_duplicates
from launcher.data.splits import Split
from launcher.errors import ClusterError, DataError, LauncherError, RunError
from launcher.formatting import print_line
from launcher.rundir import metrics_log
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.leakage import LeakageRecord, leak_sentences
from launcher.rundir.lease import check_not_running
from launcher.rundir.plan import Plan
from launcher.rundir.records import ResultRecord
from launcher.spec.curve import spec_difference
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.train.checkpoint import catalog
from launcher.train.offload.swap_dir import check_offload_path

if TYPE_CHECKING:
    from launcher.driver.prepare import PreparedJob  # which imports this module

# Rows of each split that are encoded. The first number costs no time, even for images.
_ROWS_BEFORE_START, _ROWS_OF_CHECK = 64, 256
_LEAKAGE_FILE = "leakage.json"


def preflight(prepared: "PreparedJob", command: Literal["check", "train", "tune"]) -> LeakageRecord | None:
    """Check everything that would stop a command later, from cheap to expensive.

    Args:
        prepared: Prepared job; of a sweep under `tune`, without its test data, which is held out until the end.
        command: Command to check for. `check` may run on a machine without the job's resources and compares rows in any
            case; `tune` compares its directory with the sweep's own record instead (`tune/run.py`).

    Returns:
        Rows that the splits have in common; None if they were not compared.

    Raises:
        RunError: The run directory belongs to another job, cannot be read, or another command works on it.
        ClusterError: A local Ray would lack GPUs or the offload disk.
        DataError: One of the first rows cannot be used, or rows leak and the job says `data.leakage: error`.
    """
    job, run, splits = prepared.job, prepared.run, prepared.splits
    if command != "tune":
        check_resumable(prepared)
    if command == "train":
        if is_finished(prepared):
            return None
        check_not_running(run)
    if command != "check":
        require_local_resources(job)
    check_first_rows(job, splits, _ROWS_OF_CHECK if command == "check" else _ROWS_BEFORE_START)
    if command != "check":
        # Only `error` is worth the wait: otherwise the comparison runs while the workers start.
        return compare_splits(job, run, splits) if job.data.leakage == "error" else None
    # The test data of a sweep are held out, from `check` too: it looks for rows that cannot be used, and compares none.
    compared = {name: split for name, split in splits.items() if name != "test" or job.tune is None}
    return compare_splits(job, run, compared)


def is_finished(prepared: "PreparedJob") -> bool:
    """Return True if the run has everything that the job asks for: result, model, test scores."""
    run = prepared.run
    has_test_scores = "test" not in prepared.splits or run.exists("scores-test.json")
    return run.exists("result.json") and run.exists("model/config.json") and has_test_scores


def check_resumable(prepared: "PreparedJob") -> None:
    """Check that the run directory is empty, or holds a run of the same job that can be resumed.

    Raises:
        RunError: The directory belongs to another job, or a file in it cannot be read.
    """
    run = prepared.run
    if run.local is not None and run.local.is_file():
        raise RunError(
            f"{run.uri}: is a file, where the directory of the run should be; change `name`, or move it away"
        )
    if not run.exists("job.yaml"):
        return
    _check_same_job(run, prepared)
    # Read for their errors alone: a damaged record stops the command now, not after hours.
    run.find_record(_LEAKAGE_FILE, LeakageRecord)
    run.find_record("result.json", ResultRecord)
    metrics_log.validate_log(run)
    _check_newest_checkpoint(run, prepared.plan.zero)


def check_same_data(run: RunDir, plan: Plan, fingerprint: str) -> None:
    """Check that training data are those of a run.

    Args:
        run: Run directory, for the message.
        plan: Plan of the run.
        fingerprint: Fingerprint of the data as they are now.

    Raises:
        RunError: They have changed since.
    """
    if fingerprint != plan.fingerprint:
        raise RunError(
            f"{run.uri}: the training data are not those of the run (fingerprint {fingerprint[:12]}, the run's is "
            f"{plan.fingerprint[:12]}); put back the files it was trained on"
        )


def _check_same_job(run: RunDir, prepared: "PreparedJob") -> None:
    """Check that job, data and model are those that the run began with.

    Raises:
        RunError: One of them differs; names the differences.
    """
    differences = spec_difference(read_job(run), prepared.job)
    new_run = f"change `name` to start a new run, from the old weights with `--fork {run.uri}`"
    if differences:
        raise RunError(
            f"{run.uri}: belongs to another job ({'; '.join(differences[:5])}); {new_run}, or undo the change to "
            "resume this one"
        )
    old, new = run.find_record("plan.json", Plan), prepared.plan
    # job.yaml is written before plan.json, and a command may have been killed between the two.
    if old is None:
        return
    if old.fingerprint != new.fingerprint:
        was, now = (f"{plan.train_rows} rows, fingerprint {plan.fingerprint[:12]}" for plan in (old, new))
        raise RunError(
            f"{run.uri}: the training data changed since the run began ({was} -> {now}); put it back, or {new_run}"
        )
    changed = _changed_files(old.model_files, new.model_files)
    if changed:
        raise RunError(
            f"{run.uri}: the model {prepared.job.model.name} changed since the run began ({'; '.join(changed[:5])}); "
            f"put its files back, or {new_run}"
        )


def _changed_files(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return the files that differ, as `tokenizer.json: sha256 12ab -> sha256 34cd`; none if `old` is unknown."""
    names = sorted({*old, *new}) if old else ()
    pairs = ((name, old.get(name, "absent"), new.get(name, "absent")) for name in names)
    # A prefix is equal: runs of older versions know only the size of frozen weights, which are in their checkpoints.
    return [f"{name}: {was} -> {now}" for name, was, now in pairs if not now.startswith(was)]


def _check_newest_checkpoint(run: RunDir, zero: int) -> None:
    """Check that the ZeRO stage can read the newest valid checkpoint; `driver/controller.py` skips corrupt ones."""
    if run.exists("result.json"):
        return
    for step in reversed(catalog.complete_steps(run)):
        if catalog.find_corruption(run, step) is None:
            catalog.check_stage(catalog.read_manifest(run, step), zero)
            return


def check_model(run: RunDir) -> None:
    """Check that a run has exported its model.

    Raises:
        RunError: The run has no model.
    """
    if not run.exists("model/config.json"):
        raise RunError(f"{run.uri}: has no model yet; finish the run with `launcher train` first")


def require_local_resources(job: JobSpec) -> None:
    """Check that a local Ray would have the job's GPUs and its offload disk.

    Raises:
        ClusterError: They are missing on this machine, and no cluster is named.
    """
    # Not at the top: `check` on a client needs no Ray.
    import ray

    if ray.is_initialized():
        return  # `check_resources` asks the cluster itself
    missing = missing_local_resources(job)
    if missing is not None:
        raise ClusterError(missing)


def missing_local_resources(job: JobSpec) -> str | None:
    """Return why a local Ray could not run the job; None if it could, or if a cluster is named."""
    cluster = job.cluster
    if cluster.address or cluster.kubernetes or os.environ.get("RAY_ADDRESS"):
        return None
    required = cluster.workers * cluster.gpus_per_worker
    if required:
        import torch

        available = torch.cuda.device_count()
        if required > available:
            return (
                f"cluster.gpus_per_worker: {cluster.workers} workers with {cluster.gpus_per_worker:g} GPUs each need "
                f"{required:g} GPUs, this machine has {available}; set cluster.address to a cluster that has them, or "
                "ask for fewer"
            )
    if job.parallel.offload_path is not None:
        try:
            check_offload_path(job.parallel.offload_path)
        except ClusterError as error:
            return error.message
    return None


def compare_splits(
    job: JobSpec,
    run: RunDir,
    splits: dict[str, Split],
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> LeakageRecord | None:
    """Return the rows that the splits have in common: from the run's record if its data are the same, else compare.

    Args:
        job: Resolved job.
        run: Run directory; nothing is written.
        splits: Splits that may be read.
        threads: Number of reading threads; None takes one per core.
        stop: Event that cancels the comparison.

    Returns:
        None if the job says `data.leakage: off`, or if there is only training data.

    Raises:
        DataError: The job says `data.leakage: error`, and there are such rows; or a file cannot be read.
        SearchStopped: The comparison was cancelled.
    """
    if job.data.leakage == "off" or len(splits) < 2:
        return None
    task = build_task(job)
    record = run.find_record(_LEAKAGE_FILE, LeakageRecord)
    fingerprints = {name: split.fingerprint for name, split in splits.items()}
    # A record of more splits covers these too. Fingerprints change with the data, the columns with the task.
    is_known = (
        record is not None
        and fingerprints.items() <= record.fingerprints.items()
        and record.columns == task.input_columns
    )
    if record is None or not is_known:
        record = find_duplicates(splits, task, threads, stop)
    if record.leaks and job.data.leakage == "error":
        raise DataError(f"data.leakage: {leak_sentences(record)[0]}; remove them, or set data.leakage: warn")
    return record


def leak_notes(record: LeakageRecord | None) -> tuple[str, ...]:
    """Return a note for each pair of splits with rows in common, with the remedy."""
    if record is None:
        return ()
    remedy = "; remove them, or set data.leakage: off" if record.leaks else ""
    return tuple(sentence + remedy for sentence in leak_sentences(record))


@contextmanager
def check_leakage_in_background(
    job: JobSpec, run: RunDir, splits: dict[str, Split], known: LeakageRecord | None, console: Console
) -> Iterator[None]:
    """Compare the splits while the block runs, then write leakage.json and print notes.

    The block never waits for the comparison to begin; it is cancelled if the block raises.

    Args:
        job: Resolved job.
        run: Run directory for the record.
        splits: Splits that may be read.
        known: Record that `preflight` returned; None compares now.
        console: Console for the notes.
    """
    if known is not None:
        _write_record(run, known, console)
        yield
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        comparison = pool.submit(_compare_and_write, job, run, splits, console, stop)
        try:
            yield
        except BaseException:
            # Otherwise the pool would wait for the end of the comparison before the error is raised.
            stop.set()
            raise
        # Raises defects alone: `_compare_and_write` turns what may go wrong with data and storage into a note.
        comparison.result()


def _compare_and_write(
    job: JobSpec, run: RunDir, splits: dict[str, Split], console: Console, stop: threading.Event
) -> None:
    # The workers import and form their group at the same time, and need most of the cores.
    threads = max(1, (os.cpu_count() or 1) // 4)
    try:
        record = compare_splits(job, run, splits, threads, stop)
    except SearchStopped:
        return
    # A failed comparison must not end the run. With `data.leakage: error`, `preflight` has compared already.
    except (LauncherError, OSError, pa.ArrowException) as error:
        reason = error.message if isinstance(error, LauncherError) else " ".join(str(error).split())[:200]
        print_line(console, f"note: the splits were not compared for rows in common ({reason})")
    else:
        if record is not None:
            _write_record(run, record, console)


def _write_record(run: RunDir, record: LeakageRecord, console: Console) -> None:
    run.write_record(_LEAKAGE_FILE, record)
    for note in leak_notes(record):
        print_line(console, f"note: {note}")
