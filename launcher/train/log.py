"""What a run writes down as it goes: metrics.jsonl, the sinks, progress for the console. Train workers.

Losses stay on the device until they are due, then one all-reduce covers all steps since the last time.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.data.batches import StepHeader
from launcher.errors import TrainingError
from launcher.records import EvaluationRecord, GenerationRecord, MetricsLine, StepRecord, TimesRecord
from launcher.rundir import RunDir
from launcher.spec.job import JobSpec
from launcher.train.sinks import Sink, open_sinks
from launcher.train.timer import Timer

Listener = Callable[[MetricsLine], None]
"""Told of every line of metrics.jsonl."""


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int
    header: StepHeader
    loss_sum: torch.Tensor
    learning_rate: float
    grad_norm: "float | torch.Tensor | None"


class RunLog:
    """The log of one worker; only rank 0 writes.

    Args:
        run: where metrics.jsonl goes.
        job: names the sinks.
        listener: told of every line, for the console; None tells nobody.
        resumed_step: lines after this step are forgotten, their steps are done again.
        elapsed_s: training time of earlier attempts.
    """

    def __init__(
        self, run: RunDir, job: JobSpec, listener: Listener | None, resumed_step: int, elapsed_s: float
    ) -> None:
        self._run, self._listener, self._rank = run, listener, dist.get_rank()
        self._pending: list[_Pending] = []
        self._started = self._flushed = time.monotonic()
        self._earlier_s = elapsed_s
        self._step = resumed_step
        self.timer = Timer()
        """Told by the loop what it waits for."""
        self._sinks: list[Sink] = []
        if self._rank == 0:
            run.truncate_metrics(resumed_step)
            self._sinks = open_sinks(run, job, resumed_step)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, over all attempts."""
        return self._earlier_s + time.monotonic() - self._started

    def step(self, pending: _Pending) -> None:
        """Note a step; nothing leaves the device yet."""
        self._pending.append(pending)
        self._step = pending.step

    def flush(self, skipped_rows: int, flag: bool) -> bool:
        """Reduce and write all pending steps (a collective).

        Args:
            skipped_rows: unusable rows so far, as this worker was told.
            flag: rank 0's wish, shared with all workers on the way.

        Returns:
            Rank 0's flag.

        Raises:
            TrainingError: a loss is not finite.
        """
        sums = [p.loss_sum.detach().double() for p in self._pending]
        device = sums[0].device if sums else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        spent = self._spent_by_rank()
        shared = [float(skipped_rows), float(flag and self._rank == 0), *spent]
        rest = torch.tensor(shared, dtype=torch.float64, device=device)
        merged = torch.cat([torch.stack(sums), rest]) if sums else rest
        dist.all_reduce(merged)
        told = merged.tolist()  # the one sync point of these steps
        losses, (skipped, agreed, *spent) = told[: len(sums)], told[len(sums) :]
        now = time.monotonic()
        times = self._times(spent)
        seconds, samples = now - self._flushed, sum(p.header.samples for p in self._pending)
        lines = [
            self._line(p, loss / max(p.header.weight, 1e-12), int(skipped), samples / max(seconds, 1e-9))
            for p, loss in zip(self._pending, losses, strict=True)
        ]
        self._flushed, self._pending = now, []
        self._write([*lines, times])
        for line in lines:
            if not math.isfinite(line.loss):
                raise TrainingError(
                    f"the loss is {line.loss} at step {line.step}; lower train.learning_rate, or use bf16 "
                    "instead of fp16"
                )
        return bool(agreed > 0)

    def evaluation(self, line: EvaluationRecord, written: list[GenerationRecord]) -> None:
        """Write the outcome of an evaluation; its seconds are not counted as training throughput."""
        self._flushed = time.monotonic()
        self._write([line, *written])

    def close(self) -> None:
        """Finish the sinks."""
        for sink in self._sinks:
            sink.close()

    def _spent_by_rank(self) -> list[float]:
        """This worker's seconds by phase at its place among all workers', zeros elsewhere: a sum gathers them."""
        mine = self.timer.spent
        spent = [0.0] * (dist.get_world_size() * len(mine))
        spent[self._rank * len(mine) : (self._rank + 1) * len(mine)] = mine
        return spent

    def _times(self, spent: Sequence[float]) -> TimesRecord:
        """What the timers of all workers said; ours begins anew."""
        seconds, phases = self.timer.take()
        data, communication, evaluation, checkpoint = (
            tuple(round(s, 4) for s in spent[phase :: len(phases)]) for phase in range(len(phases))
        )
        return TimesRecord(
            step=self._step,
            steps=len(self._pending),
            seconds=round(seconds, 4),
            data_s=data,
            communication_s=communication,
            evaluation_s=evaluation,
            checkpoint_s=checkpoint,
        )

    def _line(self, pending: _Pending, loss: float, skipped_rows: int, samples_per_s: float) -> StepRecord:
        return StepRecord(
            step=pending.step,
            epoch=pending.epoch + 1,
            loss=loss,
            learning_rate=pending.learning_rate,
            grad_norm=None if pending.grad_norm is None else float(pending.grad_norm),
            samples=pending.header.samples,
            skipped_rows=skipped_rows,
            samples_per_s=samples_per_s,
            elapsed_s=self.elapsed_s,
        )

    def _write(self, lines: Sequence[MetricsLine]) -> None:
        if self._rank != 0 or not lines:
            return
        self._run.append_metrics(lines)
        for line in lines:
            if self._listener is not None:
                self._listener(line)
            for sink in self._sinks:
                sink.write(line)


def pending_step(
    step: int,
    epoch: int,
    header: StepHeader,
    loss_sum: torch.Tensor,
    rates: "tuple[float, float | torch.Tensor | None]",
) -> _Pending:
    """A step to note: steps done with it, its pass, its batch, this worker's loss sum, (learning rate, grad norm)."""
    return _Pending(step, epoch, header, loss_sum, rates[0], rates[1])
