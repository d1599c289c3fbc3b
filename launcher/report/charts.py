"""The report's charts as plotly figures. Pure; runs on the client or the head.

Colours of axes and backgrounds are left to `templates/report.js`, which knows whether the reader likes it dark.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types
import plotly.io as pio  # type: ignore[import-untyped]

from launcher.report.collect import ReportData
from launcher.report.numbers import clip, number
from launcher.rundir.records import ConfusionMatrix

MAX_POINTS = 2000
"""Points kept per curve."""
MAX_CLASSES = 100
"""Beyond this many classes a confusion matrix cannot be read on a screen."""

# Okabe & Ito 2008: told apart by colour-blind readers, and legible on white and on dark alike.
BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY = (
    "#2f80c2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#8a8f98",
)
_PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x")
_FAINT = "60"  # alpha of an #rrggbbaa colour
_MARKED_POINTS = 60
"""A curve of at most so many points shows them."""
_LABEL_CHARS = 28
_CELL_TEXT_CLASSES = 30
_CELL_PERCENT_CLASSES = 12
_ROW_PX = ((4, 90), (_CELL_PERCENT_CLASSES, 46), (40, 21), (MAX_CLASSES, 12))
"""Height of a matrix row, by number of classes."""

Points = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Chart:
    """One figure, ready for plotly.js."""

    title: str
    json: str
    height_px: int
    note: str = ""
    wide: bool = False
    """Whether it wants the whole width of the page."""


def curves(data: ReportData) -> tuple[Chart, ...]:
    """What happened over the steps; only the charts there is data for."""
    steps = [line.step for line in data.steps]
    found = [_loss_chart(data)] if steps or data.evaluations else []
    found += _metric_charts(data)
    if steps:
        rates = [line.learning_rate for line in data.steps]
        found.append(_step_chart("Learning rate", go.Figure(step_line("learning rate", steps, rates, BLUE)), ""))
        speeds = [line.samples_per_s for line in data.steps]
        figure = go.Figure(_noisy("rows per second", steps, speeds, GREEN))
        figure.update_yaxes(rangemode="tozero")
        found.append(_step_chart("Throughput", figure, "Rows per second, all workers together."))
    norms = [(line.step, line.grad_norm) for line in data.steps if line.grad_norm is not None]
    if norms:
        found.append(_norm_chart(data, [step for step, _ in norms], [norm for _, norm in norms]))
    return tuple(found)


def confusion(matrix: ConfusionMatrix) -> Chart | None:
    """The confusion matrix as a heat map coloured by row percentage; None when it has too many classes to read."""
    count = len(matrix.labels)
    if count > MAX_CLASSES:
        return None
    percents = [_percent(row) for row in matrix.counts]
    ticks = {"tickmode": "array", "tickvals": list(range(count)), "ticktext": [_label(name) for name in matrix.labels]}
    heat = go.Heatmap(
        z=percents,
        customdata=[list(row) for row in matrix.counts],
        text=_cell_texts(matrix, percents),
        texttemplate="%{text}" if count <= _CELL_TEXT_CLASSES else None,
        hovertemplate="true %{y}<br>predicted %{x}<br>%{customdata:,} rows, %{z:.1f} % of its class<extra></extra>",
        zmin=0,
        zmax=100,
        xgap=1,
        ygap=1,
        showscale=count > _CELL_PERCENT_CLASSES,
        colorbar={"ticksuffix": " %", "thickness": 12, "outlinewidth": 0},
    )
    font = {"size": 12 if count <= _CELL_PERCENT_CLASSES else 9}
    figure = go.Figure(heat)
    # Upright where the names would run into each other: a compact matrix has room for some 60 characters.
    angle = 0 if sum(len(clip(name, _LABEL_CHARS)) + 2 for name in matrix.labels) <= 60 else -90
    figure.update_xaxes(title_text="predicted", tickangle=angle, tickfont=font, automargin=True, **ticks)
    figure.update_yaxes(title_text="true", autorange="reversed", tickfont=font, automargin=True, **ticks)
    figure.update_layout(font=font)
    height_px = 200 + count * (
        90 if count <= 4 else 46 if count <= _CELL_PERCENT_CLASSES else 21 if count <= 40 else 12
    )
    return chart("Confusion matrix", figure, height_px, "Coloured by the share of the true class (line).")


def thin(xs: Sequence[int], ys: Sequence[float], limit: int = MAX_POINTS) -> Points:
    """At most `limit` points of a curve that keep its shape.

    The first and the last point stay; the rest is cut into buckets of which the lowest and the highest stay, so no
    spike is lost. A value that is not finite stands for its bucket only when the bucket holds nothing else.
    """
    if len(xs) <= limit:
        return list(xs), list(ys)
    buckets = (limit - 2) // 2
    inner = len(xs) - 2
    kept = [0]
    for bucket in range(buckets):
        indices = range(1 + inner * bucket // buckets, 1 + inner * (bucket + 1) // buckets)
        finite = [i for i in indices if math.isfinite(ys[i])] or [indices[0]]
        kept += sorted({min(finite, key=ys.__getitem__), max(finite, key=ys.__getitem__)})
    kept.append(len(xs) - 1)
    return [xs[i] for i in kept], [ys[i] for i in kept]


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average over about `span` values, without the start's pull to zero."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight if weight and math.isfinite(value) else math.nan)
    return smoothed


def _loss_chart(data: ReportData) -> Chart:
    figure = go.Figure()
    steps, losses = [line.step for line in data.steps], [line.loss for line in data.steps]
    if steps:
        figure.add_traces(_noisy("training", steps, losses, BLUE))
    if data.evaluations:
        at, values = [line.step for line in data.evaluations], [line.loss for line in data.evaluations]
        figure.add_trace(step_line("validation", at, values, ORANGE, width=2.5))
    for before, after in zip(data.steps, data.steps[1:], strict=False):
        # More lines than this say nothing and hide the curve.
        if before.epoch != after.epoch and data.steps[-1].epoch <= 12:
            figure.add_vline(x=before.step, line={"color": GREY, "width": 1, "dash": "dot"}, opacity=0.6)
    note = "Dotted lines: ends of epochs." if figure.layout.shapes else ""
    return _step_chart("Loss", figure, note, height_px=380)


def _metric_charts(data: ReportData) -> list[Chart]:
    """Metrics within [-1, 1] share one chart; each other has its own axis and so its own chart."""
    names = list(dict.fromkeys(name for line in data.evaluations for name in line.metrics))
    groups: list[list[str]] = [[]]
    for name in names:
        values = [line.metrics[name] for line in data.evaluations if name in line.metrics]
        if all(abs(value) <= 1 for value in values if math.isfinite(value)):
            groups[0].append(name)
        else:
            groups.append([name])
    return [_metric_chart(data, group) for group in groups if group]


def _metric_chart(data: ReportData, names: Sequence[str]) -> Chart:
    figure = go.Figure()
    for index, name in enumerate(names):
        points = [(line.step, line.metrics[name]) for line in data.evaluations if name in line.metrics]
        colour, symbol = _PALETTE[index % len(_PALETTE)], _SYMBOLS[index % len(_SYMBOLS)]
        figure.add_trace(step_line(name, [x for x, _ in points], [y for _, y in points], colour, symbol=symbol))
    best, main = data.best, data.main_metric
    note = ""
    if best is not None and main in names and main in best.metrics:
        star = {"symbol": "star", "size": 17, "color": AMBER, "line": {"color": "#5c3d00", "width": 1}}
        value = best.metrics[main]
        figure.add_trace(go.Scatter(x=[best.step], y=[value], mode="markers", marker=star, name="best"))
        note = f"Best {main}: {number(value)} at step {best.step:,}."
    title = "Validation metrics" if len(names) > 1 else f"Validation {names[0]}"
    return _step_chart(title, figure, note)


def _norm_chart(data: ReportData, steps: Sequence[int], norms: Sequence[float]) -> Chart:
    limit = data.job.train.max_grad_norm
    figure = go.Figure(_noisy("norm", steps, norms, PINK))
    note = "L2 norm of the global batch's gradient, before clipping."
    if limit is not None:
        figure.add_hline(y=limit, line={"color": GREY, "width": 1.5, "dash": "dash"})
        note += f" Dashed: clipped at {limit:g}."
    return _step_chart("Gradient norm", figure, note)


def _noisy(name: str, steps: Sequence[int], values: Sequence[float], colour: str) -> list[go.Scatter]:
    """The values as they are, faint, and their moving average, strong."""
    span = min(200, max(5, len(steps) // 30))
    return [
        step_line(f"{name}, each step", steps, values, colour + _FAINT, width=1),
        step_line(f"{name}, mean of ~{span} steps", steps, smooth(values, span), colour, width=2.5),
    ]


def step_line(
    name: str,
    steps: Sequence[int],
    values: Sequence[float],
    colour: str,
    symbol: str = "circle",
    width: float = 2,
) -> go.Scatter:
    """A line over the steps, thinned to what a screen can show; short ones show their points."""
    xs, ys = thin(steps, values)
    marked = len(xs) <= _MARKED_POINTS
    return go.Scatter(
        x=xs,
        # Six digits are more than a screen can show and keep the page small.
        y=[float(f"{y:.6g}") for y in ys],
        name=html.escape(name, quote=False),
        mode="lines+markers" if marked else "lines",
        line={"color": colour, "width": width},
        marker={"symbol": symbol, "size": 6},
    )


def _step_chart(title: str, figure: go.Figure, note: str, height_px: int = 300) -> Chart:
    figure.update_layout(showlegend=len(figure.data) > 1)
    return chart(title, over_steps(figure), height_px, note)


def over_steps(figure: go.Figure) -> go.Figure:
    """The axes, legend and hover text of all curves over the steps; the same figure."""
    figure.update_xaxes(title_text="step", rangemode="tozero")
    figure.update_yaxes(automargin=True, exponentformat="e")
    return figure.update_layout(
        hovermode="x unified", legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    )


def chart(title: str, figure: go.Figure, height_px: int, note: str, wide: bool = False) -> Chart:
    """A figure in the report's frame."""
    figure.update_layout(template="none", margin={"l": 56, "r": 14, "t": 30, "b": 44}, height=height_px)
    return Chart(title=title, json=pio.to_json(figure, engine="json"), height_px=height_px, note=note, wide=wide)


def _percent(row: Sequence[int]) -> list[float | None]:
    total = sum(row)
    return [round(100 * count / total, 2) if total else None for count in row]


def _cell_texts(matrix: ConfusionMatrix, percents: Sequence[Sequence[float | None]]) -> list[list[str]] | None:
    """Count and row percentage where there is room, the count alone on a finer grid, nothing on the finest."""
    size = len(matrix.labels)
    if size > _CELL_TEXT_CLASSES:
        return None
    if size > _CELL_PERCENT_CLASSES:
        return [[str(count) if count else "" for count in row] for row in matrix.counts]
    return [
        [f"{count:,}<br>{percent:.0f} %" if count else "0" for count, percent in zip(row, line, strict=True)]
        for row, line in zip(matrix.counts, percents, strict=True)
    ]


def _label(name: str) -> str:
    """A class name as plotly text: plotly reads a subset of HTML in labels."""
    return html.escape(clip(name, _LABEL_CHARS), quote=False)
