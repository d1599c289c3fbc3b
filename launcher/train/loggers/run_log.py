"""Log of a run: metrics.jsonl, the sinks and the progress callback. Runs in train workers; rank 0 writes.

Losses stay on the device until a flush, where one all-reduce and one host-device sync cover all steps since the last
one. `loop.py` adds steps and flushes, `timer.py` measures where the time goes, `sinks.py` has the sinks.
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
from launcher.train.loggers.sinks import Sink, open_sinks, scalars_of
from launcher.train.loggers.timer import Timer

OnMetrics = Callable[[MetricsLine], None]
"""Callback for every line of metrics.jsonl."""
_RANKS_PER_FLUSH = 16
"""A line of times has numbers of every rank. It is written every `world_size / 16` flushes: the longer, the rarer."""
_LEASE_CHECK_S = 5.0
"""Interval of lease checks, each of which is a request on an object store."""
_MAX_UNCHECKED_S = 300.0
"""Longest time to train without an answer to the lease check; checkpoints check it separately."""
_LOG = logging.getLogger("launcher")


@dataclass(frozen=True)
class PendingStep:
    """A step whose loss is still on the device."""

    step: int
    """Steps completed, this one included."""
    epoch: int
    global_batch: GlobalBatch
    part_losses: torch.Tensor | None
    """Sample losses of each part by source (V, sources), on the device, 0 for parts of other ranks; None if the batch
    was skipped."""
    learning_rate: float
    grad_norm: "float | torch.Tensor | None"


def sum_over_parts(part_losses_NVS: torch.Tensor) -> list[list[float]]:
    """Return the loss of each source in each of N steps, given that of each part, float64 (N, V, S)."""
    first, *others = part_losses_NVS.unbind(1)
    # One after the other, in the order of the parts. A sum over the axis may take another order for another shape.
    return sum(others, first).tolist()


class RunLog:
    """Log of one training; every rank has one, and only rank 0 writes.

    Args:
        run: Run directory of metrics.jsonl.
        job: Job that names the sinks.
        on_metrics: Callback for every line, for the console; None for no callback.
        state: State that the training starts from; later lines are removed, as their steps are repeated.
        lease: Lease to check at intervals, so that a stale attempt stops writing; None if nobody else can write.
    """

    def __init__(
        self, run: RunDir, job: JobSpec, on_metrics: OnMetrics | None, state: TrainerState, lease: Lease | None = None
    ) -> None:
        self._run = run
        self._on_metrics = on_metrics
        self._rank = dist.get_rank()
        self._lease = lease
        # The first flush checks at once: an attempt may be stale before its first line.
        self._lease_checked_at = -math.inf
        self._lease_answered_at = time.monotonic()
        self._sources = tuple(job.data.mixture or ())
        self._unwritten_records: dict[str, Record] = {}
        self._unwritten_lines: list[MetricsLine] = []
        self._pending: list[PendingStep] = []
        self._started_at = self._flushed_at = time.monotonic()
        self._earlier_s = state.elapsed_s
        self._earlier_skipped_rows = state.skipped_rows
        self._step = state.step
        self._untimed_flushes = 0
        self._untimed_steps = 0
        self.timer = Timer()
        """Stopwatch of the phases that the loop marks."""
        self._sinks: list[Sink] = []
        if self._rank == 0:
            # Before the sinks: lines after this step will be written again, and a line twice would count twice.
            metrics_log.truncate_after(run, state.step)
            self._sinks = open_sinks(run, job, state.step)

    @property
    def elapsed_s(self) -> float:
        """Return the seconds of training over all attempts."""
        return self._earlier_s + time.monotonic() - self._started_at

    @property
    def last_step(self) -> int:
        """Return the number of steps completed."""
        return self._step

    def step(self, pending: PendingStep) -> None:
        """Add a step to the next flush, unless its batch was skipped. No host-device sync."""
        if pending.part_losses is not None:
            self._pending.append(pending)
        self._step = pending.step

    def flush(
        self, skipped_rows: int, flags: tuple[bool, bool], check_step: Callable[[StepRecord], None]
    ) -> tuple[bool, bool]:
        """Reduce, write and check all pending steps. Collective, with one host-device sync.

        Args:
            skipped_rows: Unusable rows since the state that the log began with, as this rank knows them.
            flags: Two flags of this rank, reduced on the way at no extra cost.
            check_step: Function that raises if the numbers of a step are unusable.

        Returns:
            Each flag, True if any rank has set it.

        Raises:
            TrainingError: `check_step` raises it.
            StaleAttemptError: A newer attempt of the run has started.
        """
        # All ranks have equally many pending steps, as they skip a batch together: the all-reduce adds by position, and
        # to zeros, as each part is of one rank. So it rounds nothing.
        losses = [pending.part_losses.detach().double() for pending in self._pending if pending.part_losses is not None]
        device = losses[0].device if losses else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._untimed_flushes += 1
        self._untimed_steps += len(self._pending)
        is_timed = self._untimed_flushes * _RANKS_PER_FLUSH >= dist.get_world_size()
        own_times = self._place_own_times() if is_timed else []
        # Only rank 0 asks. It does not raise here, where the others would wait for it, but sends the answer along.
        stale = self._check_lease()
        extras = [float(skipped_rows), float(stale is not None), *map(float, flags), *own_times]
        merged = torch.tensor(extras, dtype=torch.float64, device=device)
        merged = torch.cat([*(part_losses.view(-1) for part_losses in losses), merged])
        with self.timer.phase("communication"):
            # Collective, the only one of the log: losses, rows, flags and times in one tensor.
            dist.all_reduce(merged)
        # The only host-device sync of these steps.
        merged, rest = merged.cpu().split([len(merged) - len(extras), len(extras)])
        losses_by_step = sum_over_parts(merged.view(len(losses), *losses[0].shape)) if losses else []
        all_skipped_rows, is_stale, first_flag, second_flag, *times = rest.tolist()
        if is_stale:
            raise stale or StaleAttemptError(f"{self._run.uri}: a newer attempt has started, this one stops")
        now = time.monotonic()
        time_lines = [self._times_line(times)] if is_timed else []
        samples = sum(pending.global_batch.samples for pending in self._pending)
        samples_per_s = samples / max(now - self._flushed_at, 1e-9)
        lines = [
            self._step_line(pending, loss, self._earlier_skipped_rows + int(all_skipped_rows), samples_per_s)
            for pending, loss in zip(self._pending, losses_by_step, strict=True)
        ]
        self._flushed_at = now
        self._pending = []
        # Written before they are checked: the log shows the step that stopped the run.
        self._write([*lines, *time_lines])
        for line in lines:
            check_step(line)
        return first_flag > 0, second_flag > 0

    def write_evaluation(self, line: EvaluationRecord, generations: list[GenerationRecord]) -> None:
        """Write the result of an evaluation, whose time does not count towards the training throughput."""
        # The next throughput begins here, without the seconds of the evaluation.
        self._flushed_at = time.monotonic()
        self._write([line, *generations])

    def write_record(self, name: str, record: Record) -> None:
        """Write a record of the run on rank 0; if the storage fails, `close` tries again."""
        if self._rank == 0:
            self._unwritten_records[name] = record
            try:
                self._write_records()
            except RunError as error:
                _LOG.warning("%s; trying again later", error.message)

    def _write_records(self) -> None:
        # A copy, as written ones are removed. A record that fails keeps the others waiting too, for the same storage.
        for name in list(self._unwritten_records):
            self._run.write_record(name, self._unwritten_records[name])
            del self._unwritten_records[name]

    def close(self) -> None:
        """Write what is pending and close the sinks.

        Raises:
            RunError: The storage still rejects lines or records.
        """
        if self._unwritten_lines:
            self._run.append_metrics(self._unwritten_lines)
        self._write_records()
        for sink in self._sinks:
            sink.close()

    def _place_own_times(self) -> list[float]:
        """Return this rank's seconds by phase in its slot of a zero vector over all ranks: the sum gathers them."""
        own = self.timer.spent
        # Its size grows with the ranks, and so does the line: hence the rarer lines of a large run.
        times = [0.0] * (dist.get_world_size() * len(own))
        times[self._rank * len(own) : (self._rank + 1) * len(own)] = own
        return times

    def _times_line(self, times: Sequence[float]) -> TimesRecord:
        """Build the line of all ranks' times and reset this rank's timer."""
        seconds, phases = self.timer.take()
        steps = self._untimed_steps
        self._untimed_flushes = 0
        self._untimed_steps = 0
        data, communication, evaluation, checkpoint = (
            tuple(round(second, 4) for second in times[phase :: len(phases)]) for phase in range(len(phases))
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

    def _step_line(
        self, pending: PendingStep, loss_sums: Sequence[float], skipped_rows: int, samples_per_s: float
    ) -> StepRecord:
        weights = pending.global_batch.source_weights
        by_source = zip(self._sources, loss_sums, weights, strict=True) if weights else ()
        return StepRecord(
            step=pending.step,
            epoch=pending.epoch + 1,
            loss=sum(loss_sums) / pending.global_batch.divisor,
            sources={name: loss / weight for name, loss, weight in by_source if weight > 0} or None,
            learning_rate=pending.learning_rate,
            # A host-device sync per step, but after the all-reduce of a flush the device has nothing left to do.
            grad_norm=None if pending.grad_norm is None else float(pending.grad_norm),
            samples=pending.global_batch.samples,
            skipped_rows=skipped_rows,
            samples_per_s=samples_per_s,
            elapsed_s=self.elapsed_s,
        )

    def _write(self, lines: Sequence[MetricsLine]) -> None:
        if self._rank != 0 or not lines:
            return
        self._append(lines)
        for line in lines:
            if self._on_metrics is not None:
                self._on_metrics(line)
            for sink in self._sinks:
                sink.write(line, scalars_of(line))

    def _check_lease(self) -> LauncherError | None:
        """Return an error if this attempt is stale or unchecked for too long. Rank 0 asks, at intervals."""
        now = time.monotonic()
        if self._rank or self._lease is None or now - self._lease_checked_at < _LEASE_CHECK_S:
            return None
        self._lease_checked_at = now
        try:
            self._lease.check()
        except StaleAttemptError as error:
            return error
        except StorageUnavailableError as error:
            if now - self._lease_answered_at > _MAX_UNCHECKED_S:
                return error
            _LOG.warning("%s: cannot check whether a newer attempt has started; trying again later", error.message)
            return None
        self._lease_answered_at = now
        return None

    def _append(self, lines: Sequence[MetricsLine]) -> None:
        """Append to metrics.jsonl; lines that the storage rejects are appended with the next ones."""
        self._unwritten_lines += lines
        try:
            self._run.append_metrics(self._unwritten_lines)
        except (OSError, RunError) as error:
            _LOG.warning("%s: not written, %d lines wait (%s)", self._run.uri, len(self._unwritten_lines), error)
            return
        self._unwritten_lines = []
