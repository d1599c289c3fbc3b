"""Progress of a run: a bar on a terminal, plain lines in a log. Runs on the head."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from launcher.rundir.plan import Plan
from launcher.rundir.records import EvaluationRecord, MetricsLine, StepRecord

_POLL_S = 0.5
_EVERY_S = 5.0


def evaluation_text(line: EvaluationRecord) -> str:
    """One evaluation on one line."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in line.metrics.items())
    best = "  (best so far)" if line.best else ""
    skipped = f", {line.skipped_rows} skipped" if line.skipped_rows else ""
    return f"{line.split} at step {line.step}: {metrics}  loss {line.loss:.4f}  ({line.rows} rows{skipped}){best}"


@contextmanager
def reading_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows how many footers are read, from the fifth second on: on a terminal in place, in a log line by line."""
    began = shown = time.monotonic()
    status = console.status("") if console.is_terminal else None

    def tell(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (_POLL_S if status is not None else _EVERY_S) or now - began < _EVERY_S:
            return
        shown = now
        text = f"reading footers: {done:,} of {total:,} files"
        if status is None:
            console.print(text, highlight=False, soft_wrap=True)
        else:
            status.update(text)
            status.start()

    try:
        yield tell
    finally:
        if status is not None:
            status.stop()


class ProgressBar:
    """A rich progress bar; evaluations are printed above it."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task: TaskID = self._progress.add_task("starting workers", total=plan.total_steps)
        self._progress.start()

    def show(self, line: MetricsLine) -> None:
        if isinstance(line, StepRecord):
            text = f"loss {line.loss:.4f}  {line.samples_per_s:.1f} samples/s"
            self._progress.update(self._task, completed=line.step, description=text)
        elif isinstance(line, EvaluationRecord):  # what a model writes is looked at in the report
            self._progress.console.print(evaluation_text(line), highlight=False)

    def close(self) -> None:
        self._progress.stop()


class ProgressLines:
    """Plain lines, at most one every few seconds between evaluations."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan, self._console = plan, console
        self._shown = 0.0
        self._first: tuple[float, int] | None = None

    def show(self, line: MetricsLine) -> None:
        if isinstance(line, EvaluationRecord):
            self._console.print(evaluation_text(line), highlight=False, soft_wrap=True)
        if not isinstance(line, StepRecord):
            return
        now = time.monotonic()
        self._first = self._first or (now, line.step)
        if now - self._shown < _EVERY_S and line.step != self._plan.total_steps:
            return
        self._shown = now
        self._console.print(
            f"step {line.step}/{self._plan.total_steps}  epoch {line.epoch}  loss {line.loss:.4f}  "
            f"lr {line.learning_rate:.2e}  {line.samples_per_s:.1f} samples/s  {self._eta(now, line.step)}",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Nothing to take down."""

    def _eta(self, now: float, step: int) -> str:
        assert self._first is not None
        started, first = self._first
        if step == first:
            return "ETA ?"
        left = (now - started) / (step - first) * (self._plan.total_steps - step)
        return f"ETA {int(left // 60)}:{int(left % 60):02d}"
