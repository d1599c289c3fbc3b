"""The report of a run as one HTML file that works offline. Runs on the client or the head.

All escaping is done in three places: jinja2 escapes page text, `charts.escape_label` what plotly would read as markup,
and `_embed` the JSON block of the figures. In addition, a content security policy lists the page's own two scripts by
hash: no other script runs, and the page loads nothing from anywhere.
Read `compare.py` and `sweep.py` next for the other two pages.
"""

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources

import plotly.offline as plotly_offline  # type: ignore[import-untyped]  # plotly ships no types
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from launcher import formatting
from launcher.report import charts, summary, texts
from launcher.report.charts import Chart
from launcher.report.collect import ReportData, collect, list_missing_parts
from launcher.rundir.directory import RunDir
from launcher.rundir.leakage import leak_sentences, no_leak_sentence
from launcher.rundir.records import ConfusionMatrix, ScoresRecord

_CLIP_CHARS = 300
"""Longer texts are folded."""
_MAX_CHARS = 20_000
"""Maximum length of a folded text on the page: whole books as worst rows would make the page unusable."""
_WORST_SHOWN = 10
_CONFUSIONS_SHOWN = 10
_SMALL_CLASSES = 8


@dataclass(frozen=True)
class Confusion:
    """Number of rows of one class that were predicted as another."""

    true: str
    predicted: str
    count: int
    percent: float
    """Percentage of the rows of the true class."""


@dataclass(frozen=True)
class SplitView:
    """One scored split as the page shows it."""

    scores: ScoresRecord
    metric_names: tuple[str, ...]
    baseline_name: str
    confusion: Chart | None
    is_small_confusion: bool
    """True if the matrix fits next to the metrics."""
    histogram: Chart | None
    confusions: tuple[Confusion, ...]
    """Largest confusions. Empty for two classes, where the matrix shows them."""


def write_report(run: RunDir) -> str:
    """Collect, render and publish `report.html`.

    Args:
        run: Run directory, at any stage of the run.

    Returns:
        Path or URI of the report.

    Raises:
        RunError: The directory has no job.yaml, or one of its files is invalid.
    """
    # Atomic, so a reader sees a whole page. Not durable: it can be written again from the run.
    run.write_bytes("report.html", render_report(collect(run)).encode())
    return run.path("report.html")


def render_report(data: ReportData) -> str:
    """Return the page as HTML."""
    time_chart = charts.make_time_chart(data.times)
    curves = charts.make_curve_charts(data) + ((time_chart,) if time_chart is not None else ())
    splits = tuple(_make_split_view(data, record) for record in data.scores)
    figures = {f"curve-{index}": chart for index, chart in enumerate(curves)}
    figures |= {f"confusion-{i}": view.confusion for i, view in enumerate(splits) if view.confusion is not None}
    figures |= {f"histogram-{i}": view.histogram for i, view in enumerate(splits) if view.histogram is not None}
    return render_page(
        "report.html.j2",
        figures,
        data=data,
        summary=summary.summarize(data),
        tiles=summary.make_tiles(data),
        missing=list_missing_parts(data),
        leaks=leak_sentences(data.leakage) if data.leakage is not None else (),
        no_leaks=no_leak_sentence(data.leakage) if data.leakage is not None else "",
        curves=curves,
        splits=splits,
        histories=texts.group_by_row(data.generations),
        worst_shown=_WORST_SHOWN,
        clip_chars=_CLIP_CHARS,
        max_chars=_MAX_CHARS,
    )


def render_page(template: str, figures: dict[str, Chart], **content: object) -> str:
    """Render a page that works offline.

    Args:
        template: Name of its file in `templates/`.
        figures: Charts by the key that the template passes to `plot`.
        content: Variables of the template.
    """
    script = _read_asset("report.js")
    # plotly.js weighs 4.8 MB (plotly for Python ships no smaller bundle), so a page without charts leaves it out.
    plotly_js = plotly_offline.get_plotlyjs() if figures else ""
    # Trap: a hash is of the exact text between the tags. White space around a script in `page.html.j2` would stop it
    # from running, and the charts would be missing without an error.
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash_script(plotly_js)} {_hash_script(script)}"
    )
    return (
        _make_environment()
        .get_template(template)
        .render(
            policy=policy,
            # Trusted, like the two scripts: all three come from packages, not from the run.
            style=Markup(_read_asset("report.css")),
            script=Markup(script),
            plotly_js=Markup(plotly_js),
            figures=_embed(figures),
            **content,
        )
    )


def _make_split_view(data: ReportData, record: ScoresRecord) -> SplitView:
    matrix = record.confusion
    # The sort is stable: all but the main metric keep their order.
    names = sorted(record.metrics, key=lambda name: name != data.main_metric)
    return SplitView(
        scores=record,
        metric_names=tuple(names),
        baseline_name=summary.baseline_name(record),
        confusion=charts.make_confusion_chart(matrix) if matrix is not None else None,
        is_small_confusion=matrix is not None and len(matrix.labels) <= _SMALL_CLASSES,
        histogram=charts.make_histogram_chart(record.histogram) if record.histogram is not None else None,
        confusions=_largest_confusions(matrix) if matrix is not None else (),
    )


def _largest_confusions(matrix: ConfusionMatrix) -> tuple[Confusion, ...]:
    if len(matrix.labels) <= 2:
        return ()
    confusions = [
        # No division by 0: a cell with a count is part of its row.
        Confusion(matrix.labels[true], matrix.labels[predicted], count, 100 * count / sum(row))
        for true, row in enumerate(matrix.counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    return tuple(sorted(confusions, key=lambda pair: -pair.count)[:_CONFUSIONS_SHOWN])


def _mask(value: object) -> object:
    # `type(...) is str`: a Markup is a str as well, and masking it would escape it a second time.
    return formatting.mask_secrets(value) if type(value) is str else value


def _make_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("launcher.report"),
        autoescape=True,
        # A misspelt variable raises instead of leaving a gap on the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Reports are passed on, and a URI like `s3://key:secret@bucket` has credentials in it. Trap: a Markup passes
        # unmasked, so texts in figures must be free of them before.
        finalize=_mask,
    )
    environment.filters |= {
        "number": formatting.format_number,
        "size": formatting.format_size,
        "clock": formatting.format_time,
        "param": formatting.format_param,
        "clip": formatting.clip,
        "pieces": texts.split_row,
    }
    return environment


def _read_asset(name: str) -> str:
    return (resources.files("launcher.report") / "templates" / name).read_text(encoding="utf-8")


def _embed(figures: dict[str, Chart]) -> Markup:
    """Return the figures as one JSON object without any character that could end the script element around it."""
    items = ",".join(f'"{key}":{chart.json}' for key, chart in figures.items())
    # Escapes of JSON strings: these characters occur in nothing else of JSON, so the values stay the same.
    safe = items.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup("{" + safe + "}")


def _hash_script(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
