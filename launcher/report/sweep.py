"""The report of a sweep: the best values, their noise, and the compute spent. Runs on the client or the head.

Read `sweep_charts.py` next for the charts.
"""

import statistics
from dataclasses import dataclass

from pydantic import JsonValue

from launcher.formatting import format_duration, format_number
from launcher.report.render import render_page
from launcher.report.summary import Tile
from launcher.report.sweep_charts import make_sweep_charts
from launcher.rundir.directory import RunDir, run_at
from launcher.rundir.records import ScoresRecord
from launcher.rundir.trials import SweepRecord, TrialEvaluation, TrialRecord, read_trials
from launcher.rundir.uri import redact_uri

_MAX_ROWS = 100
"""Maximum trials in the table: more make the page large, and trials.csv has all of them."""
_STATUSES = ("finished", "pruned", "failed", "running")


@dataclass(frozen=True)
class SweepData:
    """Everything that the report shows."""

    name: str
    location: str
    """Path or URI of the run directory, without credentials."""
    record: SweepRecord
    trials: tuple[TrialRecord, ...]
    """Searched trials, the best first."""
    repeats: tuple[TrialRecord, ...]
    """Repetitions of the best trial with other seeds."""
    best_job: str
    """Job file of the best trial as YAML. Empty until the sweep is complete."""
    test: ScoresRecord | None

    @property
    def best(self) -> tuple[TrialRecord, TrialEvaluation] | None:
        """Exported trial, or the best one so far, with its best evaluation."""
        chosen = [trial for trial in self.trials if trial.number == self.record.best]
        # `record.best` is None until the sweep is finished; until then the ranking counts.
        for trial in chosen or self.trials:
            evaluation = trial.best_evaluation(self.record.mode)
            if evaluation is not None:
                return trial, evaluation
        return None

    @property
    def seed_std(self) -> float | None:
        """Standard deviation of the metric over seeds, or None with fewer than two."""
        repeated = {trial.repeat_of for trial in self.repeats}
        # The repeated trial is one of the seeds.
        same_params = (*(trial for trial in self.trials if trial.number in repeated), *self.repeats)
        evaluations = [trial.best_evaluation(self.record.mode) for trial in same_params]
        values = [evaluation.value for evaluation in evaluations if evaluation is not None]
        # Of a sample (n - 1): few seeds stand for all.
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def counts(self) -> dict[str, int]:
        """Number of trials by status, without statuses that no trial has."""
        counts = {name: sum(trial.status == name for trial in self.trials) for name in _STATUSES}
        return {name: count for name, count in counts.items() if count}

    @property
    def worker_seconds(self) -> float:
        """Worker time of all trials: seconds times workers."""
        return sum(trial.seconds * trial.workers for trial in (*self.trials, *self.repeats))

    @property
    def saved_seconds(self) -> float:
        """Worker time that the pruned trials would have needed to finish at their own speed."""
        saved = 0.0
        for trial in self.trials:
            percent = trial.evaluations[-1].progress if trial.evaluations else 0.0
            if trial.status == "pruned" and percent:
                # An estimate: start-up is counted as if it recurred, so it is high for trials pruned early.
                saved += trial.seconds * trial.workers * (100 - percent) / percent
        return saved

    def facts(self) -> dict[str, JsonValue]:
        """Return the sweep as named values, for a table of several sweeps."""
        record = self.record
        facts: dict[str, JsonValue] = {"search": record.search, "scheduler": record.scheduler}
        facts[f"best {record.metric}"] = self.best[1].value if self.best else None
        if self.test is not None:
            facts[f"test {record.metric}"] = self.test.metrics.get(record.metric)
        if self.seed_std is not None:
            facts["standard deviation over seeds"] = self.seed_std
        if self.best:
            facts |= {f"best {key}": value for key, value in self.best[0].params.items()}
        facts |= {f"trials {name}": count for name, count in self.counts.items()}
        facts |= {"duration": format_duration(record.seconds), "worker time": format_duration(self.worker_seconds)}
        return facts | {"saved by pruning": format_duration(self.saved_seconds)}


