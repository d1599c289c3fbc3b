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

from launcher.data.batch_rows import rows_of_step
from launcher.data.windows import TRAIN
from launcher.errors import NotFinite, TrainingError
from launcher.rundir.events import note
from launcher.rundir.left_out import BadRow, LeftOut, leave_out, left_out_of
from launcher.rundir.records import StepRecord
from launcher.train.oom import Gradients, Healer

if TYPE_CHECKING:
    from launcher.train.loop import TrainRun

_MOST = 10
"""Batches that a run leaves out: where more are bad, the weights or the learning rate are."""


class Guard:
    """What stands around a step: too little memory, and losses that are none.

    Args:
        it: the training.
        healer: repeats what did not fit into memory.
    """

    def __init__(self, it: "TrainRun", healer: Healer) -> None:
        self._it, self._healer, self._policy = it, healer, it.job.train.non_finite
        self._left_out = {batch.step for batch in left_out_of(it.run)}

    def passes_over(self, step: int) -> bool:
        """Whether the step that follows `step` steps is not made."""
        return step + 1 in self._left_out

    def gradients(self, step: int, micro_batches: Sequence[pa.Table], compute: Gradients) -> torch.Tensor:
        """As `Healer.gradients`."""
        return self._it.chaos.loss(step, self._healer.gradients(step, micro_batches, compute))

    def accepts(self, step: int, loss: torch.Tensor) -> bool:
        """Whether a step's gradient may be applied; else its batch is left out from here on (a collective for `skip`).

        Raises:
            NotFinite: it may not, and other workers hold parts of the gradient already (ZeRO 2 and 3).
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
        if not engine.repeats:
            raise NotFinite(f"the loss is not finite at step {step + 1}")
        engine.discard()
        return False

    def seen(self, line: StepRecord) -> None:
        """The log has a step's numbers, the same on all workers.

        Raises:
            NotFinite: one of them is not finite; the workers must start again.
            TrainingError: one is not, and the job file says to stop then, or too many batches were left out.
        """
        # fp16 finds its loss scale by steps whose gradient overflows; DeepSpeed passes over these by itself.
        half = self._it.job.train.precision == "fp16"
        why = problem_of(line.model_copy(update={"grad_norm": None}) if half else line)
        if why is None:
            return
        if self._policy == "stop":
            raise TrainingError(
                f"{why}; lower train.learning_rate, use bf16 instead of fp16, or have such batches left out "
                "(train.non_finite: skip)"
            )
        self._leave_out(line.step, why)
        raise NotFinite(why)

    def _leave_out(self, step: int, why: str) -> None:
        """Pass over a step from now on (a collective); rank 0 writes it down."""
        if len(self._left_out) >= _MOST:
            raise TrainingError(
                f"{why}, and {_MOST} batches are left out already; lower train.learning_rate, or look at the rows in "
                "left-out.json"
            )
        self._left_out.add(step)
        if self._it.engine.rank == 0:
            self._write_down(step, why)
        dist.barrier()  # whoever goes on to raise ends the others

    def _write_down(self, step: int, why: str) -> None:
        it = self._it
        ids = rows_of_step(it.job, it.plan, it.splits, step - 1)
        places = ((int(row), *it.splits[TRAIN].locate(int(row))) for row in ids)
        rows = tuple(BadRow(row=row, file=file, file_row=at) for row, file, at in places)
        leave_out(it.run, LeftOut(step=step, why=why, rows=rows))
        note(it.run, "batch-left-out", step, f"{why}: its batch is left out, {len(rows)} rows (left-out.json)")


def problem_of(line: StepRecord) -> str | None:
    """Return which of a step's numbers is not finite, in words; None where all are."""
    if not math.isfinite(line.loss):
        return f"the loss is {line.loss} at step {line.step}"
    if line.grad_norm is not None and not math.isfinite(line.grad_norm):
        return f"the gradient is {line.grad_norm} at step {line.step}"
    return None
