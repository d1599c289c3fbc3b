"""The charts of a run's report as plotly figures. Pure; runs on the client or the head.

`templates/report.js` sets the colours of axes and backgrounds, because it knows whether the reader prefers a dark page.
Read `render.py` next, which puts the charts on the page.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types
import plotly.io as pio  # type: ignore[import-untyped]

from launcher.formatting import clip, format_number
from launcher.report.collect import ReportData
from launcher.rundir.records import ConfusionMatrix, Histogram, TimesRecord

MAX_POINTS = 2000
"""Maximum points of a curve. More make the page large and cannot be seen."""
MAX_CLASSES = 100
"""Largest confusion matrix that can be read on a screen."""

# Okabe & Ito 2008: colour-blind readers can tell them apart, and they are legible on white and on black.
BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY = (
    "#2f80c2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#8a8f98",
)
LEGEND_ON_TOP = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
_PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY)
DASHES = ("solid", "dash", "dot", "dashdot")
"""Dash patterns that tell curves with the same colour apart."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x")
# Alpha of an #rrggbbaa colour.
_FAINT = "60"
_MARKED_POINTS = 60
"""Curves of at most this many points show markers."""
_MAX_EPOCH_LINES = 12
"""With more epochs than this, the lines at their ends hide the curve."""
_LABEL_CHARS = 28
_CELL_TEXT_CLASSES = 30
_CELL_PERCENT_CLASSES = 12
_ROW_PX = ((4, 90), (_CELL_PERCENT_CLASSES, 46), (40, 21), (MAX_CLASSES, 12))
"""Height of a matrix row in pixels, for up to so many classes."""
_MAX_RANKS = 40
"""With more workers than this, only the fastest and the slowest get a bar."""
_UNEVEN_FRACTION = 0.1
"""The slowest worker is named if it computes longer than the fastest by more than this fraction."""


@dataclass(frozen=True)
class Chart:
    """One figure for plotly.js, with what the page needs to show it."""

    title: str
    json: str
    height_px: int
    note: str = ""
    is_wide: bool = False
    """True if the chart takes the whole width of the page."""


def make_curve_charts(data: ReportData) -> tuple[Chart, ...]:
    """Return the charts over the optimizer steps, without those that have no data yet."""
    steps = [line.step for line in data.steps]
    charts = [_make_loss_chart(data)] if steps or data.evaluations else []
    if data.job.data.mixture and charts:
        charts.append(_make_source_chart(data, tuple(data.job.data.mixture)))
    charts += _make_metric_charts(data)
    if steps:
        rates = [line.learning_rate for line in data.steps]
        figure = go.Figure(make_step_line("learning rate", steps, rates, BLUE))
        charts.append(_make_step_chart("Learning rate", figure, ""))
        speeds = [line.samples_per_s for line in data.steps]
        figure = go.Figure(_make_noisy_lines("rows per second", steps, speeds, GREEN))
        figure.update_yaxes(rangemode="tozero")
        charts.append(_make_step_chart("Throughput", figure, "Rows per second, all workers together."))
    norms = [(line.step, line.grad_norm) for line in data.steps if line.grad_norm is not None]
    if norms:
        charts.append(_make_norm_chart(data, [step for step, _ in norms], [norm for _, norm in norms]))
    return tuple(charts)


