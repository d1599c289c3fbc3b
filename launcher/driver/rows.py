"""Rows of a run's steps, their losses, and the steps of a row: `launcher rows`. Runs on the client; nothing is written.

`data/batch_rows.py` finds rows and steps. Losses need the model, so `train/row_losses.py` trains some steps again, in
this process.
"""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rich.console import Console

from launcher.data.batch_rows import RowUse, find_row, find_uses, read_step_rows
from launcher.data.splits import Split
from launcher.data.windows import TRAIN
from launcher.driver.preflight import check_same_data
from launcher.driver.prepare import open_splits
from launcher.driver.progress import RetrainingProgress, reading_progress
from launcher.errors import RunError
from launcher.rundir import metrics_log
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.records import StepRecord
from launcher.rundir.recovery import SkippedBatch, read_reductions, read_skipped_batches
from launcher.spec.job import JobSpec


@dataclass(frozen=True)
class RunRows:
    """A run and its training data, for questions about rows."""

    run: RunDir
    job: JobSpec
    plan: Plan
    train: Split
    trained_steps: int
    """Steps that the run has logged so far."""
    skipped: dict[int, SkippedBatch]
    """Batches with a loss that is not finite, by step: the run does not train on them."""


@dataclass(frozen=True)
class StepTable:
    """Rows of one step."""

    step: int
    rows: pa.Table
    """One row for each row of the batch: file, number in it, part and so on; `loss` where losses are computed."""
    problem: str
    """Reason why the batch is not trained on; "" if it is."""
    loss: float | None = None
    """Loss of the step, computed again."""
    logged: float | None = None
    """Loss of the step in the log of the run; None if it has none."""


def open_rows(run: RunDir, job: JobSpec, console: Console) -> RunRows:
    """Open the training data of a run.

    Args:
        run: Run directory.
        job: Job of the run.
        console: Console for progress.

    Raises:
        RunError: The run has no plan yet, or its training data have changed.
        DataError: The data cannot be read.
    """
    plan = run.read_record("plan.json", Plan)
    with reading_progress(console) as on_progress:
        # Of the other splits nothing is asked, and they may be gone.
        train = open_splits(job, on_progress, names=(TRAIN,))[TRAIN]
    check_same_data(run, plan, train.fingerprint)
    skipped = {batch.step: batch for batch in read_skipped_batches(run)}
    return RunRows(run, job, plan, train, metrics_log.summarize(run).step, skipped)


def parse_steps(text: str, plan: Plan) -> range:
    """Return the steps that `--step` names: `100`, or `100-120` with both ends.

    Raises:
        RunError: The text is no step or range, or is outside of the run.
    """
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise RunError(f"--step: {text!r} is neither a step nor a range; write 100 or 100-120")
    steps = range(int(first), int(last if dash else first) + 1)
    if not steps:
        raise RunError(f"--step: {text} ends before it begins; write {last}-{first}")
    if steps[0] < 1 or steps[-1] > plan.total_steps:
        raise RunError(f"--step: {text} is not within 1 to {plan.total_steps}, the steps of the run")
    return steps


def step_tables(data: RunRows, steps: range) -> Iterator[StepTable]:
    """Yield the rows of each step.

    Raises:
        DataError: A row cannot be used and the job file says `error`.
    """
    for rows in read_step_rows(data.job, data.plan, data.train, steps):
        problem = data.skipped[rows.step].reason if rows.step in data.skipped else ""
        yield StepTable(rows.step, rows.table(data.train), problem)


def loss_tables(data: RunRows, steps: range, console: Console) -> Iterator[StepTable]:
    """Yield the rows of each step with their losses, for which this process trains again. Once per process.

    Args:
        data: Run and its training data.
        steps: Steps to yield.
        console: Console for progress.

    Raises:
        RunError: One worker cannot load the checkpoints of the run.
        TrainingError: The model does not fit into memory.
    """
    if not data.job.cluster.gpus_per_worker:
        # Before torch is loaded: what a run on CPUs has trained gets other bits on a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Not at the top: without losses the command needs neither torch nor DeepSpeed.
    from launcher.train.row_losses import compute_row_losses, single_worker_group

    # Only now, as its import sets a level of its own.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    job = _job_of_one_worker(data)
    logged = _logged_losses(data.run, steps)
    progress = RetrainingProgress(console, steps[-1])
    try:
        with single_worker_group(job):
            losses = compute_row_losses(data.run, job, data.plan, data.train, steps, on_step=progress.show)
            for table, own in zip(step_tables(data, steps), losses, strict=True):
                by_row = np.array(own.sequences, np.float64)[table.rows.column("sequence").to_numpy()]
                rows = table.rows.append_column("loss", pa.array(by_row))
                yield StepTable(table.step, rows, table.problem, own.loss, logged.get(table.step))
    finally:
        progress.close()


