"""The report of a sweep: which values won, how sure that is, where the compute went. Runs on the client or the head.

Charts: `sweep_charts.py`.
"""

import statistics
from dataclasses import dataclass

from pydantic import JsonValue

from launcher.report import sweep_charts
from launcher.report.collect import without_credentials
from launcher.report.numbers import duration, number
from launcher.report.render import page
from launcher.report.summary import Tile
from launcher.report.sweep_axes import text_of
from launcher.rundir.directory import RunDir, run_at
from launcher.rundir.records import ScoresRecord
from launcher.rundir.trials import SweepRecord, TrialRecord, read_trials

# More trials than this nobody reads on a page, and the page stays small.
_SHOWN = 100
_STATUSES = ("finished", "pruned", "failed", "running")


@dataclass(frozen=True)
class SweepData:
    """All that the report shows."""

    name: str
    location: str
    record: SweepRecord
    trials: tuple[TrialRecord, ...]
    """The searched ones, best first."""
    repeats: tuple[TrialRecord, ...]
    """The best one again, with other seeds."""
    best_job: str
    """As YAML; empty while the sweep goes on."""
    test: ScoresRecord | None

    @property
    def best(self) -> TrialRecord | None:
        """The trial that was exported, or that leads so far."""
        chosen = [t for t in self.trials if t.number == self.record.best]
        return next(iter(chosen or [t for t in self.trials if t.best(self.record.mode)]), None)

    @property
    def noise(self) -> float | None:
        """Standard deviation of the metric over seeds; None with fewer than two."""
        values = [look.value for t in self._same_values if (look := t.best(self.record.mode)) is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def _same_values(self) -> tuple[TrialRecord, ...]:
        repeated = {t.repeat_of for t in self.repeats}
        return (*(t for t in self.trials if t.number in repeated), *self.repeats)

    @property
    def counts(self) -> dict[str, int]:
        """How many trials became what; only what some became."""
        found = {name: sum(t.status == name for t in self.trials) for name in _STATUSES}
        return {name: count for name, count in found.items() if count}

    @property
    def worker_seconds(self) -> float:
        """Worker time of all trials: seconds times workers."""
        return sum(t.seconds * t.workers for t in (*self.trials, *self.repeats))

    @property
    def saved_seconds(self) -> float:
        """Worker time that pruned trials would have gone on to spend at their own pace."""
        saved = 0.0
        for trial in self.trials:
            done = trial.evaluations[-1].progress if trial.evaluations else 0.0
            if trial.status == "pruned" and done:
                saved += trial.seconds * trial.workers * (100 - done) / done
        return saved

    def facts(self) -> dict[str, JsonValue]:
        """The sweep in a few named values, to be laid beside those of others."""
        best, record = self.best, self.record
        look = best.best(record.mode) if best else None
        found: dict[str, JsonValue] = {"search": record.search, "scheduler": record.scheduler}
        found |= {f"best {record.metric}": look.value if look else None}
        if self.test is not None:
            found |= {f"test {record.metric}": self.test.metrics.get(record.metric)}
        found |= {"noise over seeds": self.noise} if self.noise is not None else {}
        found |= {f"best {key}": value for key, value in best.params.items()} if best else {}
        found |= {f"trials {name}": count for name, count in self.counts.items()}
        found |= {"took": duration(record.seconds), "worker time": duration(self.worker_seconds)}
        return found | {"saved by pruning": duration(self.saved_seconds)}


def collect_sweep(run: RunDir) -> SweepData:
    """Read the sweep of a run directory.

    Raises:
        RunError: there is none, or a file of it cannot be read.
    """
    record = run.read_record("sweep/sweep.json", SweepRecord)
    found = read_trials(run)
    job = run.read_bytes("sweep/best.yaml").decode() if run.exists("sweep/best.yaml") else ""
    return SweepData(
        name=run.name,
        location=without_credentials(run.uri),
        record=record,
        trials=tuple(record.ranked(found)),
        repeats=tuple(t for t in found if t.repeat_of is not None),
        best_job=job,
        test=run.find_record("scores-test.json", ScoresRecord),
    )


def find_sweep(location: str) -> RunDir | None:
    """The run at a path or URI if it has a sweep, whether its best model is exported yet or not."""
    run = run_at(location)
    return run if run.exists("sweep/sweep.json") else None


def write_sweep_report(run: RunDir) -> str:
    """Collect, render and publish `sweep/report.html`; returns its path or URI.

    Raises:
        RunError: there is no sweep, or a file of it cannot be read.
    """
    run.write_bytes("sweep/report.html", render_sweep(collect_sweep(run)).encode())
    return run.path("sweep/report.html")


def render_sweep(data: SweepData) -> str:
    """The whole page."""
    charts = sweep_charts.charts(data.record, data.trials)
    return page(
        "sweep.html.j2",
        {f"sweep-{i}": chart for i, chart in enumerate(charts)},
        data=data,
        verdict=verdict(data),
        tiles=tiles(data),
        charts=charts,
        shown=(*data.trials[:_SHOWN], *data.repeats),
        value_text=value_text,
    )


def verdict(data: SweepData) -> str:
    """The sweep in one line."""
    over = sum(t.status != "running" for t in data.trials)
    best = data.best
    look = best.best(data.record.mode) if best else None
    found = f"best {data.record.metric} {number(look.value)} (trial {best.number})" if best and look else "nothing yet"
    stopped = f", stopped: {data.record.stopped}" if data.record.stopped else ""
    return f"{over} of {data.record.trials} trials over, {found}, {duration(data.record.seconds)}{stopped}"


def tiles(data: SweepData) -> tuple[Tile, ...]:
    """The headline numbers, the most important first."""
    record, best = data.record, data.best
    found = []
    look = best.best(record.mode) if best else None
    if best is not None and look is not None:
        found.append(Tile(f"Best {record.metric}", number(look.value), f"validation, trial {best.number}"))
    if data.test is not None and record.metric in data.test.metrics:
        found.append(Tile(f"Test {record.metric}", number(data.test.metrics[record.metric]), "scored once, at the end"))
    if data.noise is not None:
        note = f"standard deviation over {len(data.repeats) + 1} seeds"
        found.append(Tile("Noise", number(data.noise), note))
    found.append(Tile("Trials", f"{len(data.trials):,}", ", ".join(f"{n} {s}" for s, n in data.counts.items())))
    found.append(Tile("Worker time", duration(data.worker_seconds), "all trials together"))
    if data.saved_seconds:
        found.append(Tile("Saved by pruning", duration(data.saved_seconds), "had they all run to their end"))
    gpu_hours = sum(t.seconds * t.gpus for t in (*data.trials, *data.repeats)) / 3600
    if gpu_hours:
        found.append(Tile("GPU hours", f"{gpu_hours:,.2f}"))
    if "failed" in data.counts:
        found.append(Tile("Failed", f"{data.counts['failed']}", "reasons in the table", warns=True))
    return tuple(found)


def value_text(value: JsonValue) -> str:
    """A searched value in a few characters."""
    text = text_of(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"