def collect_sweep(run: RunDir) -> SweepData:
    """Read the sweep of a run directory.

    Raises:
        RunError: The directory has no sweep, or one of its files is invalid.
    """
    record = run.read_record("sweep/sweep.json", SweepRecord)
    trials = read_trials(run)
    return SweepData(
        name=run.name,
        location=redact_uri(run.uri),
        record=record,
        trials=tuple(record.rank_trials(trials)),
        repeats=tuple(trial for trial in trials if trial.repeat_of is not None),
        # Asked for first: a sweep that is running has none yet.
        best_job=run.read_bytes("sweep/best.yaml").decode() if run.exists("sweep/best.yaml") else "",
        test=run.find_record("scores-test.json", ScoresRecord),
    )


def find_sweep(location: str) -> RunDir | None:
    """Return the run at a path or URI if it has a sweep, finished or not, else None."""
    run = run_at(location)
    return run if run.exists("sweep/sweep.json") else None


def write_sweep_report(run: RunDir) -> str:
    """Collect, render and publish `sweep/report.html`, and return its path or URI.

    Raises:
        RunError: The directory has no sweep, or one of its files is invalid.
    """
    run.write_bytes("sweep/report.html", render_sweep(collect_sweep(run)).encode())
    return run.path("sweep/report.html")


def render_sweep(data: SweepData) -> str:
    """Return the page as HTML."""
    charts = make_sweep_charts(data.record, data.trials)
    return render_page(
        "sweep.html.j2",
        {f"sweep-{i}": chart for i, chart in enumerate(charts)},
        data=data,
        summary=summarize_sweep(data),
        tiles=make_sweep_tiles(data),
        charts=charts,
        # The best first, so a long table loses the worst.
        shown=(*data.trials[:_MAX_ROWS], *data.repeats),
    )


def summarize_sweep(data: SweepData) -> str:
    """Return the sweep in one line."""
    completed = sum(trial.status != "running" for trial in data.trials)
    best = "no evaluation yet"
    if data.best:
        trial, evaluation = data.best
        best = f"best {data.record.metric} {format_number(evaluation.value)} (trial {trial.number})"
    stopped = f", stopped: {data.record.stopped}" if data.record.stopped else ""
    time = format_duration(data.record.seconds)
    return f"{completed} of {data.record.trials} trials completed, {best}, {time}{stopped}"


def make_sweep_tiles(data: SweepData) -> tuple[Tile, ...]:
    """Return the headline numbers, the most important first."""
    metric = data.record.metric
    tiles = []
    if data.best:
        trial, evaluation = data.best
        tiles.append(Tile(f"Best {metric}", format_number(evaluation.value), f"validation, trial {trial.number}"))
    if data.test is not None and metric in data.test.metrics:
        tiles.append(Tile(f"Test {metric}", format_number(data.test.metrics[metric]), "scored once, at the end"))
    if data.seed_std is not None:
        note = f"standard deviation over {len(data.repeats) + 1} seeds"
        tiles.append(Tile("Noise", format_number(data.seed_std), note))
    note = ", ".join(f"{count} {status}" for status, count in data.counts.items())
    tiles.append(Tile("Trials", f"{len(data.trials):,}", note))
    tiles.append(Tile("Worker time", format_duration(data.worker_seconds), "all trials together"))
    if data.saved_seconds:
        tiles.append(Tile("Saved by pruning", format_duration(data.saved_seconds), "compared with running all trials"))
    gpu_hours = sum(trial.seconds * trial.gpus for trial in (*data.trials, *data.repeats)) / 3600
    if gpu_hours:
        tiles.append(Tile("GPU hours", f"{gpu_hours:,.2f}"))
    if "failed" in data.counts:
        tiles.append(Tile("Failed", f"{data.counts['failed']}", "see the table for reasons", is_warning=True))
    return tuple(tiles)
