"""Where a worker's time goes between two looks at the log: waiting for data, evaluations, checkpoints. Train workers.

What is left is the steps themselves. Nothing here waits for the device: the log's own sync point bounds what it does.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

Phase = Literal["data", "evaluation", "checkpoint"]
PHASES: tuple[Phase, ...] = ("data", "evaluation", "checkpoint")
T = TypeVar("T")


class Timer:
    """Seconds by phase since the last `take`."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._since = time.monotonic()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count what happens in the block as `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent[name] += time.monotonic() - start

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; waiting for each counts as waiting for data."""
        source = iter(items)
        while True:
            with self.phase("data"):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    @property
    def spent(self) -> tuple[float, ...]:
        """Seconds spent in each of `PHASES` since the last `take`."""
        return tuple(self._spent[name] for name in PHASES)

    def take(self) -> tuple[float, tuple[float, ...]]:
        """Seconds since the last time, and those of them spent in each of `PHASES`; begins anew."""
        now = time.monotonic()
        taken = now - self._since, self.spent
        self._since, self._spent = now, dict.fromkeys(PHASES, 0.0)
        return taken