def make_confusion_chart(matrix: ConfusionMatrix) -> Chart | None:
    """Return the confusion matrix as a heat map of row percentages, or None if it has more than `MAX_CLASSES`."""
    count = len(matrix.labels)
    if count > MAX_CLASSES:
        return None
    percents = [_row_percents(row) for row in matrix.counts]
    labels = [escape_label(name, _LABEL_CHARS) for name in matrix.labels]
    ticks = {"tickmode": "array", "tickvals": list(range(count)), "ticktext": labels}
    # No colour scale: `report.js` sets it for a light or a dark page. The range is fixed, so that the same percentage
    # has the same colour in every report.
    heat = go.Heatmap(
        z=percents,
        customdata=[list(row) for row in matrix.counts],
        text=_format_cells(matrix, percents),
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
    # Labels stand upright where they would overlap: a small matrix is about 60 characters wide.
    angle = 0 if sum(len(clip(name, _LABEL_CHARS)) + 2 for name in matrix.labels) <= 60 else -90
    figure.update_xaxes(title_text="predicted", tickangle=angle, tickfont=font, automargin=True, **ticks)
    figure.update_yaxes(title_text="true", autorange="reversed", tickfont=font, automargin=True, **ticks)
    figure.update_layout(font=font)
    # Never exhausted: a matrix of more than `MAX_CLASSES` has returned above.
    row_px = next(px for max_classes, px in _ROW_PX if count <= max_classes)
    return make_chart("Confusion matrix", figure, 200 + count * row_px, "Coloured by the percentage of the true class.")


def make_histogram_chart(histogram: Histogram) -> Chart:
    """Return the numbers of rows by a value as bars; those below zero have another colour."""
    bins = list(zip(histogram.edges, histogram.edges[1:], strict=False))
    figure = go.Figure(
        go.Bar(
            x=[(low + high) / 2 for low, high in bins],
            y=list(histogram.counts),
            width=[high - low for low, high in bins],
            marker_color=[ORANGE if low + high < 0 else BLUE for low, high in bins],
            customdata=[[low, high] for low, high in bins],
            hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y:,} rows<extra></extra>",
        )
    )
    figure.update_layout(bargap=0.05)
    figure.update_xaxes(title_text=escape_label(histogram.name, _LABEL_CHARS), automargin=True)
    figure.update_yaxes(title_text="rows", rangemode="tozero", automargin=True)
    title = escape_label(histogram.name.capitalize(), _LABEL_CHARS)
    return make_chart(title, figure, 300, f"Rows by {histogram.name}.")


def make_time_chart(times: Sequence[TimesRecord]) -> Chart | None:
    """Return a bar per worker that shows how its time was spent, or None if nothing was timed."""
    if not times:
        return None
    # A run that resumed with another number of workers has records of both sizes: only the latest size is shown.
    times = [line for line in times if len(line.data_s) == len(times[-1].data_s)]
    seconds = sum(line.seconds for line in times)
    world_size = len(times[0].data_s)
    data, communication, evaluation, checkpoint = (
        # Records of older runs have () for communication; the strict zip needs a value for each rank.
        [sum(values) for values in zip(*(getattr(line, name) or (0.0,) * world_size for line in times), strict=True)]
        for name in ("data_s", "communication_s", "evaluation_s", "checkpoint_s")
    )
    waits = zip(data, communication, evaluation, checkpoint, strict=True)
    # The total is measured on rank 0, the waits on each rank: the difference may fall a little below 0.
    computing = [max(0.0, seconds - sum(waits_of_rank)) for waits_of_rank in waits]
    ranks = _choose_ranks(computing)
    parts = {
        "computing": (computing, BLUE),
        "waiting for other workers": (communication, GREEN),
        "waiting for data": (data, ORANGE),
        "evaluations": (evaluation, GREY),
        "checkpoints": (checkpoint, AMBER),
    }
    figure = go.Figure()
    for name, (values, colour) in parts.items():
        percents = [100 * values[rank] / seconds if seconds else 0.0 for rank in ranks]
        figure.add_bar(
            name=name, y=[f"rank {rank}" for rank in ranks], x=[values[rank] for rank in ranks], orientation="h",
            marker_color=colour, customdata=percents,
            hovertemplate="%{y}: %{x:.1f} s, %{customdata:.1f} %<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", legend={**LEGEND_ON_TOP, "traceorder": "normal"})
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(autorange="reversed", automargin=True)
    note = _describe_times(data, computing, seconds)
    return make_chart("Where the time goes", figure, 150 + 26 * len(ranks), note)


