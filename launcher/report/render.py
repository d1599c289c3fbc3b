"""The report of a run as one HTML file that needs no network. Runs on the client or the head.

Escaping has three doors, all here: jinja2 escapes what stands in the page, `charts.py` what plotly would read as
markup, `_embed` what stands inside the data block. A content security policy that lists the page's own two scripts
by hash stands behind them: no other script runs, and nothing is loaded from anywhere.
"""

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources

import plotly.offline as plotly_offline  # type: ignore[import-untyped]  # plotly ships no types
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from launcher.formatting import mask_secrets
from launcher.report import charts, numbers, summary, texts
from launcher.report.charts import Chart
from launcher.report.collect import ReportData, collect, missing
from launcher.report.times import time_chart
from launcher.rundir.directory import RunDir
from launcher.rundir.leakage import clean_sentence, leak_sentences
from launcher.rundir.records import ConfusionMatrix, ScoresRecord

_CLIP_CHARS = 300
"""Texts longer than this are folded."""
_MAX_CHARS = 20_000
"""Of a folded text, so much is in the page: a few books as worst rows must not make it unreadable."""
_WORST_SHOWN = 10
_CONFUSIONS_SHOWN = 10
_SMALL_CLASSES = 8


@dataclass(frozen=True)
class Confusion:
    """Rows of one class that were taken for another."""

    true: str
    predicted: str
    count: int
    percent: float
    """Of the rows of the true class."""


@dataclass(frozen=True)
class SplitView:
    """One scored split as the page shows it."""

    scores: ScoresRecord
    metric_names: tuple[str, ...]
    baseline_word: str
    confusion: Chart | None
    small_confusion: bool
    """Whether the matrix fits beside the metrics."""
    confusions: tuple[Confusion, ...]
    """The largest, for more than two classes."""


def write_report(run: RunDir) -> str:
    """Collect, render and publish `report.html`.

    Args:
        run: the run's directory, whatever stage it is in.

    Returns:
        Path or URI of the report.

    Raises:
        RunError: there is no job.yaml, or a file that is there cannot be read.
    """
    run.write_bytes("report.html", render(collect(run)).encode())
    return run.path("report.html")


def render(data: ReportData) -> str:
    """The whole page."""
    where = time_chart(data.times)
    curves = charts.curves(data) + ((where,) if where is not None else ())
    splits = tuple(_split_view(data, record) for record in data.scores)
    figures = {f"curve-{index}": chart for index, chart in enumerate(curves)}
    figures |= {f"confusion-{i}": view.confusion for i, view in enumerate(splits) if view.confusion is not None}
    return page(
        "report.html.j2",
        figures,
        data=data,
        verdict=summary.verdict(data),
        tiles=summary.tiles(data),
        missing=missing(data),
        leaks=leak_sentences(data.leakage) if data.leakage is not None else (),
        no_leaks=clean_sentence(data.leakage) if data.leakage is not None else "",
        curves=curves,
        splits=splits,
        writings=texts.writings(data.generations),
        worst_shown=_WORST_SHOWN,
        clip_chars=_CLIP_CHARS,
        max_chars=_MAX_CHARS,
    )


def page(template: str, figures: dict[str, Chart], **content: object) -> str:
    """A page that needs no network.

    Args:
        template: its file under `templates/`.
        figures: by the key that the template gives to `plot`.
        content: what the template shows.
    """
    script = _asset("report.js")
    # plotly.js weighs 4.8 MB (plotly for Python ships no smaller bundle): a page without charts goes without it.
    plotly_js = plotly_offline.get_plotlyjs() if figures else ""
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash(plotly_js)} {_hash(script)}"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            policy=policy,
            style=Markup(_asset("report.css")),  # ours, like the two scripts
            script=Markup(script),
            plotly_js=Markup(plotly_js),
            figures=_embed(figures),
            **content,
        )
    )


def _split_view(data: ReportData, record: ScoresRecord) -> SplitView:
    main, matrix = data.main_metric, record.confusion
    names = sorted(record.metrics, key=lambda name: name != main)  # stable: the others keep their order
    return SplitView(
        scores=record,
        metric_names=tuple(names),
        baseline_word=summary.baseline_word(record),
        confusion=charts.confusion(matrix) if matrix is not None else None,
        small_confusion=matrix is not None and len(matrix.labels) <= _SMALL_CLASSES,
        confusions=_largest_confusions(matrix) if matrix is not None else (),
    )


def _largest_confusions(matrix: ConfusionMatrix) -> tuple[Confusion, ...]:
    if len(matrix.labels) <= 2:
        return ()  # the heat map says it all
    found = [
        Confusion(matrix.labels[true], matrix.labels[predicted], count, 100 * count / sum(row))
        for true, row in enumerate(matrix.counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    return tuple(sorted(found, key=lambda pair: -pair.count)[:_CONFUSIONS_SHOWN])


def _without_accounts(value: object) -> object:
    """What a page shows of a text with URIs: a report is passed on, and `s3://key:secret@bucket` tells the keys."""
    return mask_secrets(value) if type(value) is str else value


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("launcher.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_accounts,
    )
    environment.filters |= {
        "number": numbers.number,
        "short": numbers.short,
        "duration": numbers.duration,
        "size": numbers.size,
        "clip": numbers.clip,
        "clock": numbers.clock,
        "marked": texts.marked,
    }
    return environment


def _asset(name: str) -> str:
    return (resources.files("launcher.report") / "templates" / name).read_text(encoding="utf-8")


def _embed(figures: dict[str, Chart]) -> Markup:
    """The figures as one JSON object in which nothing can end the script element it stands in."""
    items = ",".join(f'"{key}":{chart.json}' for key, chart in figures.items())
    safe = items.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup("{" + safe + "}")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