def _job_of_one_worker(data: RunRows) -> JobSpec:
    """Return the job of the run for one worker; its ZeRO stage, parts and micro-batches stay."""
    job, plan = data.job, data.plan
    if job.train.optimizer.type == "adamw_8bit" and plan.zero and plan.workers > 1:
        raise RunError(
            f"--losses: {data.run.uri} was trained with adamw_8bit on {plan.workers} workers, and their optimizer "
            "states cannot be loaded by one; leave --losses out"
        )
    train = job.train.model_copy(update={"virtual_ranks": plan.virtual_ranks or job.virtual_ranks})
    parallel = job.parallel.model_copy(update={"zero": plan.zero})
    cluster = job.cluster.model_copy(update={"workers": 1})
    return job.model_copy(update={"train": train, "parallel": parallel, "cluster": cluster})


def _logged_losses(run: RunDir, steps: range) -> dict[int, float]:
    lines = (line for line in run.read_metrics() if isinstance(line, StepRecord))
    return {line.step: line.loss for line in lines if line.step in steps}


def describe_loss(data: RunRows, table: StepTable) -> list[str]:
    """Return in sentences whether the loss of a step is the one that the run has logged."""
    if table.loss is None:
        return []
    if table.logged is None:
        return [f"loss {table.loss:.6f}; the run has logged none"]
    if table.loss == table.logged or (math.isnan(table.loss) and math.isnan(table.logged)):
        return [f"loss {table.loss:.6f}, exactly as the run has logged it"]
    difference = abs(table.loss - table.logged)
    sentences = [f"loss {table.loss:.6f}; the run has logged {table.logged:.6f}, a difference of {difference:.1e}"]
    return sentences + [f"to be expected: {reason}" for reason in _known_differences(data)]


def _known_differences(data: RunRows) -> list[str]:
    """Return reasons for which one worker on this machine cannot get the bits of the run."""
    import torch

    reasons = [*data.plan.inexact, *(reduction.sentence() for reduction in read_reductions(data.run))]
    if not data.plan.virtual_ranks:
        reasons.append("the run was trained by a version that did not cut batches into parts")
    if data.job.cluster.gpus_per_worker and not torch.cuda.is_available():
        reasons.append("the run was trained on GPUs, and this machine has none")
    return reasons


def row_table(data: RunRows, place: str) -> pa.Table:
    """Return where the run trains on a row: one row for each time, in the order of the steps.

    Args:
        data: Run and its training data.
        place: File and number of the row, `FILE:NUMBER`.

    Raises:
        DataError: The training data has no such row.
        RunError: The text is no such place.
    """
    file, colon, number = place.rpartition(":")
    if not file or not colon or not number.isdecimal():
        raise RunError(f"--row: {place!r} is no row; write FILE:NUMBER, with the number of the row from 0")
    ids = find_row(data.train, file, int(number)).tolist()
    uses = [use for row in ids for use in find_uses(data.job, data.plan, data.train, row)]
    uses.sort(key=lambda use: (use.step is None, use.step, use.epoch))
    files, file_rows = data.train.locate_all(np.array([use.row for use in uses], np.int64))
    return pa.table(
        {
            "step": pa.array([use.step for use in uses], pa.int64()),
            "epoch": pa.array([use.epoch for use in uses], pa.int64()),
            "part": pa.array([use.part for use in uses], pa.int64()),
            "file": pa.array(files, pa.string()),
            "file_row": pa.array(file_rows, pa.int64()),
            "row": pa.array([use.row for use in uses], pa.int64()),
            "state": pa.array([_state(data, use) for use in uses], pa.string()),
        }
    )


def _state(data: RunRows, use: RowUse) -> str:
    if use.step is None:
        return f"left out: {use.problem}"
    if use.step in data.skipped:
        return f"batch skipped: {data.skipped[use.step].reason}"
    return "trained" if use.step <= data.trained_steps else "not trained yet"