def thin(xs: Sequence[int], ys: Sequence[float], max_points: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """Return at most `max_points` points of a curve that keep its shape.

    The first and the last point stay. The others are split into buckets, and the lowest and highest point of each
    bucket stay, so that no spike is lost. A non-finite value stays only if its bucket has no finite one.
    """
    if len(xs) <= max_points:
        return list(xs), list(ys)
    # Two points a bucket, and the two ends.
    buckets = (max_points - 2) // 2
    inner = len(xs) - 2
    chosen = [0]
    for bucket in range(buckets):
        indices = range(1 + inner * bucket // buckets, 1 + inner * (bucket + 1) // buckets)
        # min and max of values with NaN depend on their order, so only finite ones compete.
        finite = [i for i in indices if math.isfinite(ys[i])] or [indices[0]]
        # A set, as the lowest and highest of a flat bucket are the same point; sorted, as a line must not run
        # backwards.
        chosen += sorted({min(finite, key=ys.__getitem__), max(finite, key=ys.__getitem__)})
    chosen.append(len(xs) - 1)
    return [xs[i] for i in chosen], [ys[i] for i in chosen]


def smoothing_span(count: int) -> int:
    """Return the span of a moving average over so many values: about 30 across the chart, enough to show a trend."""
    return min(200, max(5, count // 30))


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential moving average over about `span` values, corrected for its start at zero."""
    decay = 1 - 2 / (span + 1)
    total = 0.0
    weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        # A gap stays a gap: NaN breaks the line where a loss was not finite, and later means do not carry it.
        smoothed.append(total / weight if weight and math.isfinite(value) else math.nan)
    return smoothed


def make_step_line(
    name: str, steps: Sequence[int], values: Sequence[float], colour: str, symbol: str = "circle", width: float = 2
) -> go.Scatter:
    """Return a line over the steps, thinned to `MAX_POINTS`. Short lines show markers."""
    xs, ys = thin(steps, values)
    return go.Scatter(
        x=xs,
        # Six digits are more than a screen can show and keep the page small.
        y=[float(f"{y:.6g}") for y in ys],
        # plotly reads a subset of HTML in names.
        name=html.escape(name, quote=False),
        mode="lines+markers" if len(xs) <= _MARKED_POINTS else "lines",
        line={"color": colour, "width": width},
        marker={"symbol": symbol, "size": 6},
    )


def format_step_axes(figure: go.Figure) -> go.Figure:
    """Give a figure over the steps its axes, legend and hover text, and return the same figure."""
    figure.update_xaxes(title_text="step", rangemode="tozero")
    figure.update_yaxes(automargin=True, exponentformat="e")
    return figure.update_layout(hovermode="x unified", legend=LEGEND_ON_TOP)


def make_chart(title: str, figure: go.Figure, height_px: int, note: str, is_wide: bool = False) -> Chart:
    """Return a figure as JSON in the frame that all charts share."""
    # plotly 7 writes its default template into each figure: 6.5 KB, with colours of its own.
    figure.update_layout(template="none", margin={"l": 56, "r": 14, "t": 30, "b": 44}, height=height_px)
    # The json engine by name: by default plotly takes orjson where it is installed, and pages would differ by machine.
    # Either writes NaN as null, which JSON.parse of the page can read.
    return Chart(title=title, json=pio.to_json(figure, engine="json"), height_px=height_px, note=note, is_wide=is_wide)


def escape_label(name: str, max_chars: int) -> str:
    """Return a name as plotly text: plotly reads a subset of HTML in labels, and class names come from users."""
    return html.escape(clip(name, max_chars), quote=False)


def _make_loss_chart(data: ReportData) -> Chart:
    figure = go.Figure()
    steps = [line.step for line in data.steps]
    if steps:
        figure.add_traces(_make_noisy_lines("training", steps, [line.loss for line in data.steps], BLUE))
    if data.evaluations:
        evaluated = [line.step for line in data.evaluations]
        losses = [line.loss for line in data.evaluations]
        figure.add_trace(make_step_line("validation", evaluated, losses, ORANGE, width=2.5))
    for before, after in zip(data.steps, data.steps[1:], strict=False):
        # Only logged steps are known: the line is at the last one before the epoch changed.
        if before.epoch != after.epoch and data.steps[-1].epoch <= _MAX_EPOCH_LINES:
            figure.add_vline(x=before.step, line={"color": GREY, "width": 1, "dash": "dot"}, opacity=0.6)
    note = "Dotted lines: ends of epochs." if figure.layout.shapes else ""
    return _make_step_chart("Loss", figure, note, height_px=380)


def _make_source_chart(data: ReportData, sources: Sequence[str]) -> Chart:
    """Return the losses of each source of a mixture: smoothed in training, and of the validation data."""
    figure = go.Figure()
    for index, source in enumerate(sources):
        colour = _PALETTE[index % len(_PALETTE)]
        steps = [(line.step, line.sources[source]) for line in data.steps if line.sources and source in line.sources]
        if steps:
            lines = _make_noisy_lines(source, [step for step, _ in steps], [loss for _, loss in steps], colour)
            figure.add_trace(lines[1])
        scores = [(e.step, e.metrics[f"{source}/loss"]) for e in data.evaluations if f"{source}/loss" in e.metrics]
        if scores:
            figure.add_trace(
                make_step_line(
                    f"{source}, validation",
                    [step for step, _ in scores],
                    [loss for _, loss in scores],
                    colour,
                    symbol=_SYMBOLS[index % len(_SYMBOLS)],
                )
            )
    return _make_step_chart("Loss by source", figure, "Lines with marks: validation data.")


def _make_metric_charts(data: ReportData) -> list[Chart]:
    """Return one chart of all metrics within [-1, 1], and one of each other metric, which needs its own axis."""
    every = list(dict.fromkeys(name for line in data.evaluations for name in line.metrics))
    names = [name for name in every if "/" not in name]
    # By values, not by names: a perplexity of thousands would flatten an accuracy on a common axis.
    groups: list[list[str]] = [[]]
    for name in names:
        values = [line.metrics[name] for line in data.evaluations if name in line.metrics]
        if all(abs(value) <= 1 for value in values if math.isfinite(value)):
            groups[0].append(name)
        else:
            groups.append([name])
    # Of a mixture each source has a chart; its loss is in the chart of losses.
    sources = dict.fromkeys(name.split("/")[0] for name in every if "/" in name)
    groups += [[n for n in every if n.startswith(f"{source}/") and n != f"{source}/loss"] for source in sources]
    return [_make_metric_chart(data, group) for group in groups if group]


def _make_metric_chart(data: ReportData, names: Sequence[str]) -> Chart:
    figure = go.Figure()
    for index, name in enumerate(names):
        points = [(line.step, line.metrics[name]) for line in data.evaluations if name in line.metrics]
        colour = _PALETTE[index % len(_PALETTE)]
        symbol = _SYMBOLS[index % len(_SYMBOLS)]
        line = make_step_line(name, [x for x, _ in points], [y for _, y in points], colour, symbol=symbol)
        # Classification has nine metrics, and there are seven colours and symbols.
        figure.add_trace(line.update(line_dash=DASHES[index // len(_PALETTE) % len(DASHES)]))
    best, main = data.best_evaluation, data.main_metric
    note = ""
    if best is not None and main in names and main in best.metrics:
        star = {"symbol": "star", "size": 17, "color": AMBER, "line": {"color": "#5c3d00", "width": 1}}
        value = best.metrics[main]
        figure.add_trace(go.Scatter(x=[best.step], y=[value], mode="markers", marker=star, name="best"))
        note = f"Best {main}: {format_number(value)} at step {best.step:,}."
    source = names[0].split("/")[0] if "/" in names[0] else ""
    title = f"Validation metrics{f' of {source}' if source else ''}" if len(names) > 1 else f"Validation {names[0]}"
    return _make_step_chart(title, figure, note)


def _make_norm_chart(data: ReportData, steps: Sequence[int], norms: Sequence[float]) -> Chart:
    max_norm = data.job.train.max_grad_norm
    figure = go.Figure(_make_noisy_lines("norm", steps, norms, PINK))
    note = "L2 norm of the global batch's gradient, before clipping."
    if max_norm is not None:
        figure.add_hline(y=max_norm, line={"color": GREY, "width": 1.5, "dash": "dash"})
        note += f" Dashed: clipped at {max_norm:g}."
    return _make_step_chart("Gradient norm", figure, note)


def _make_noisy_lines(name: str, steps: Sequence[int], values: Sequence[float], colour: str) -> list[go.Scatter]:
    """Return a faint line of the values and a strong one of their moving average."""
    span = smoothing_span(len(steps))
    return [
        make_step_line(f"{name}, each step", steps, values, colour + _FAINT, width=1),
        make_step_line(f"{name}, mean of ~{span} steps", steps, smooth(values, span), colour, width=2.5),
    ]


def _make_step_chart(title: str, figure: go.Figure, note: str, height_px: int = 300) -> Chart:
    figure.update_layout(showlegend=len(figure.data) > 1)
    return make_chart(title, format_step_axes(figure), height_px, note)


def _row_percents(row: Sequence[int]) -> list[float | None]:
    total = sum(row)
    return [round(100 * count / total, 2) if total else None for count in row]


def _format_cells(matrix: ConfusionMatrix, percents: Sequence[Sequence[float | None]]) -> list[list[str]] | None:
    """Return count and percentage for large cells, the count for smaller ones, None for the smallest."""
    size = len(matrix.labels)
    if size > _CELL_TEXT_CLASSES:
        return None
    if size > _CELL_PERCENT_CLASSES:
        return [[str(count) if count else "" for count in row] for row in matrix.counts]
    return [
        [f"{count:,}<br>{percent:.0f} %" if count else "0" for count, percent in zip(row, line, strict=True)]
        for row, line in zip(matrix.counts, percents, strict=True)
    ]


def _choose_ranks(computing_s: Sequence[float]) -> list[int]:
    """Return the ranks that get a bar, in order: all, or the fastest and the slowest of many."""
    if len(computing_s) <= _MAX_RANKS:
        return list(range(len(computing_s)))
    # Those in the middle explain nothing: all wait for the slowest.
    by_time = sorted(range(len(computing_s)), key=lambda rank: computing_s[rank])
    return sorted([*by_time[: _MAX_RANKS // 2], *by_time[-_MAX_RANKS // 2 :]])


def _describe_times(data_s: Sequence[float], computing_s: Sequence[float], seconds: float) -> str:
    """Name the worker that waited longest for data and, if the work is uneven, the slowest worker."""
    ranks = range(len(data_s))
    waited = max(ranks, key=lambda rank: data_s[rank])
    percent = 100 * data_s[waited] / seconds if seconds else 0.0
    note = f"Rank {waited} waited longest for data: {data_s[waited]:.1f} s, {percent:.1f} % of the time."
    slowest = max(ranks, key=lambda rank: computing_s[rank])
    fastest = min(ranks, key=lambda rank: computing_s[rank])
    extra_s = computing_s[slowest] - computing_s[fastest]
    if computing_s[fastest] and extra_s > _UNEVEN_FRACTION * computing_s[fastest]:
        note += f" Rank {slowest} is the slowest: all wait for it, {extra_s:.1f} s longer than for rank {fastest}."
    if len(ranks) > _MAX_RANKS:
        note += f" {_MAX_RANKS} of {len(ranks)} workers: the fastest and the slowest."
    return note
