"""What a run writes down as it goes: metrics.jsonl, the sinks, progress for the console. Train workers.

Losses stay on the device until they are due, then one all-reduce covers all steps since the last time.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.data.rank_batches import GlobalBatch
from launcher.errors import LauncherError, RunError, StaleAttemptError, StorageUnavailableError
from launcher.rundir import metrics_log
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import Lease
from launcher.rundir.records import (
    EvaluationRecord,
    GenerationRecord,
    MetricsLine,
    Record,
    StepRecord,
    TimesRecord,
    TrainerState,
)
from launcher.spec.job import JobSpec
from launcher.train.loggers.sinks import Sink, open_sinks
from launcher.train.loggers.timer import Timer

OnMetrics = Callable[[MetricsLine], None]
"""Told of every line of metrics.jsonl."""
_RANKS_PER_FLUSH = 16
"""A line of times has numbers of every worker: of a thousand workers it is written as rarely as it is long."""
_LOOK_S = 5.0
"""Between two looks at the lease: a request to an object store."""
_SILENT_S = 300.0
"""So long a training goes on without knowing whether it was taken over; it completes no checkpoint meanwhile."""
_LOG = logging.getLogger("launcher")


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int
    header: GlobalBatch
    loss_sum: torch.Tensor | None
    learning_rate: float
    grad_norm: "float | torch.Tensor | None"


class RunLog:
    """The log of one worker; only rank 0 writes.

    Args:
        run: where metrics.jsonl goes.
        job: names the sinks.
        listener: told of every line, for the console; None tells nobody.
        state: lines after its step are forgotten, their steps are done again.
        lease: looked at now and then, so that an attempt that was taken over writes no more.
    """

    def __init__(
        self, run: RunDir, job: JobSpec, listener: OnMetrics | None, state: TrainerState, lease: Lease | None = None
    ) -> None:
        self._run, self._listener, self._rank = run, listener, dist.get_rank()
        self._lease, self._looked, self._answered = lease, -math.inf, time.monotonic()
        self._late: dict[str, Record] = {}
        self._unwritten: list[MetricsLine] = []
        self._pending: list[_Pending] = []
        self._started = self._flushed = time.monotonic()
        self._earlier_s = state.elapsed_s
        self._step = state.step
        self._untimed = self._untimed_steps = 0
        self.timer = Timer()
        """Told by the loop what it waits for."""
        self._sinks: list[Sink] = []
        if self._rank == 0:
            metrics_log.truncate_after(run, state.step)
            self._sinks = open_sinks(run, job, state.step)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, over all attempts."""
        return self._earlier_s + time.monotonic() - self._started

    @property
    def last_step(self) -> int:
        """Steps done."""
        return self._step

    def step(self, pending: _Pending) -> None:
        """Note a step, unless its batch was left out; nothing leaves the device yet."""
        if pending.loss_sum is not None:
            self._pending.append(pending)
        self._step = pending.step

    def flush(
        self, skipped_rows: int, flags: tuple[bool, bool], judge: Callable[[StepRecord], None]
    ) -> tuple[bool, bool]:
        """Reduce and write all pending steps (a collective).

        Args:
            skipped_rows: unusable rows so far, as this worker was told.
            flags: told to all workers on the way.
            judge: raises where a step's numbers are no good.

        Returns:
            Each flag, set where any worker set it.

        Raises:
            TrainingError: `judge` does.
            StaleAttemptError: another attempt of the run writes there now.
        """
        sums = [p.loss_sum.detach().double() for p in self._pending if p.loss_sum is not None]
        device = sums[0].device if sums else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._untimed += 1
        self._untimed_steps += len(self._pending)
        timed = self._untimed * _RANKS_PER_FLUSH >= dist.get_world_size()
        spent = self._spent_by_rank() if timed else []
        stale = self._newer_attempt()
        shared = [float(skipped_rows), float(stale is not None), *map(float, flags), *spent]
        rest = torch.tensor(shared, dtype=torch.float64, device=device)
        merged = torch.cat([torch.stack(sums), rest]) if sums else rest
        with self.timer.phase("communication"):
            dist.all_reduce(merged)
        told = merged.tolist()  # the one sync point of these steps
        losses, (skipped, newer, first, second, *spent) = told[: len(sums)], told[len(sums) :]
        if newer:
            raise stale or StaleAttemptError(f"{self._run.uri}: another attempt has begun, this one ends")
        now = time.monotonic()
        times = [self._times(spent)] if timed else []
        seconds, samples = now - self._flushed, sum(p.header.samples for p in self._pending)
        lines = [
            self._line(p, loss / max(p.header.weight, 1e-12), int(skipped), samples / max(seconds, 1e-9))
            for p, loss in zip(self._pending, losses, strict=True)
        ]
        self._flushed, self._pending = now, []
        self._write([*lines, *times])
        for line in lines:
            judge(line)
        return first > 0, second > 0

    def evaluation(self, line: EvaluationRecord, written: list[GenerationRecord]) -> None:
        """Write the outcome of an evaluation; its seconds are not counted as training throughput."""
        self._flushed = time.monotonic()
        self._write([line, *written])

    def record(self, name: str, record: Record) -> None:
        """Write a record of the run on rank 0; what the storage does not take now is tried again later."""
        if self._rank == 0:
            self._late[name] = record
            try:
                self._write_late()
            except RunError as error:
                _LOG.warning("%s; tried again later", error.message)

    def _write_late(self) -> None:
        for name in list(self._late):
            self._run.write_record(name, self._late[name])
            del self._late[name]

    def close(self) -> None:
        """Finish the sinks.

        Raises:
            RunError: lines or records are left that the storage does not take.
        """
        if self._unwritten:
            self._run.append_metrics(self._unwritten)
        self._write_late()
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
        steps, self._untimed, self._untimed_steps = self._untimed_steps, 0, 0
        data, communication, evaluation, checkpoint = (
            tuple(round(s, 4) for s in spent[phase :: len(phases)]) for phase in range(len(phases))
        )
        return TimesRecord(
            step=self._step,
            steps=steps,
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
        self._append(lines)
        for line in lines:
            if self._listener is not None:
                self._listener(line)
            for sink in self._sinks:
                sink.write(line)

    def _newer_attempt(self) -> LauncherError | None:
        """Rank 0's look at the lease, now and then."""
        now = time.monotonic()
        if self._rank or self._lease is None or now - self._looked < _LOOK_S:
            return None
        self._looked = now
        try:
            self._lease.check()
        except StaleAttemptError as stale:
            return stale
        except StorageUnavailableError as trouble:
            if now - self._answered > _SILENT_S:
                return trouble
            _LOG.warning("%s: not known whether another attempt has begun; asking again", trouble.message)
            return None
        self._answered = now
        return None

    def _append(self, lines: Sequence[MetricsLine]) -> None:
        """To metrics.jsonl; what a full disk does not take waits for the next time."""
        self._unwritten += lines
        try:
            self._run.append_metrics(self._unwritten)
        except (OSError, RunError) as error:
            _LOG.warning("%s: not written, %d lines wait (%s)", self._run.uri, len(self._unwritten), error)
            return
        self._unwritten = []


def pending_step(
    step: int,
    epoch: int,
    header: GlobalBatch,
    loss_sum: torch.Tensor | None,
    rates: "tuple[float, float | torch.Tensor | None]",
) -> _Pending:
    """A step to note: steps done with it, its pass, its batch, this worker's loss sum, (learning rate, grad norm)."""
    return _Pending(step, epoch, header, loss_sum, rates[0], rates[1])
