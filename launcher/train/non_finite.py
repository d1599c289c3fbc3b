"""A loss that is no number: stop, leave its batch out, or go back and leave it out then. Train workers.

`train.non_finite: skip` looks at each step before its gradient is applied, which takes one number from the device and
from worker to worker. `rollback` costs nothing until it happens: the log finds the step afterwards, and the workers
start again from the last checkpoint. Either way the step is written down with its rows, and is passed over from then
on, so that the curve remains a function of the job file.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.data.batch_rows import read_batch_rows
from launcher.data.windows import TRAIN
from launcher.errors import NonFiniteLossError, TrainingError
from launcher.rundir.events import record_event
from launcher.rundir.records import StepRecord
from launcher.rundir.recovery import BadRow, SkippedBatch, read_skipped_batches, record_skipped_batch
from launcher.train.oom import Gradients, OOMRecovery

if TYPE_CHECKING:
    from launcher.train.loop import TrainContext

_MOST = 10
"""Batches that a run leaves out: where more are bad, the weights or the learning rate are."""


class NonFinitePolicy:
    """What stands around a step: too little memory, and losses that are none.

    Args:
        it: the training.
        healer: repeats what did not fit into memory.
    """

    def __init__(self, it: "TrainContext", healer: OOMRecovery) -> None:
        self._it, self._healer, self._policy = it, healer, it.job.train.non_finite
        self._left_out = {batch.step for batch in read_skipped_batches(it.run)}

    def is_skipped(self, step: int) -> bool:
        """Whether the step that follows `step` steps is not made."""
        return step + 1 in self._left_out

    def gradients(self, step: int, micro_batches: Sequence[pa.Table], compute: Gradients) -> torch.Tensor:
        """As `OOMRecovery.gradients`."""
        return self._it.faults.loss(step, self._healer.gradients(step, micro_batches, compute))

    def check_loss(self, step: int, loss: torch.Tensor) -> bool:
        """Whether a step's gradient may be applied; else its batch is left out from here on (a collective for `skip`).

        Raises:
            NonFiniteLossError: it may not, and other workers hold parts of the gradient already (ZeRO 2 and 3).
            TrainingError: too many were left out.
        """
        engine = self._it.engine
        if self._policy != "skip":
            return True
        finite = torch.isfinite(loss).to(torch.int32).reshape(1)
        if engine.world_size > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if finite.item():
            return True
        self._leave_out(step + 1, f"the loss is not finite at step {step + 1}")
        if not engine.can_retry_step:
            raise NonFiniteLossError(f"the loss is not finite at step {step + 1}")
        engine.reset_gradients()
        return False

    def check_logged(self, line: StepRecord) -> None:
        """The log has a step's numbers, the same on all workers.

        Raises:
            NonFiniteLossError: one of them is not finite; the workers must start again.
            TrainingError: one is not, and the job file says to stop then, or too many batches were left out.
        """
        # fp16 finds its loss scale by steps whose gradient overflows; DeepSpeed passes over these by itself.
        half = self._it.job.train.precision == "fp16"
        why = describe_non_finite(line.model_copy(update={"grad_norm": None}) if half else line)
        if why is None:
            return
        if self._policy == "stop":
            raise TrainingError(
                f"{why}; lower train.learning_rate, use bf16 instead of fp16, or have such batches left out "
                "(train.non_finite: skip)"
            )
        self._leave_out(line.step, why)
        raise NonFiniteLossError(why)

    def _leave_out(self, step: int, why: str) -> None:
        """Pass over a step from now on (a collective); rank 0 writes it down."""
        if len(self._left_out) >= _MOST:
            raise TrainingError(
                f"{why}, and {_MOST} batches are left out already; lower train.learning_rate, or look at the rows in "
                "skipped-batches.json"
            )
        self._left_out.add(step)
        if self._it.engine.rank == 0:
            self._write_down(step, why)
        dist.barrier()  # whoever goes on to raise ends the others

    def _write_down(self, step: int, why: str) -> None:
        it = self._it
        ids = read_batch_rows(it.job, it.plan, it.splits, step - 1)
        places = ((int(row), *it.splits[TRAIN].locate(int(row))) for row in ids)
        rows = tuple(BadRow(row=row, file=file, file_row=at) for row, file, at in places)
        record_skipped_batch(it.run, SkippedBatch(step=step, reason=why, rows=rows))
        record_event(
            it.run, "batch-left-out", step, f"{why}: its batch is left out, {len(rows)} rows (skipped-batches.json)"
        )


def describe_non_finite(line: StepRecord) -> str | None:
    """Return which of a step's numbers is not finite, in words; None where all are."""
    if not math.isfinite(line.loss):
        return f"the loss is {line.loss} at step {line.step}"
    if line.grad_norm is not None and not math.isfinite(line.grad_norm):
        return f"the gradient is {line.grad_norm} at step {line.step}"
    return None
