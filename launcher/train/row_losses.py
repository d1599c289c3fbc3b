"""Loss of each row of some steps, recomputed: from the checkpoint before them, the steps between are trained again.

One worker does it, with the parts, micro-batches and noise of the run, so that it gets the bits of the run wherever any
number of workers does (`Plan.inexact`). Nothing is written into the run. Used by `launcher rows --losses`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import takewhile

import torch
import torch.distributed as dist

from launcher.data.in_memory import iter_shards_in_memory
from launcher.data.rank_batches import LocalBatch, collate
from launcher.data.splits import Split
from launcher.data.stream import ShardStream, StreamSource
from launcher.data.windows import TRAIN, train_windows
from launcher.errors import CorruptCheckpointError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.recovery import read_skipped_batches
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.train.checkpoint import catalog, reader
from launcher.train.coupled import add_losses, empty_part_losses, gather_batch_outputs, row_ids
from launcher.train.engine import Engine
from launcher.train.loggers.run_log import sum_over_parts
from launcher.train.loop import forward_backward
from launcher.train.oom import is_out_of_memory, out_of_memory_message
from launcher.train.schedule import learning_rate
from launcher.train.worker import prepare_process

OnStep = Callable[[int], object]
"""Called with the number of steps completed: that of the checkpoint, 0 without one, then after each step."""


@dataclass(frozen=True)
class StepLosses:
    """Losses of one step, before its gradient is applied."""

    step: int
    """Step, from 1."""
    sequences: list[float]
    """Loss of each sequence (one row, or several where rows are packed), in the order of `StepRows.sequence`."""
    loss: float
    """Loss of the step as the run logs it: the sum of these divided by the weight of the global batch."""


@contextmanager
def single_worker_group(job: JobSpec) -> Iterator[None]:
    """Make this process the only worker of a training inside the block. Once per process.

    Once, because DeepSpeed 0.19.8 caches groups in globals (`deepspeed/utils/groups.py`).
    """
    prepare_process(job)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]  # public, not exported
    try:
        yield
    finally:
        dist.destroy_process_group()


def compute_row_losses(
    run: RunDir, job: JobSpec, plan: Plan, train: Split, steps: range, *, on_step: OnStep = bool
) -> Iterator[StepLosses]:
    """Yield the losses of some consecutive steps. In a group of one worker.

    Args:
        run: Run directory; it is only read.
        job: Job of the run, for one worker.
        plan: Plan of the run.
        train: Training data.
        steps: Steps whose losses are wanted, counted from 1; at least one.
        on_step: Callback for progress.

    Raises:
        RunError: A checkpoint cannot be loaded by one worker.
        TrainingError: A micro-batch does not fit into memory.
    """
    first, last = steps[0], steps[-1]
    task = build_task(job)
    engine = Engine(job, task, plan.micro_batch)
    try:
        # Optimizer states are needed for steps that are trained again, and not for the forward pass of the next one.
        start = _load_before(run, engine, first, weights_only=first == last)
        on_step(start)
        skipped = {batch.step for batch in read_skipped_batches(run)}
        windows = takewhile(lambda window: window.first_step < last, train_windows(plan, job, start))
        # Without the evaluations in between: they leave weights and optimizer as they are.
        shards = iter_shards_in_memory(
            StreamSource(job, {TRAIN: train}, 1), (window for window in windows if window.kind == TRAIN), 0
        )
        engine.train_mode()
        for step, _, batch in ShardStream(shards).steps():
            if step + 1 >= first:
                yield _step_losses(engine, task, batch, step)
            if step + 1 == last:
                return
            # A batch that the run has skipped for its loss is no step of the optimizer either.
            if step + 1 not in skipped:
                if forward_backward(engine, task, batch.parts, batch.global_batch, step) is None:
                    raise TrainingError(out_of_memory_message(f"step {step + 1}"))
                engine.step(learning_rate(job.train, step, plan.total_steps), step)
            on_step(step + 1)
    finally:
        engine.close()


def _load_before(run: RunDir, engine: Engine, step: int, weights_only: bool) -> int:
    """Load the newest intact checkpoint before a step and return its step; 0 if there is none, and nothing is loaded.

    Args:
        run: Run directory.
        engine: Engine that gets weights and states.
        step: Step that comes after the checkpoint, counted from 1.
        weights_only: True if a checkpoint of the step just before needs no optimizer states.
    """
    for saved in reversed(catalog.complete_steps(run)):
        if saved >= step:
            continue
        try:
            # Its converter for another number of workers prints a dozen lines and bars (DeepSpeed 0.19.8).
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                reader.load(run, engine, saved, weights_only=weights_only and saved == step - 1, read_only=True)
        except CorruptCheckpointError:
            # Nothing of it is loaded. Training from an earlier one takes longer and gives the same.
            continue
        return saved
    return 0


def _step_losses(engine: Engine, task: Task, batch: LocalBatch, step: int) -> StepLosses:
    part_losses = empty_part_losses(engine, batch.global_batch)
    sequences: list[float] = []
    try:
        for part, losses_B, source_B in _micro_batch_losses(engine, task, batch, step):
            # As in training: the same sums in the same order, so that they have the same bits.
            add_losses(part_losses[part], losses_B, source_B)
            sequences += losses_B.tolist()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(out_of_memory_message(f"step {step + 1}")) from None
    (by_source,) = sum_over_parts(part_losses.double().cpu()[None])
    return StepLosses(step + 1, sequences, sum(by_source) / batch.global_batch.divisor)


def _micro_batch_losses(
    engine: Engine, task: Task, batch: LocalBatch, step: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Yield part, losses and sources of the sequences of each micro-batch that is no filler."""
    coupled_n = _coupled_losses(engine, task, batch, step) if task.couples else None
    for part in batch.parts:
        for number, samples in enumerate(part.micro_batches, 1):
            collated = collate(task, samples, batch.global_batch).to(engine.device)
            count = len(row_ids(samples))
            if coupled_n is not None:
                losses_B, coupled_n = coupled_n[:count], coupled_n[count:]
            else:
                engine.seed(step, part.index, number)
                # With the graph of a training step, which may take other kernels. But hooks of ZeRO-3 expect a backward
                # pass to follow it.
                with torch.set_grad_enabled(engine.zero < 3):
                    # Without its part: the batch is trained after this, and BatchNorm must not count it twice.
                    losses_B = task.sample_losses(engine.forward(task, collated), collated).detach()
            # A micro-batch has sequences or one filler, never both.
            if count:
                yield part.index, losses_B, collated.source


def _coupled_losses(engine: Engine, task: Task, batch: LocalBatch, step: int) -> torch.Tensor:
    """Return the losses of all rows of a global batch that couples them, in the order of its micro-batches."""
    gathered = gather_batch_outputs(engine, task, batch.parts, batch.global_batch, step)
    return task.coupled_losses(gathered.outputs).detach()[gathered.own]
