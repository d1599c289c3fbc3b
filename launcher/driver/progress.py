"""Progress on the console: a bar on a terminal, lines in a log. Runs on the head; footers are read on the client too.

Training (`control.py`) and predictions (`predict/driver.py`) share one display.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launcher.formatting import print_line
from launcher.rundir.plan import Plan
from launcher.rundir.records import EvaluationRecord, MetricsLine, StepRecord

_TERMINAL_EVERY_S = 0.5
_LOG_EVERY_S = 5.0


@contextmanager
def reading_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that shows how many footers are read, from the fifth second on."""
    started = shown = time.monotonic()
    status = console.status("") if console.is_terminal else None

    def on_progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        every_s = _LOG_EVERY_S if status is None else _TERMINAL_EVERY_S
        if now - shown < every_s or now - started < _LOG_EVERY_S:
            return
        shown = now
        text = f"reading footers: {done:,} of {total:,} files"
        if status is None:
            print_line(console, text)
        else:
            status.update(text)
            status.start()

    try:
        yield on_progress
    finally:
        if status is not None:
            status.stop()


class _Display:
    """A rich progress bar on a terminal; in a log, a line every few seconds with its own estimate of the time left.

    Args:
        console: Terminal or log.
        unit: Word in front of the numbers: `step` or `rows`.
        total: Number of units of the whole work.
        done: Units that an earlier command has done.
        first_log_s: Seconds until the first line of a log.
    """

    def __init__(self, console: Console, unit: str, total: int, done: int = 0, first_log_s: float = 0.0) -> None:
        self._console, self._unit, self._total = console, unit, total
        self._done_before = done
        self._start: tuple[float, int] | None = None
        self._next_log = time.monotonic() + first_log_s
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(unit), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
                TextColumn("ETA"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("starting workers", total=total, completed=done)
            self._bar.start()

    def rate(self, done: int) -> float | None:
        """Return units per second since this command's first one, so without the start of Ray and of the workers.

        Returns:
            None until it can be known.
        """
        now = time.monotonic()
        # Not from the beginning: the first step waits for the first window and compiles.
        if self._start is None and done > self._done_before:
            self._start = (now, done)
        if self._start is None or done <= self._start[1]:
            return None
        return (done - self._start[1]) / (now - self._start[0])

    def update_bar(self, done: int, text: str) -> None:
        """Move the bar on a terminal."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)

    def update_log(self, done: int, text: str, is_due: bool = False) -> None:
        """Print a line in a log if the last one is a few seconds old, or if it is due anyway."""
        # Before the return: the first call starts the clock of the rate.
        rate = self.rate(done)
        if self._bar is not None or (time.monotonic() < self._next_log and not is_due):
            return
        self._next_log = time.monotonic() + _LOG_EVERY_S
        self.print(f"{self._unit} {done}/{self._total}  {text}  {self._eta(done, rate)}")

    def print(self, text: str) -> None:
        """Print a line; a bar stays below it."""
        # In a log each record stays one line, whatever width rich assumes there.
        self._console.print(text, markup=False, highlight=False, soft_wrap=self._bar is None)

    def close(self) -> None:
        """Remove the live bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, done: int, rate: float | None) -> str:
        if not rate:
            return "ETA ?"
        left_s = (self._total - done) / rate
        return f"ETA {int(left_s // 60)}:{int(left_s % 60):02d}"


class TrainingProgress:
    """Steps and evaluations of a run."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan = plan
        self._display = _Display(console, "step", plan.total_steps)
        self.close = self._display.close

    def show(self, line: MetricsLine) -> None:
        """Show a metrics line; text that a model generates is in the report alone."""
        if isinstance(line, EvaluationRecord):
            self._display.print(_evaluation_text(line))
        elif isinstance(line, StepRecord):
            loss, speed = f"loss {line.loss:.4f}", f"{line.samples_per_s:.1f} samples/s"
            self._display.update_bar(line.step, f"{loss}  {speed}")
            self._display.update_log(
                line.step,
                f"epoch {line.epoch}  {loss}  lr {line.learning_rate:.2e}  {speed}",
                # Otherwise a log would seem to end before the last step.
                is_due=line.step == self._plan.total_steps,
            )


def _evaluation_text(line: EvaluationRecord) -> str:
    """Return one evaluation as one line of text."""
    # Of each source of a mixture its loss and main metric; the log and the report have all of them.
    main = next(iter(line.metrics), "")
    shown = {n: v for n, v in line.metrics.items() if "/" not in n or n.split("/", 1)[1] in ("loss", main)}
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
    best = "  (best so far)" if line.best else ""
    skipped = f", {line.skipped_rows} skipped" if line.skipped_rows else ""
    return f"{line.split} at step {line.step}: {metrics}  loss {line.loss:.4f}  ({line.rows} rows{skipped}){best}"


class PredictionProgress:
    """Rows and workers of `launcher predict`.

    Args:
        console: Terminal or log.
        total: Rows of the input.
        done: Rows that an earlier command has predicted.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._total = total
        self._display = _Display(console, "rows", total, done, first_log_s=_LOG_EVERY_S)
        self.close = self._display.close

    def show(self, rows: int, workers: int) -> None:
        """Show the rows that are done and the workers that have loaded their model; called twice a second."""
        rate = self._display.rate(rows)
        text = f"{rate:.1f} rows/s  {workers} worker{'' if workers == 1 else 's'}" if rate is not None else None
        if text is not None:
            self._display.update_bar(rows, text)
        self._display.update_log(rows, f"{100 * rows / self._total:.1f} %  {text or 'starting workers'}")


class RetrainingProgress:
    """Steps that are trained again, from a checkpoint to the step that is looked at.

    Args:
        console: Terminal or log.
        last: Last step.
    """

    def __init__(self, console: Console, last: int) -> None:
        self._console, self._last = console, last
        self._display: _Display | None = None

    def show(self, done: int) -> None:
        """Show the steps completed; the first call is that of the checkpoint, 0 without one."""
        if self._display is not None:
            self._display.update_bar(done, "training again")
            self._display.update_log(done, "training again")
            return
        count = self._last - 1 - done
        begin = f"from the checkpoint of step {done}" if done else "no checkpoint is that old: from the beginning"
        again = f"{count} step{'' if count == 1 else 's'} trained again before the last one" if count else "none again"
        print_line(self._console, f"{begin}, {again}")
        if count:
            self._display = _Display(self._console, "step", self._last, done, first_log_s=_LOG_EVERY_S)

    def close(self) -> None:
        """Remove the live bar from the terminal."""
        if self._display is not None:
            self._display.close()
