"""Rows that a run's splits have in common: compared once per data, told or refused. Runs on the client and the head.

`data/leakage/duplicates.py` compares, `rundir/leakage.py` is what it found.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
from rich.console import Console

from launcher.data.leakage.duplicates import SearchStopped, find_duplicates
from launcher.data.splits import Split
from launcher.errors import DataError, LauncherError
from launcher.rundir.directory import RunDir
from launcher.rundir.leakage import LeakageRecord, leak_sentences
from launcher.spec.job import JobSpec
from launcher.tasks import build_task

_FILE = "leakage.json"


def compare_splits(
    job: JobSpec,
    run: RunDir,
    splits: dict[str, Split],
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> LeakageRecord | None:
    """What the splits have in common: as the run knows it, if it is about the same data, else compared now.

    Args:
        job: resolved.
        run: whose record may tell; nothing is written.
        splits: that may be looked into.
        threads: that read at the same time; None takes one per core.
        stop: set by another thread to call it off.

    Returns:
        None where the job file says `data.leakage: off`, or only training data is there.

    Raises:
        DataError: the job file says `data.leakage: error`, and there are such rows; or a file cannot be read.
        Stopped: it was called off.
    """
    if job.data.leakage == "off" or len(splits) < 2:
        return None
    task = build_task(job)
    record = run.find_record(_FILE, LeakageRecord)
    same = {name: split.fingerprint for name, split in splits.items()}
    if record is None or not same.items() <= record.fingerprints.items() or record.columns != task.input_columns:
        record = find_duplicates(splits, task, threads, stop)
    if record.leaks and job.data.leakage == "error":
        raise DataError(f"data.leakage: {leak_sentences(record)[0]}; remove them, or set data.leakage: warn")
    return record


def leak_notes(record: LeakageRecord | None) -> tuple[str, ...]:
    """What a person should know of it, with the remedy."""
    if record is None:
        return ()
    remedy = "; remove them, or set data.leakage: off" if record.leaks else ""
    return tuple(sentence + remedy for sentence in leak_sentences(record))


def require_no_leakage(job: JobSpec, run: RunDir, splits: dict[str, Split]) -> LeakageRecord | None:
    """Before anything expensive, where the job file says `data.leakage: error`: raises as `compare_splits` does."""
    return compare_splits(job, run, splits) if job.data.leakage == "error" else None


@contextmanager
def check_leakage_in_background(
    job: JobSpec, run: RunDir, splits: dict[str, Split], known: LeakageRecord | None, console: Console
) -> Iterator[None]:
    """Compare the splits beside what the block does, leave leakage.json, and tell; the block never waits for it.

    Args:
        job: resolved.
        run: gets the record.
        splits: that may be looked into.
        known: what `require_no_leakage` found.
        console: for the notes.
    """
    if known is not None:
        _leave(run, known, console)
        yield
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(_tell, job, run, splits, console, stop)
        try:
            yield
        except BaseException:
            stop.set()
            raise
        told.result()


def _tell(job: JobSpec, run: RunDir, splits: dict[str, Split], console: Console, stop: threading.Event) -> None:
    # Workers import and form their group meanwhile: most cores are theirs.
    threads = max(1, (os.cpu_count() or 1) // 4)
    try:
        record = compare_splits(job, run, splits, threads, stop)
    except SearchStopped:
        return
    except (LauncherError, OSError, pa.ArrowException) as error:  # whether rows leak must not cost the run
        what = error.message if isinstance(error, LauncherError) else " ".join(str(error).split())[:200]
        _note(console, f"the splits were not compared for rows in common ({what})")
    else:
        if record is not None:
            _leave(run, record, console)


def _leave(run: RunDir, record: LeakageRecord, console: Console) -> None:
    run.write_record(_FILE, record)
    for note in leak_notes(record):
        _note(console, note)


def _note(console: Console, note: str) -> None:
    console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
