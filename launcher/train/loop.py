"""THE training loop. Runs in every train worker; start reading here.

A global batch arrives as this worker's share of it, already encoded and cut into micro-batches (`data/stream.py`).
The loss is a sum over samples divided by the weight of the *global* batch, so neither the number of workers nor the
micro-batch changes it. `engine.py` is DeepSpeed, `validate.py` the evaluation, `train/checkpoint/writer.py` what
survives a stop.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from launcher.data.rank_batches import LocalBatch, collate
from launcher.data.splits import Split
from launcher.data.stream import ShardStream
from launcher.data.windows import VALIDATION
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.records import EvaluationRecord, ResultRecord, TrainerState
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.train.checkpoint.writer import CheckpointWriter
from launcher.train.engine import Engine
from launcher.train.fault_injection import FaultInjector
from launcher.train.loggers.run_log import RunLog, pending_step
from launcher.train.non_finite import NonFinitePolicy
from launcher.train.oom import OOMRecovery
from launcher.train.preemption import never_stop
from launcher.train.schedule import learning_rate
from launcher.train.validate import generate_samples, validate

INITIAL_STATE = TrainerState(
    step=0, skipped_rows=0, elapsed_s=0.0, best_step=None, best_value=None, evaluations_without_improvement=0
)


@dataclass(frozen=True)
class TrainContext:
    """What the loop works on; nothing in it changes."""

    run: RunDir
    job: JobSpec
    plan: Plan
    task: Task
    engine: Engine
    splits: dict[str, Split]
    writer: CheckpointWriter
    faults: FaultInjector
    """Faults on purpose; none without `--chaos`."""


@dataclass(frozen=True)
class EvaluationEvent:
    """A place between two steps where a sweep may look, wait or stop."""

    state: TrainerState
    """With which a checkpoint made here would go on."""
    evaluation: EvaluationRecord


def train(
    it: TrainContext, stream: ShardStream, log: RunLog, state: TrainerState, leave: Callable[[], bool] = never_stop
) -> Generator[EvaluationEvent, None, ResultRecord | None]:
    """Train from `state` to the end, or to an early stop; pauses after each evaluation.

    Args:
        it: run, job, plan, task, engine and data.
        stream: this worker's shares, beginning behind `state.step`.
        log: where losses go.
        state: of the checkpoint that was loaded, or `INITIAL_STATE`.
        leave: whether all workers should save and leave after this step (a collective).

    Returns:
        What came of it; None when the workers left early, with a checkpoint.

    Raises:
        TrainingError: the loss is not finite, or workers train apart.
    """
    job, plan, engine = it.job, it.plan, it.engine
    skipped_before, stopped, saved_at = state.skipped_rows, should_stop_early(job, state), log.elapsed_s
    leaving = False
    guard = NonFinitePolicy(it, OOMRecovery(it.run, engine))
    engine.train_mode()
    for step, epoch, share in log.timer.time_data_wait(stream.steps()) if not stopped else ():
        rate = learning_rate(job.train, step, plan.total_steps)
        with log.timer.time_step():
            loss_sum = train_step(engine, it.task, share, step, rate, guard)
        done = step + 1
        log.step(pending_step(done, epoch, share.global_batch, loss_sum, (rate, engine.grad_norm)))
        it.faults.at_step(done)
        leaving = leave()
        evaluate, save = plan.evaluates_after(done), leaving or _divides(job.checkpoint.every_steps, done)
        if done == 1 or done % job.train.sync_check_steps == 0:
            engine.check_sync(done)
        if done % job.train.log_every_steps == 0 or evaluate or save or done == plan.total_steps:
            # Minutes are rank 0's, a disk that is full one node's; the flush tells all.
            due = engine.rank == 0 and _minutes_passed(job, log.elapsed_s - saved_at)
            due, failed = log.flush(stream.skipped_rows, (due, it.writer.failed), guard.check_logged)
            save |= due
            it.writer.join_if_failed(failed)
        if evaluate:
            it.faults.at("evaluation")
            with log.timer.phase("evaluation"):
                state, improved, line = _evaluate(it, stream, log, state, done)
            stopped = should_stop_early(job, state)
            save |= improved
        if evaluate or save or done == plan.total_steps:
            state = state.model_copy(
                update={"step": done, "skipped_rows": skipped_before + stream.skipped_rows, "elapsed_s": log.elapsed_s}
            )
        if save or stopped or done == plan.total_steps:
            with log.timer.phase("checkpoint"):
                it.writer.save(state)
            saved_at = log.elapsed_s
        if evaluate:
            yield EvaluationEvent(state, line)
        if stopped or leaving:
            break
    with log.timer.phase("checkpoint"):
        it.writer.join()
    log.flush(stream.skipped_rows, (False, False), guard.check_logged)  # the last checkpoint's time
    left_early = leaving and not stopped and state.step < plan.total_steps
    return None if left_early else _result(state, stopped)


def _result(state: TrainerState, stopped: bool) -> ResultRecord:
    return ResultRecord(
        steps=state.step,
        best_step=state.best_step or state.step,
        stopped_early=stopped,
        skipped_rows=state.skipped_rows,
        elapsed_s=state.elapsed_s,
    )


def should_stop_early(job: JobSpec, state: TrainerState) -> bool:
    """Whether the metric has not become better for so many evaluations that the job file says to stop."""
    patience = job.evaluation.patience
    return patience is not None and state.evaluations_without_improvement >= patience


def run_to_completion(training: Generator[EvaluationEvent, None, ResultRecord | None]) -> ResultRecord | None:
    """Train without a pause."""
    while True:
        try:
            next(training)
        except StopIteration as end:
            result: ResultRecord | None = end.value
            return result


def train_step(
    engine: Engine, task: Task, share: LocalBatch, step: int, rate: float, guard: NonFinitePolicy | None = None
) -> torch.Tensor | None:
    """One optimizer step on one global batch; a `guard` repeats what did not fit and leaves out what is bad.

    Returns:
        None where the batch was left out; else this worker's sum of losses, a scalar on the device. Summed over workers
        and divided by the batch's weight it is the loss of the step.
    """

    def gradients(micro_batches: Sequence[pa.Table]) -> torch.Tensor:
        engine.seed(step)
        total = torch.zeros((), device=engine.device)
        for samples in micro_batches:
            batch = collate(task, samples).to(engine.device)
            losses_B = task.sample_losses(engine.logits(batch), batch.labels)
            loss_sum = (losses_B * batch.mask).sum()
            engine.backward(loss_sum, share.global_batch.weight)
            total += loss_sum.detach()
        return total

    micro_batches = share.micro_batches
    if guard is None:
        total = gradients(micro_batches)
    elif guard.is_skipped(step) or not guard.check_loss(step, total := guard.gradients(step, micro_batches, gradients)):
        return None
    engine.step(rate, step)
    return total


def _evaluate(
    it: TrainContext, stream: ShardStream, log: RunLog, state: TrainerState, step: int
) -> tuple[TrainerState, bool, EvaluationRecord]:
    """Score the validation split; the state tells which checkpoint is best, the same on every worker."""
    shares = stream.evaluation(VALIDATION, step)
    scores = validate(it.engine, it.task, shares, it.splits[VALIDATION], step)
    # A metric that the validation data do not have (roc_auc, of one class) is no better than NaN.
    value = scores.loss if it.plan.metric == "loss" else scores.metrics.get(it.plan.metric, math.nan)
    sign = 1.0 if it.plan.metric_mode == "max" else -1.0
    # Nothing is greater than NaN, which a metric may be at first (Pearson's correlation of predictions all alike).
    best = state.best_value if state.best_value is not None and math.isfinite(state.best_value) else -sign * math.inf
    improved = math.isfinite(value) and sign * value > sign * best
    line = scores.line(improved)
    log.evaluation(line, generate_samples(it.engine, it.task, it.splits[VALIDATION], step))
    if not improved:
        waited = state.evaluations_without_improvement + 1
        return state.model_copy(update={"evaluations_without_improvement": waited}), False, line
    log.record(f"scores-{VALIDATION}.json", scores.record(it.task))
    update = {"best_step": step, "best_value": value, "evaluations_without_improvement": 0}
    return state.model_copy(update=update), True, line


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _minutes_passed(job: JobSpec, seconds: float) -> bool:
    return job.checkpoint.every_minutes is not None and seconds >= 60 * job.checkpoint.every_minutes
