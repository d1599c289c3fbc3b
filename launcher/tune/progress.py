"""What a person sees while a sweep goes on: a table that stays readable at any number of trials. Runs on the head."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import JsonValue
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.rundir.trials import TrialRecord
from launcher.spec.tune import TuneSpec

_BEST_SHOWN, _RUNNING_SHOWN = 8, 8
_SHORT = {"train.": "", "task.": "", "optimizer.": ""}


@contextmanager
def watch_sweep(spec: TuneSpec, metric: str, mode: str, console: Console) -> Iterator["_View"]:
    """Show trials until the block ends; yields the listener to tell of each change."""
    view = _View(spec, metric, mode, console)
    if not console.is_terminal:
        yield view
        return
    with Live(view, console=console, refresh_per_second=2, transient=True):
        yield view


class _View:
    """The best trials so far, those at work, and the counts; a line per trial where there is no terminal."""

    def __init__(self, spec: TuneSpec, metric: str, mode: str, console: Console) -> None:
        self._spec, self._metric, self._mode, self._console = spec, metric, mode, console
        self._trials: dict[int, TrialRecord] = {}
        self._started = time.monotonic()

    def __call__(self, trial: TrialRecord) -> None:
        before = self._trials.get(trial.number)
        self._trials[trial.number] = trial
        if self._console.is_terminal or trial.status == "running" or (before and before.status == trial.status):
            return
        self._console.print(self._line(trial), highlight=False, soft_wrap=True)

    def _line(self, trial: TrialRecord) -> str:
        best = trial.best(self._mode)
        value = f"{self._metric} {best.value:.4f}" if best else "nothing measured"
        values = "  ".join(f"{_short(key)} {value_text(v)}" for key, v in trial.params.items())
        reason = f" ({trial.reason})" if trial.status == "failed" else ""
        over = sum(t.status != "running" for t in self._trials.values())
        return (
            f"[{over}/{self._spec.trials + self._spec.repeats}] trial {trial.number} {trial.status}{reason}: {value}  "
            f"{values}  {trial.seconds:.0f} s"
        )

    def __rich__(self) -> Group:
        trials = list(self._trials.values())
        ordered = sorted(trials, key=lambda t: -t.score(self._mode))
        seen = [(t, best) for t in ordered if (best := t.best(self._mode)) is not None]
        table = Table("trial", *(_short(key) for key in self._spec.space), self._metric, "progress", "", box=None)
        for trial, best in seen[:_BEST_SHOWN]:
            done = trial.evaluations[-1].progress
            values = (value_text(trial.params.get(key)) for key in self._spec.space)
            table.add_row(str(trial.number), *values, f"{best.value:.4f}", f"{done:.0f} %", trial.status)
        working = [t for t in trials if t.status == "running"][:_RUNNING_SHOWN]
        at_work = "  ".join(f"{t.number} ({t.evaluations[-1].progress if t.evaluations else 0:.0f} %)" for t in working)
        counts = {name: sum(t.status == name for t in trials) for name in ("finished", "pruned", "failed")}
        seconds = int(time.monotonic() - self._started)
        head = f"{sum(counts.values())} of {self._spec.trials} trials over: " + ", ".join(
            f"{count} {name}" for name, count in counts.items()
        )
        return Group(
            Text(f"{head}  {seconds // 60}:{seconds % 60:02d}"), table, Text(f"at work: {at_work or 'starting'}")
        )


def _short(key: str) -> str:
    for prefix, instead in _SHORT.items():
        key = key.replace(prefix, instead, 1)
    return key


def value_text(value: JsonValue) -> str:
    """A searched value in a few characters."""
    if isinstance(value, float):
        return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e4) else f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 24 else f"...{text[-21:]}"
