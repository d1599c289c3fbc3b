"""The terminal view of a running sweep: a table that stays readable at any number of trials. Runs on the head."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.formatting import format_param, print_line
from launcher.rundir.trials import TrialRecord
from launcher.spec.tune import TuneSpec

_MAX_BEST, _MAX_RUNNING = 8, 8
_MAX_VALUE_CHARS = 24


@contextmanager
def watch_sweep(spec: TuneSpec, metric: str, mode: str, console: Console) -> Iterator["_SweepView"]:
    """Show the trials until the block ends; yields the listener that takes each changed trial."""
    view = _SweepView(spec, metric, mode, console)
    if not console.is_terminal:
        yield view
        return
    with Live(view, console=console, refresh_per_second=2, transient=True):
        yield view


class _SweepView:
    """The best trials, the running ones and counts on a terminal; elsewhere a line per completed trial."""

    def __init__(self, spec: TuneSpec, metric: str, mode: str, console: Console) -> None:
        self._spec = spec
        self._metric = metric
        self._mode = mode
        self._console = console
        self._trials: dict[int, TrialRecord] = {}
        self._started = time.monotonic()

    def __call__(self, trial: TrialRecord) -> None:
        before = self._trials.get(trial.number)
        self._trials[trial.number] = trial
        if self._console.is_terminal or trial.status == "running" or (before and before.status == trial.status):
            return
        print_line(self._console, self._format_line(trial))

    def _format_line(self, trial: TrialRecord) -> str:
        best = trial.best_evaluation(self._mode)
        value = f"{self._metric} {best.value:.4f}" if best else "no evaluation"
        params = "  ".join(
            f"{_shorten_key(key)} {format_param(v, _MAX_VALUE_CHARS)}" for key, v in trial.params.items()
        )
        reason = f" ({trial.reason})" if trial.status == "failed" else ""
        completed = sum(t.status != "running" for t in self._trials.values())
        return (
            f"[{completed}/{self._spec.trials + self._spec.repeats}] trial {trial.number} {trial.status}{reason}: "
            f"{value}  {params}  {trial.seconds:.0f} s"
        )

    def __rich__(self) -> Group:
        # A copy: rich's refresh thread calls this while the driver's thread adds trials.
        trials = list(self._trials.values())
        ordered = sorted(trials, key=lambda t: -t.score(self._mode))
        evaluated = [(t, best) for t in ordered if (best := t.best_evaluation(self._mode)) is not None]
        table = Table("trial", *(_shorten_key(key) for key in self._spec.space), self._metric, "progress", "", box=None)
        for trial, best in evaluated[:_MAX_BEST]:
            percent = trial.evaluations[-1].progress
            values = (format_param(trial.params.get(key), _MAX_VALUE_CHARS) for key in self._spec.space)
            table.add_row(str(trial.number), *values, f"{best.value:.4f}", f"{percent:.0f} %", trial.status)
        running = "  ".join(
            f"{t.number} ({t.evaluations[-1].progress if t.evaluations else 0:.0f} %)"
            for t in [t for t in trials if t.status == "running"][:_MAX_RUNNING]
        )
        counts = {name: sum(t.status == name for t in trials) for name in ("finished", "pruned", "failed")}
        by_status = ", ".join(f"{count} {name}" for name, count in counts.items())
        seconds = int(time.monotonic() - self._started)
        head = f"{sum(counts.values())} of {self._spec.trials} trials completed: {by_status}"
        return Group(
            Text(f"{head}  {seconds // 60}:{seconds % 60:02d}"), table, Text(f"running: {running or 'starting'}")
        )


def _shorten_key(key: str) -> str:
    for section in ("train.", "task.", "optimizer."):
        key = key.replace(section, "", 1)
    return key
