"""Where a worker's time goes between two looks at the log: data, others, evaluations, checkpoints. Train workers.

What is left is the worker's own computing. Nothing here waits for the device: the log's own sync point bounds what it
does, and what a GPU waited for is read behind it.
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
        self._since = time.monotonic()
        self._within: Phase | None = None
        self._on_device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def stage(self) -> str:
        """The phase that is under way; `compute` outside of them all."""
        return self._within or "compute"

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count what happens in the block as `name`, unless it is part of another phase."""
        if self._within is not None:
            yield
            return
        self._within, start = name, time.monotonic()
        try:
            yield
        finally:
            self._within = None
            self._spent[name] += time.monotonic() - start

    def time_data_wait(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; waiting for each counts as waiting for data."""
        source = iter(items)
        while True:
            with self.phase("data"):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    @contextmanager
    def time_step(self) -> Iterator[None]:
        """Count what the block waits for collectives, its own and DeepSpeed's, as communication.

        On a CPU the process waits in `Work.wait`. On a GPU only the stream does, from where that is called on: two
        events tell how long, without a wait of their own, and hidden communication costs nothing and counts as nothing.
        """
        inner = Work.wait

        def wait(work: Work, *args: timedelta) -> bool:
            if self._within is not None or not torch.cuda.is_available():
                with self.phase("communication"):
                    return inner(work, *args)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            done = inner(work, *args)
            end.record()
            self._on_device.append((start, end))
            return done

        Work.wait = wait  # type: ignore[method-assign, assignment]  # the one place all collectives pass
        try:
            yield
        finally:
            Work.wait = inner  # type: ignore[method-assign]

    @property
    def spent(self) -> tuple[float, ...]:
        """Seconds spent in each of `PHASES` since the last `take`."""
        done = [pair for pair in self._on_device if pair[1].query()]
        self._on_device = [pair for pair in self._on_device if pair not in done]
        self._spent["communication"] += sum(start.elapsed_time(end) for start, end in done) / 1000
        return tuple(self._spent[name] for name in PHASES)

    def take(self) -> tuple[float, tuple[float, ...]]:
        """Seconds since the last time, and those of them spent in each of `PHASES`; begins anew."""
        now = time.monotonic()
        taken = now - self._since, self.spent
        self._since, self._spent = now, dict.fromkeys(PHASES, 0.0)
        return taken
