"""The comparison of several runs on one page: curves, final metrics and differences. Runs on the client or the head.

Read `compare_charts.py` next for the charts, and `curves_match.py` for the step-by-step comparison of two curves.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.errors import RunError
from launcher.formatting import format_duration, format_number, format_rounded, format_size, mask_secrets
from launcher.report.collect import ReportData, collect
from launcher.report.compare_charts import colour_of_run, make_comparison_charts
from launcher.report.curves_match import compare_curves
from launcher.report.render import render_page
from launcher.rundir.directory import RunDir
from launcher.rundir.uri import describe_os_error
from launcher.spec.curve import curve_values, job_values

MARK = b'<meta name="generator" content="launcher compare">'
"""Mark of a comparison page. Only a file that has it is overwritten."""
# The mark is the second line of the head (`page.html.j2`), so the start of a page of megabytes is enough.
_HEAD_BYTES = 4096
# Lower is better for these. For the metric that a plan names, the plan says so.
_LOWER_IS_BETTER = ("loss", "perplexity", "mse", "rmse", "mae")


@dataclass(frozen=True)
class Row:
    """One line of a table that has a column per run.

    Args:
        name: Name of the line.
        values: Texts, one per run; "" for a run without a value.
        best: Indices of the runs with the best value. Empty if there is no best.
        note: Remark on the line.
    """

    name: str
    values: tuple[str, ...]
    best: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The content of a comparison page.

    Args:
        runs: Data of each run.
        names: Name of each run, all different.
    """

    runs: tuple[ReportData, ...]
    names: tuple[str, ...]

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Reasons why the numbers of the runs may not be comparable."""
        sentences = []
        tasks = dict.fromkeys(data.job.task.type for data in self.runs)
        if len(tasks) > 1:
            sentences.append(
                f"The runs have different tasks ({', '.join(tasks)}): their losses and metrics cannot be compared."
            )
        fingerprints = {_plan_value(data, "fingerprint") for data in self.runs}
        if len(fingerprints) > 1:
            sentences.append("The runs were trained on different data.")
        if len({data.job.data.locations("validation") for data in self.runs}) > 1:
            sentences.append("The runs were validated on different data.")
        unfinished = [name for name, data in zip(self.names, self.runs, strict=True) if data.result is None]
        if unfinished:
            sentences.append(f"Not finished: {', '.join(unfinished)}.")
        return tuple(sentences)

    @cached_property
    def metrics(self) -> tuple[Row, ...]:
        """Final scores, the test data first. A run without scores shows its best evaluation."""
        values: dict[str, dict[int, float]] = {}
        for index, data in enumerate(self.runs):
            best = data.best_evaluation
            fallback = (best,) if best is not None else ()
            for record in data.scores or fallback:
                for name, value in {**record.metrics, "loss": record.loss}.items():
                    values.setdefault(f"{record.split} {name}", {})[index] = value
        # The sort is stable: within a split the metrics keep the order of the task.
        names = sorted(values, key=lambda name: (not name.startswith("test "), not name.startswith("validation ")))
        return tuple(self._make_metric_row(name, values[name]) for name in names)

    @cached_property
    def facts(self) -> tuple[Row, ...]:
        """Settings and costs of each run."""
        facts: dict[str, Callable[[ReportData], str]] = {
            "task": lambda data: data.job.task.type,
            "model": _model_name,
            "steps": lambda data: f"{data.steps_done:,}" + ("" if data.result else " so far"),
            "best step": lambda data: f"{data.best_evaluation.step:,}" if data.best_evaluation else "",
            # A median, so that a few slow steps do not count. It raises for no steps, but `compare` refuses such runs.
            "rows per second": lambda d: format_rounded(statistics.median(line.samples_per_s for line in d.steps)),
            "training time": lambda data: format_duration(data.elapsed_s),
            "workers": lambda data: f"{data.job.cluster.workers}, ZeRO-{data.job.zero_stage}",
            "memory per worker": _peak_memory,
            "skipped rows": lambda data: f"{data.steps[-1].skipped_rows:,}",
        }
        rows = (Row(name, tuple(describe(data) for data in self.runs)) for name, describe in facts.items())
        return tuple(row for row in rows if any(row.values))

    @cached_property
    def job_differences(self) -> tuple[Row, ...]:
        """Job file keys whose values differ. The note is "yes" if the key changes the curve, else "no"."""
        curve = [curve_values(data.job) for data in self.runs]
        return tuple(
            Row(row.name, row.values, note="yes" if any(row.name in values for values in curve) else "no")
            for row in _differing_rows([job_values(data.job) for data in self.runs])
        )

    @cached_property
    def environment_differences(self) -> tuple[Row, ...]:
        """Versions and machines that differ."""
        return _differing_rows([_environment_values(data) for data in self.runs])

    @cached_property
    def agreement(self) -> tuple[str, ...]:
        """Sentences on whether two runs have the same curve. Empty if there are more runs, or the jobs differ in it."""
        # Other curve settings are expected to give other curves: comparing them step by step would say nothing.
        if len(self.runs) != 2 or any(row.note == "yes" for row in self.job_differences):
            return ()
        return compare_curves(*self.runs).sentences

    def _make_metric_row(self, name: str, values: dict[int, float]) -> Row:
        metric = name.split(" ", 1)[1]
        # A plan names the direction of one metric only; the list covers those of the built-in tasks.
        lower_is_better = metric in _LOWER_IS_BETTER or any(
            _plan_value(data, "metric") == metric and _plan_value(data, "metric_mode") == "min" for data in self.runs
        )
        best_value = (min if lower_is_better else max)(values.values())
        # Neither a single run nor runs with equal values have a best one.
        has_best = len(set(values.values())) > 1
        # Compared unrounded: two runs that show the same digits may still differ.
        best = tuple(i for i, value in values.items() if value == best_value) if has_best else ()
        texts = tuple(format_number(values[i]) if i in values else "" for i in range(len(self.runs)))
        return Row(name, texts, best, "lower is better" if lower_is_better else "")


def compare(runs: Sequence[RunDir]) -> Comparison:
    """Read several runs.

    Raises:
        RunError: A run is listed twice, has no metrics yet, or cannot be read.
    """
    uris = [run.uri.rstrip("/") for run in runs]
    twice = next((uri for uri in uris if uris.count(uri) > 1), None)
    if twice is not None:
        raise RunError(f"{twice}: is listed twice; give different runs")
    collected = tuple(collect(run) for run in runs)
    for run, data in zip(runs, collected, strict=True):
        if not data.steps:
            raise RunError(f"{run.uri}: has no metrics yet (metrics.jsonl); train it for some steps first")
    return Comparison(collected, _shorten_names(uris))


def render_comparison(comparison: Comparison) -> str:
    """Return the page as HTML."""
    charts = make_comparison_charts(comparison.names, comparison.runs)
    return render_page(
        "compare.html.j2",
        {f"compare-{i}": chart for i, chart in enumerate(charts)},
        mark=MARK.decode(),
        comparison=comparison,
        colours=[colour_of_run(index) for index in range(len(comparison.runs))],
        charts=charts,
    )


def write_comparison(comparison: Comparison, output: Path) -> Path:
    """Write the page atomically: readers see the old page or the new one.

    Raises:
        RunError: The path holds another kind of file, or cannot be written.
    """
    output = check_output_path(output)
    # In the same directory, as a rename works within one file system; with the process in its name, as two commands may
    # write at once.
    staged = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(render_comparison(comparison), encoding="utf-8")
        os.replace(staged, output)
    except OSError as error:
        raise RunError(
            f"--output: {output} cannot be written ({describe_os_error(error)}); give a path that can be"
        ) from error
    finally:
        # Not there after the rename, or after a failure before it existed.
        with suppress(OSError):
            staged.unlink()
    return output


def check_output_path(output: Path) -> Path:
    """Return the absolute path of a page after checking that it may be written.

    Raises:
        RunError: The path holds another kind of file, or cannot be read.
    """
    output = Path(os.path.abspath(output.expanduser()))
    try:
        if output.exists() and not _is_comparison(output):
            raise RunError(f"--output: {output} is not a comparison page and would be overwritten; give another file")
    except OSError as error:
        raise RunError(f"--output: {output} cannot be read ({describe_os_error(error)}); give another file") from error
    return output


def _is_comparison(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return MARK in stream.read(_HEAD_BYTES)


def _shorten_names(uris: Sequence[str]) -> tuple[str, ...]:
    """Return as many of the last parts of each path as are needed to tell the runs apart."""
    # Masked while they are whole: without its "://" a key is not recognised as one.
    parts = [mask_secrets(uri).split("/") for uri in uris]
    # Ends before the last line unless two runs have one URI, which `compare` refuses.
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(map(mask_secrets, uris))


def _differing_rows(values: Sequence[dict[str, str]]) -> tuple[Row, ...]:
    """Return a row for each key whose value is not the same in all runs."""
    # An ordered set: keys of all runs, in the order of the first job that has them.
    keys = dict.fromkeys(key for of_run in values for key in of_run)
    rows = (Row(key, tuple(of_run.get(key, "") for of_run in values)) for key in keys)
    return tuple(row for row in rows if len(set(row.values)) > 1)


def _environment_values(data: ReportData) -> dict[str, str]:
    environment = data.environment
    if environment is None:
        return {}
    return {
        **environment.packages,
        "Python": environment.python,
        "platform": environment.platform,
        "git commit": environment.git_commit or "none",
        "hosts": ", ".join(dict.fromkeys(worker.host for worker in environment.workers)),
        "devices": ", ".join(dict.fromkeys(worker.device for worker in environment.workers)),
    }


def _plan_value(data: ReportData, key: str) -> str:
    return dict(data.plan).get(key, "")


def _model_name(data: ReportData) -> str:
    name = data.job.model.name
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith("/") else name


def _peak_memory(data: ReportData) -> str:
    workers = data.environment.workers if data.environment is not None else ()
    return format_size(max(worker.peak_memory_bytes for worker in workers)) if workers else ""
