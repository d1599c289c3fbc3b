"""Several runs on one page: curves on each other, final metrics, what differs. Runs on the client or the head.

Charts: `compare_charts.py`; whether two curves are the same: `curves_match.py`.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.errors import RunError
from launcher.report import compare_charts
from launcher.report.collect import ReportData, collect
from launcher.report.compare_charts import colour
from launcher.report.curves_match import agreement
from launcher.report.numbers import duration, number, short, size
from launcher.report.render import page
from launcher.rundir.directory import RunDir
from launcher.rundir.uri import describe_os_error
from launcher.spec.curve import curve_values, job_values

MARK = b'<meta name="generator" content="launcher compare">'
"""By this a file is known as a comparison page, which may be overwritten."""
_HEAD_BYTES = 4096
# Of these less is better; of the metric that a plan names, the plan says.
_LESS = ("loss", "perplexity", "mse", "rmse", "mae")


@dataclass(frozen=True)
class Row:
    """One line of a table with a column per run.

    Args:
        name: of the line.
        values: as text, one per run; "" where a run has none.
        best: indices of the runs with the best value, where that can be said.
        note: what is worth knowing of the line.
    """

    name: str
    values: tuple[str, ...]
    best: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """What a page of several runs shows."""

    runs: tuple[ReportData, ...]
    names: tuple[str, ...]
    """One per run, each different."""

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Why the runs' numbers may not measure the same."""
        said = []
        if len(tasks := dict.fromkeys(data.job.task.type for data in self.runs)) > 1:
            said.append(f"The runs learn different tasks ({', '.join(tasks)}): their losses and metrics are not alike.")
        for what, values in (("trained", self._plans("fingerprint")), ("validated", self._locations("validation"))):
            if len(dict.fromkeys(values)) > 1:
                said.append(f"The runs were {what} on different data.")
        unfinished = [name for name, data in zip(self.names, self.runs, strict=True) if data.result is None]
        if unfinished:
            said.append(f"Not finished: {', '.join(unfinished)}.")
        return tuple(said)

    @cached_property
    def metrics(self) -> tuple[Row, ...]:
        """Final scores, the test data first, then the last evaluation of runs that have no scores yet."""
        found: dict[str, list[tuple[int, float]]] = {}
        for index, data in enumerate(self.runs):
            for scores in data.scores:
                for name, value in {**scores.metrics, "loss": scores.loss}.items():
                    found.setdefault(f"{scores.split} {name}", []).append((index, value))
            if data.best is not None and not data.scores:
                for name, value in {**data.best.metrics, "loss": data.best.loss}.items():
                    found.setdefault(f"validation {name}", []).append((index, value))
        names = sorted(found, key=lambda name: (not name.startswith("test "), not name.startswith("validation ")))
        return tuple(self._metric_row(name, dict(found[name])) for name in names)

    @cached_property
    def facts(self) -> tuple[Row, ...]:
        """What each run is and what it took."""
        ways: dict[str, Callable[[ReportData], str]] = {
            "task": lambda data: data.job.task.type,
            "model": lambda data: _model(data),
            "steps": lambda data: f"{data.steps_done:,}" + ("" if data.result else " so far"),
            "best step": lambda data: f"{data.best.step:,}" if data.best else "",
            "rows per second": lambda data: short(statistics.median(line.samples_per_s for line in data.steps)),
            "training time": lambda data: duration(_elapsed_s(data)),
            "workers": lambda data: f"{data.job.cluster.workers}, ZeRO-{data.job.zero_stage}",
            "memory per worker": lambda data: _memory(data),
            "skipped rows": lambda data: f"{data.steps[-1].skipped_rows:,}",
        }
        rows = (Row(name, tuple(way(data) for data in self.runs)) for name, way in ways.items())
        return tuple(row for row in rows if any(row.values))

    @cached_property
    def job_differences(self) -> tuple[Row, ...]:
        """Keys of the job files whose values differ; the note says whether they change the curve."""
        values = [job_values(data.job) for data in self.runs]
        curve = [curve_values(data.job) for data in self.runs]
        rows = _differing(values)
        return tuple(
            Row(row.name, row.values, note="yes" if any(row.name in known for known in curve) else "no") for row in rows
        )

    @cached_property
    def environment_differences(self) -> tuple[Row, ...]:
        """Versions and machines that differ."""
        return _differing([_environment(data) for data in self.runs])

    @cached_property
    def agreement(self) -> tuple[str, ...]:
        """Whether the curves of two runs are the same; empty for more, or where their curves are not meant to be."""
        if len(self.runs) != 2 or any(row.note == "yes" for row in self.job_differences):
            return ()
        return agreement(*self.runs).sentences

    def _metric_row(self, name: str, values: dict[int, float]) -> Row:
        metric = name.split(" ", 1)[1]
        less = metric in _LESS or any(
            self._plan(data, "metric") == metric and self._plan(data, "metric_mode") == "min" for data in self.runs
        )
        best = (min if less else max)(values.values())
        # A single run has no best, and neither have runs that are all the same.
        first = tuple(i for i, value in values.items() if value == best) if len(set(values.values())) > 1 else ()
        texts = tuple(number(values[i]) if i in values else "" for i in range(len(self.runs)))
        return Row(name, texts, first, "less is better" if less else "")

    def _plans(self, key: str) -> list[str]:
        return [self._plan(data, key) for data in self.runs]

    def _locations(self, split: str) -> list[object]:
        return [getattr(data.job.data, split) for data in self.runs]

    @staticmethod
    def _plan(data: ReportData, key: str) -> str:
        return dict(data.plan).get(key, "")


