"""Stopwatch of a worker: seconds spent on data, communication, evaluation and checkpoints. Runs in train workers.

The rest is computing. Nothing here syncs with the device: times on a GPU come from events that are read later, after
the sync of `RunLog.flush`.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from torch.distributed import Work

Phase = Literal["data", "communication", "evaluation", "checkpoint"]
PHASES: tuple[Phase, ...] = ("data", "communication", "evaluation", "checkpoint")
T = TypeVar("T")


class Timer:
    """Seconds by phase since the last `take`."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._started_at = time.monotonic()
        self._phase: Phase | None = None
        self._device_waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def stage(self) -> str:
        """Return the current phase; `compute` outside of all phases."""
        return self._phase or "compute"

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of the block as `name`, unless the block is part of another phase."""
        if self._phase is not None:
            yield
            return
        self._phase = name
        # Host time: what a block only queues on the device is not in it.
        started_at = time.monotonic()
        try:
            yield
        finally:
            self._phase = None
            self._spent[name] += time.monotonic() - started_at

    def time_data_wait(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time until each is there counts as data."""
        source = iter(items)
        while True:
            with self.phase("data"):
                try:
                    item = next(source)
                except StopIteration:
                    return
            # Outside of the phase: what the caller does with the item is no wait for data.
            yield item

    @contextmanager
    def time_step(self) -> Iterator[None]:
        """Count the time that the block waits in collectives, its own and DeepSpeed's, as communication.

        On a CPU the process blocks in `Work.wait`. On a GPU only the stream waits: two events around `wait` measure how
        long, so communication that overlaps with computing counts as nothing.
        """
        # Only inside a step: evaluation and checkpoints count their collectives as their own time.
        inner = Work.wait

        def wait(work: Work, *args: timedelta) -> bool:
            # Inside another phase the time counts there, and nested phases count nothing.
            if self._phase is not None or not torch.cuda.is_available():
                with self.phase("communication"):
                    return inner(work, *args)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = inner(work, *args)
            end.record()
            self._device_waits.append((start, end))
            return result

        # Monkeypatch (torch 2.13): all collectives pass through `Work.wait`, and torch has no hook there.
        Work.wait = wait  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Work.wait = inner  # type: ignore[method-assign]

    @property
    def spent(self) -> tuple[float, ...]:
        """Return the seconds spent in each of `PHASES` since the last `take`."""
        # `query` does not block: waits that the device has not finished count later.
        finished = [pair for pair in self._device_waits if pair[1].query()]
        self._device_waits = [pair for pair in self._device_waits if pair not in finished]
        self._spent["communication"] += sum(start.elapsed_time(end) for start, end in finished) / 1000
        return tuple(self._spent[name] for name in PHASES)

    def take(self) -> tuple[float, tuple[float, ...]]:
        """Return the seconds since the last call, in all and in each of `PHASES`, and reset both."""
        now = time.monotonic()
        taken = now - self._started_at, self.spent
        self._started_at = now
        self._spent = dict.fromkeys(PHASES, 0.0)
        return taken
