"""Progress of predictions: a bar on a terminal, lines in a log, as in `driver/progress.py`. Runs on the head."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY_S = 5.0


class PredictionProgress(Protocol):
    """Shows how far it is."""

    def show(self, rows: int, workers: int) -> None:
        """Rows that are done, and workers that have loaded their model; called often."""

    def close(self) -> None:
        """Take down what stands on the screen."""


def make_progress(console: Console, total: int, before: int) -> PredictionProgress:
    """The view that suits a console.

    Args:
        console: a terminal, or a log.
        total: rows of the input.
        before: rows that an earlier command predicted.
    """
    return (_Bar if console.is_terminal else _Lines)(console, total, before)


class _Speed:
    """Rows per second since the first were done by this command: the start of Ray and of workers is not among it."""

    def __init__(self, before: int) -> None:
        self._before = before
        self._first: tuple[float, int] | None = None

    def __call__(self, rows: int) -> float | None:
        """Rows per second; None as long as nothing is known."""
        now = time.monotonic()
        if self._first is None and rows > self._before:
            self._first = now, rows
        if self._first is None or rows <= self._first[1]:
            return None
        return (rows - self._first[1]) / (now - self._first[0])


class _Bar:
    """A rich progress bar."""

    def __init__(self, console: Console, total: int, before: int) -> None:
        self._progress = Progress(
            TextColumn("rows"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("starting workers", total=total, completed=before)
        self._speed = _Speed(before)
        self._progress.start()

    def show(self, rows: int, workers: int) -> None:
        speed = self._speed(rows)
        if speed is not None:
            self._progress.update(self._task, completed=rows, description=f"{speed:.1f} rows/s  {_workers(workers)}")

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Plain lines, one every few seconds."""

    def __init__(self, console: Console, total: int, before: int) -> None:
        self._console, self._total, self._shown = console, total, time.monotonic()
        self._speed = _Speed(before)

    def show(self, rows: int, workers: int) -> None:
        speed, now = self._speed(rows), time.monotonic()
        if now - self._shown < _EVERY_S:
            return
        self._shown = now
        percent = 100 * rows / self._total
        fast = "starting workers" if speed is None else f"{speed:.1f} rows/s  {_workers(workers)}"
        self._console.print(
            f"rows {rows}/{self._total}  {percent:.1f} %  {fast}  {self._eta(rows, speed)}",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Nothing to take down."""

    def _eta(self, rows: int, speed: float | None) -> str:
        if not speed:
            return "ETA ?"
        left = (self._total - rows) / speed
        return f"ETA {int(left // 60)}:{int(left % 60):02d}"


def _workers(number: int) -> str:
    return f"{number} worker{'' if number == 1 else 's'}"
