"""THE training loop. Runs in every train worker; start reading here.

A global batch arrives as this rank's parts of it, encoded and cut into micro-batches (`data/stream.py`). The loss is a
sum over samples, divided by the weight of the *global* batch, so neither the number of workers nor the micro-batch
changes it. Noise and the order of additions follow the parts, which are the same on any number of workers. `engine.py`
wraps DeepSpeed, `validate.py` evaluates, `train/checkpoint/writer.py` saves.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from launcher.data.rank_batches import GlobalBatch, LocalBatch, Part, collate
from launcher.data.splits import Split
from launcher.data.stream import ShardStream
from launcher.data.windows import VALIDATION
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.records import EvaluationRecord, ResultRecord, TrainerState
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.train.checkpoint.writer import CheckpointWriter
from launcher.train.coupled import add_losses, coupled_forward_backward, empty_part_losses
from launcher.train.engine import Engine
from launcher.train.fault_injection import FaultInjector
from launcher.train.loggers.run_log import PendingStep, RunLog
from launcher.train.non_finite import NonFinitePolicy
from launcher.train.oom import OOMRecovery, is_out_of_memory
from launcher.train.preemption import never_stop
from launcher.train.schedule import learning_rate
from launcher.train.sync_check import check_sync
from launcher.train.validate import generate_samples, validate

INITIAL_STATE = TrainerState(
    step=0, skipped_rows=0, elapsed_s=0.0, best_step=None, best_value=None, evaluations_without_improvement=0
)


@dataclass(frozen=True)
class TrainContext:
    """Everything that the loop works with; nothing in it is replaced while it runs."""

    run: RunDir
    job: JobSpec
    plan: Plan
    task: Task
    engine: Engine
    splits: dict[str, Split]
    writer: CheckpointWriter
    faults: FaultInjector
    """Injected faults; none without `--chaos`."""

    @cached_property
    def oom(self) -> OOMRecovery:
        """Halves the micro-batch when memory runs out."""
        return OOMRecovery(self.run, self.engine)

    @cached_property
    def non_finite(self) -> NonFinitePolicy:
        """Decides what follows a loss or gradient that is not finite."""
        return NonFinitePolicy(self)


@dataclass(frozen=True)
class EvaluationEvent:
    """An evaluation that has just finished; a sweep may pause or stop the training here."""

    state: TrainerState
    """State of a checkpoint that is saved at this point."""
    evaluation: EvaluationRecord


def train(
    ctx: TrainContext,
    stream: ShardStream,
    log: RunLog,
    state: TrainerState,
    should_stop: Callable[[], bool] = never_stop,
) -> Generator[EvaluationEvent, None, ResultRecord | None]:
    """Train from `state` to the last step or an early stop; yield after each evaluation.

    Args:
        ctx: Engine, task, data and policies of this run.
        stream: Batches of this rank, starting after `state.step`.
        log: Destination of losses and evaluations.
        state: State of the checkpoint that was loaded, or `INITIAL_STATE`.
        should_stop: Function that returns True if all ranks must save and exit after this step. Collective.

    Returns:
        Outcome of the training; None if the workers exited before its end, after saving a checkpoint.

    Raises:
        NonFiniteLossError: A loss is not finite, and the job file says to resume from the last checkpoint.
        TrainingError: A loss is not finite, or the ranks' weights differ.
    """
    job, plan, engine = ctx.job, ctx.plan, ctx.engine
    skipped_rows_before = state.skipped_rows
    is_finished = should_stop_early(job, state)
    is_leaving = False
    saved_at_s = log.elapsed_s
    engine.train_mode()
    # Waiting for the stream counts as data wait. A run that had stopped early before it was interrupted trains no more.
    for step, epoch, batch in log.timer.time_data_wait(stream.steps()) if not is_finished else ():
        lr = learning_rate(job.train, step, plan.total_steps)
        with log.timer.time_step():
            part_losses = train_step(ctx, batch, step, lr)
        done = step + 1
        # Loss and norm stay on their device: reading them here would make the host wait for the device in every step.
        log.step(PendingStep(done, epoch, batch.global_batch, part_losses, lr, engine.grad_norm))
        ctx.faults.inject_at_step(done)
        # Collective. Everything that decides about the collectives below must be the same on all ranks: the plan, the
        # step, and what this call or the flush has exchanged; never a local clock or a local error.
        is_leaving = should_stop()
        is_last = done == plan.total_steps
        must_evaluate = plan.evaluates_after(done)
        must_save = is_leaving or _is_due(job.checkpoint.every_steps, done)
        # Step 1 finds nodes with other versions or other pretrained weights before hours are spent. Collective.
        if done == 1 or done % job.train.sync_check_steps == 0:
            check_sync(engine, done)
        if done % job.train.log_every_steps == 0 or must_evaluate or must_save or is_last:
            # Only rank 0's clock counts, and a full disk is known to one node alone: the flush, which is an
            # all-reduce anyway, tells both to all ranks. It is the one host-device sync of the steps since the last.
            is_time = engine.rank == 0 and _minutes_passed(job, log.elapsed_s - saved_at_s)
            is_time, has_failed = log.flush(
                stream.skipped_rows, (is_time, ctx.writer.has_failed), ctx.non_finite.check_logged
            )
            must_save |= is_time
            # If one rank could not write its files, the checkpoint is incomplete: all ranks drop it together.
            ctx.writer.join_if_failed(has_failed)
        if must_evaluate:
            ctx.faults.inject_at_place("evaluation")
            # Evaluate before saving: the state in the checkpoint says which step is best, and it may be this one.
            # The evaluation comes from the same stream, which has prepared it behind the training batches.
            with log.timer.phase("evaluation"):
                state, is_best, evaluation = _evaluate(ctx, stream, log, state, done)
            is_finished = should_stop_early(job, state)
            must_save |= is_best
        # After the evaluation, so that a run resumed from here counts its seconds too.
        if must_evaluate or must_save or is_last:
            skipped_rows = skipped_rows_before + stream.skipped_rows
            state = state.model_copy(update={"step": done, "skipped_rows": skipped_rows, "elapsed_s": log.elapsed_s})
        if must_save or is_finished or is_last:
            with log.timer.phase("checkpoint"):
                # Returns once weights and states are copied; a thread writes them while training continues. Collective.
                ctx.writer.save(state)
            saved_at_s = log.elapsed_s
        # A sweep stops or pauses a trial here, after its checkpoint, by not resuming the generator.
        if must_evaluate:
            yield EvaluationEvent(state, evaluation)
        if is_finished or is_leaving:
            break
    with log.timer.phase("checkpoint"):
        ctx.writer.join()
    # Logs the seconds of the last checkpoint. Collective.
    log.flush(stream.skipped_rows, (False, False), ctx.non_finite.check_logged)
    if is_leaving and not is_finished and state.step < plan.total_steps:
        return None
    return _result(state, is_finished)


def train_step(ctx: TrainContext, batch: LocalBatch, step: int, lr: float) -> torch.Tensor | None:
    """Run one optimizer step on this rank's parts of a global batch.

    Args:
        ctx: Engine, task and recovery policies of this run.
        batch: Parts of this rank, and the weight of the whole global batch.
        step: Number of optimizer steps completed before this one.
        lr: Learning rate of this step.

    Returns:
        Sum of the sample losses of each part (V, sources), on the device, 0 for those of other ranks; None if the
        batch is skipped. Their sum over ranks and parts, divided by the weight of the global batch, is the loss.

    Raises:
        MicroBatchOOMError: Memory ran out under ZeRO 2 or 3; the workers restart with a smaller micro-batch.
        NonFiniteLossError: The batch is skipped from now on, but the ranks must resume from the last checkpoint.
    """
    if ctx.non_finite.is_skipped(step):
        return None
    part_losses = forward_backward(ctx.engine, ctx.task, ctx.oom.split(batch.parts), batch.global_batch, step)
    # Collective under ZeRO 0 and 1: if one rank ran out of memory, all ranks halve the micro-batch and repeat the step.
    # Raises under ZeRO 2 and 3, where the other ranks already wait inside a reduce.
    while ctx.oom.must_retry(part_losses, step):
        part_losses = forward_backward(ctx.engine, ctx.task, ctx.oom.split(batch.parts), batch.global_batch, step)
    assert part_losses is not None
    part_losses = ctx.faults.inject_nan(step, part_losses)
    # Collective and a host-device sync, under `train.non_finite: skip` only.
    if not ctx.non_finite.check_loss(step, part_losses):
        return None
    ctx.engine.step(lr, step)
    return part_losses


def forward_backward(
    engine: Engine, task: Task, parts: Sequence[Part], global_batch: GlobalBatch, step: int
) -> torch.Tensor | None:
    """Accumulate this rank's gradient of a global batch.

    Args:
        engine: Model and gradients.
        task: Defines the loss of a sample.
        parts: Parts of this rank, with one table of encoded samples per forward pass.
        global_batch: Facts of the whole global batch; its weight is its samples, or its learned tokens.
        step: Number of optimizer steps completed before this one; seeds the dropout.

    Returns:
        Sum of the sample losses of each part (V, sources), on the device, 0 for those of other ranks; None if memory
        ran out.
    """
    part_losses = empty_part_losses(engine, global_batch)
    try:
        if task.couples:
            return coupled_forward_backward(engine, task, parts, global_batch, step)
        for part in parts:
            for number, samples in enumerate(part.micro_batches, 1):
                # Neither rank nor time counts: a step that is repeated, or made by other workers, draws the same noise.
                engine.seed(step, part.index, number)
                batch = collate(task, samples, global_batch).to(engine.device)
                losses_B = task.sample_losses(engine.forward(task, batch, part.index), batch)
                # The mask is 0 for fillers: ranks without rows left in a batch still take part in its collectives.
                losses_B = losses_B * batch.mask
                # Reduces gradients across ranks under ZeRO 2 and 3 only; ZeRO 0 and 1 wait for `engine.step`. The
                # stream gives every rank as many micro-batches, or the ranks would wait for each other here.
                engine.backward(losses_B.sum(), global_batch.divisor, number == len(part.micro_batches))
                add_losses(part_losses[part.index], losses_B.detach(), batch.source)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames of the traceback hold the graph, and with it the memory that a retry needs.
        error.__traceback__ = None
        return None
    return part_losses


def should_stop_early(job: JobSpec, state: TrainerState) -> bool:
    """Return True if the metric has not improved for `evaluation.patience` evaluations."""
    patience = job.evaluation.patience
    return patience is not None and state.evaluations_without_improvement >= patience


def run_to_completion(training: Generator[EvaluationEvent, None, ResultRecord | None]) -> ResultRecord | None:
    """Run a training without pausing at its evaluations, and return its outcome."""
    while True:
        try:
            next(training)
        except StopIteration as end:
            result: ResultRecord | None = end.value
            return result


def _result(state: TrainerState, stopped_early: bool) -> ResultRecord:
    return ResultRecord(
        steps=state.step,
        best_step=state.best_step or state.step,
        stopped_early=stopped_early,
        skipped_rows=state.skipped_rows,
        elapsed_s=state.elapsed_s,
    )


def _evaluate(
    ctx: TrainContext, stream: ShardStream, log: RunLog, state: TrainerState, step: int
) -> tuple[TrainerState, bool, EvaluationRecord]:
    """Score the validation split, log it, and update which checkpoint is best. Collective; equal on all ranks.

    Returns:
        New state, whether this step is the best so far, and the evaluation as it is logged.
    """
    scores = validate(ctx.engine, ctx.task, stream.evaluation(VALIDATION, step), ctx.splits[VALIDATION], step)
    # A metric can be undefined on the validation data (roc_auc of a single class); that is never an improvement.
    value = scores.loss if ctx.plan.metric == "loss" else scores.metrics.get(ctx.plan.metric, math.nan)
    sign = 1.0 if ctx.plan.metric_mode == "max" else -1.0
    # Nothing compares as better than NaN, which a metric may be at first (Pearson's r of constant predictions).
    best = state.best_value if state.best_value is not None and math.isfinite(state.best_value) else -sign * math.inf
    is_best = math.isfinite(value) and sign * value > sign * best
    evaluation = scores.line(is_best)
    log.write_evaluation(evaluation, generate_samples(ctx.engine, ctx.task, ctx.splits[VALIDATION], step))
    if not is_best:
        count = state.evaluations_without_improvement + 1
        return state.model_copy(update={"evaluations_without_improvement": count}), False, evaluation
    log.write_record(f"scores-{VALIDATION}.json", scores.record(ctx.task))
    update = {"best_step": step, "best_value": value, "evaluations_without_improvement": 0}
    return state.model_copy(update=update), True, evaluation


def _is_due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0


def _minutes_passed(job: JobSpec, seconds: float) -> bool:
    return job.checkpoint.every_minutes is not None and seconds >= 60 * job.checkpoint.every_minutes