def compare(runs: Sequence[RunDir]) -> Comparison:
    """Read several runs.

    Raises:
        RunError: one of them has no metrics yet, is given twice, or cannot be read.
    """
    places = [run.uri.rstrip("/") for run in runs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise RunError(f"{twice}: is given twice; give different runs")
    found = tuple(collect(run) for run in runs)
    for run, data in zip(runs, found, strict=True):
        if not data.steps:
            raise RunError(f"{run.uri}: has no metrics yet (metrics.jsonl); let it train for some steps first")
    return Comparison(found, _names(places))


def render_comparison(comparison: Comparison) -> str:
    """The whole page."""
    charts = compare_charts.charts(comparison.names, comparison.runs)
    return page(
        "compare.html.j2",
        {f"compare-{i}": chart for i, chart in enumerate(charts)},
        mark=MARK.decode(),
        comparison=comparison,
        colours=[colour(index) for index in range(len(comparison.runs))],
        charts=charts,
    )


def write_comparison(comparison: Comparison, output: Path) -> Path:
    """Write the page at once: readers see an old page or the new one.

    Raises:
        RunError: another kind of file is there, or the place cannot be written.
    """
    output = check_page(output)
    staged = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(render_comparison(comparison), encoding="utf-8")
        os.replace(staged, output)
    except OSError as error:
        raise RunError(
            f"--output: {output} cannot be written ({describe_os_error(error)}); give a file that can be"
        ) from error
    finally:
        with suppress(OSError):  # it was moved, or never came to be
            staged.unlink()
    return output


def check_page(output: Path) -> Path:
    """Where a page is to be written, made absolute.

    Raises:
        RunError: another kind of file is there, or the place cannot be read.
    """
    output = Path(os.path.abspath(output.expanduser()))
    try:
        if output.exists() and not _is_comparison(output):
            raise RunError(f"--output: {output} is no comparison page and would be lost; give another file")
    except OSError as error:
        raise RunError(f"--output: {output} cannot be read ({describe_os_error(error)}); give another file") from error
    return output


def _is_comparison(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return MARK in stream.read(_HEAD_BYTES)


def _names(places: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [place.split("/") for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(places)


def _differing(values: Sequence[dict[str, str]]) -> tuple[Row, ...]:
    """The keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for known in values for key in known)
    rows = (Row(key, tuple(known.get(key, "") for known in values)) for key in keys)
    return tuple(row for row in rows if len(set(row.values)) > 1)


def _environment(data: ReportData) -> dict[str, str]:
    found = data.environment
    if found is None:
        return {}
    commit = {"git commit": found.git_commit or "none"}
    devices = {"devices": ", ".join(dict.fromkeys(worker.device for worker in found.workers))}
    hosts = {"hosts": ", ".join(dict.fromkeys(worker.host for worker in found.workers))}
    return {**found.packages, "Python": found.python, "platform": found.platform, **commit, **hosts, **devices}


def _model(data: ReportData) -> str:
    name = data.job.model.name
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith("/") else name


def _memory(data: ReportData) -> str:
    workers = data.environment.workers if data.environment is not None else ()
    return size(max(worker.peak_memory_bytes for worker in workers)) if workers else ""


def _elapsed_s(data: ReportData) -> float:
    return data.result.elapsed_s if data.result is not None else data.steps[-1].elapsed_s
