"""Policy for losses and gradients that are not finite (`train.non_finite`). Runs in train workers.

`skip` checks every step before its gradient is applied, which costs one number from the device and one all-reduce.
`rollback` costs nothing until it happens: the log finds the step afterwards, and the workers resume from the last
checkpoint. Both record the batch with its rows and skip it from then on, in every later attempt as well, so the curve
remains a function of the job file.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.data.stream import read_batch_rows
from launcher.data.windows import TRAIN
from launcher.errors import NonFiniteLossError, TrainingError
from launcher.rundir.events import record_event
from launcher.rundir.records import StepRecord
from launcher.rundir.recovery import BadRow, SkippedBatch, read_skipped_batches, record_skipped_batch

if TYPE_CHECKING:
    from launcher.train.loop import TrainContext

_MAX_SKIPPED = 10
"""Batches that a run skips; with more of them the cause is the weights or the learning rate, not the data."""


class NonFinitePolicy:
    """Decides which batches of a run are skipped.

    Args:
        ctx: Training it belongs to.
    """

    def __init__(self, ctx: "TrainContext") -> None:
        self._ctx, self._policy = ctx, ctx.job.train.non_finite
        self._skipped_steps = {batch.step for batch in read_skipped_batches(ctx.run)}

    def is_skipped(self, step: int) -> bool:
        """Return True if the batch after `step` completed steps is skipped."""
        return step + 1 in self._skipped_steps

    def check_loss(self, step: int, loss_sum: torch.Tensor) -> bool:
        """Return True if the gradient of a step may be applied; skip its batch otherwise. Collective for `skip`.

        Raises:
            NonFiniteLossError: It may not, and other ranks already hold parts of the gradient (ZeRO 2 and 3).
            TrainingError: Too many batches are skipped.
        """
        engine = self._ctx.engine
        if self._policy != "skip":
            return True
        is_finite = torch.isfinite(loss_sum).all().to(torch.int32).reshape(1)
        if engine.world_size > 1:
            # One rank's NaN makes all ranks skip: the weights would differ for good if some applied the gradient.
            dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        # A host-device sync in every step, the price of `skip`.
        if is_finite.item():
            return True
        reason = f"the loss is not finite at step {step + 1}"
        # Recorded first: under ZeRO 2 and 3 the ranks restart, and the next attempt skips what the record names.
        self._skip(step + 1, reason)
        if not engine.can_retry_step:
            raise NonFiniteLossError(reason)
        engine.reset_gradients()
        return False

    def check_logged(self, line: StepRecord) -> None:
        """Check the logged numbers of a step, which are the same on all ranks.

        Raises:
            NonFiniteLossError: One of them is not finite; the workers must resume from the last checkpoint.
            TrainingError: One is not finite and the policy is `stop`, or too many batches are skipped.
        """
        # fp16 finds its loss scale by steps whose gradient overflows; DeepSpeed skips these by itself.
        is_fp16 = self._ctx.job.train.precision == "fp16"
        reason = describe_non_finite(line.model_copy(update={"grad_norm": None}) if is_fp16 else line)
        if reason is None:
            return
        if self._policy == "stop":
            raise TrainingError(
                f"{reason}; lower train.learning_rate, use bf16 instead of fp16, or have such batches skipped "
                "(train.non_finite: skip)"
            )
        self._skip(line.step, reason)
        raise NonFiniteLossError(reason)

    def _skip(self, step: int, reason: str) -> None:
        """Skip the batch of a step from now on; rank 0 records it. Collective."""
        if len(self._skipped_steps) >= _MAX_SKIPPED:
            raise TrainingError(
                f"{reason}, and {_MAX_SKIPPED} batches are skipped already; lower train.learning_rate, or look at the "
                "rows in skipped-batches.json"
            )
        self._skipped_steps.add(step)
        if self._ctx.engine.rank == 0:
            self._record(step, reason)
        # A rank that raises next ends the others, which must not happen before the record is written.
        dist.barrier()

    def _record(self, step: int, reason: str) -> None:
        ctx = self._ctx
        train = ctx.splits[TRAIN]
        rows = []
        # Read from the data files again, at most ten times in a run: the stream keeps no rows of earlier batches.
        for row in read_batch_rows(ctx.job, ctx.plan, ctx.splits, step - 1):
            file, file_row = train.locate(int(row))
            rows.append(BadRow(row=int(row), file=file, file_row=file_row))
        record_skipped_batch(ctx.run, SkippedBatch(step=step, reason=reason, rows=tuple(rows)))
        text = f"{reason}: its batch is skipped, {len(rows)} rows (skipped-batches.json)"
        record_event(ctx.run, "batch-skipped", step, text)


def describe_non_finite(line: StepRecord) -> str | None:
    """Return which number of a step is not finite, in words; None if all are finite."""
    if not math.isfinite(line.loss):
        return f"the loss is {line.loss} at step {line.step}"
    if line.grad_norm is not None and not math.isfinite(line.grad_norm):
        return f"the gradient is {line.grad_norm} at step {line.step}"
    return None
