"""The curves of several runs in common charts, as plotly figures. Pure; runs on the client or the head."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types

from launcher.formatting import clip
from launcher.report.charts import (
    AMBER,
    BLUE,
    DASHES,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    Chart,
    format_step_axes,
    make_chart,
    make_step_line,
    smooth,
    smoothing_span,
)
from launcher.report.collect import ReportData

_PALETTE = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, GREY)
# Alpha of an #rrggbbaa colour.
_FAINT = "48"
_NAME_CHARS = 48

Points = list[tuple[int, float]]


def make_comparison_charts(names: Sequence[str], runs: Sequence[ReportData]) -> tuple[Chart, ...]:
    """Return charts of losses, validation metrics, learning rate and throughput, with a curve per run."""
    note = "Faint: each step. Strong: moving average. Click a name to hide the run, double-click to show it alone."
    losses = [[(line.step, line.loss) for line in data.steps] for data in runs]
    charts = [_make_chart_of_runs("Training loss", names, losses, is_smoothed=True, note=note, height_px=440)]
    # More than two runs have no difference to draw, and no first one that the others could be measured by.
    if len(runs) == 2:
        charts += _make_difference_charts(names, runs)
    metrics = dict.fromkeys(name for data in runs for line in data.evaluations for name in line.metrics)
    main_metrics = {data.main_metric for data in runs}
    # The sort is stable: all but the main metrics keep their order.
    for metric in ("loss", *sorted(metrics, key=lambda name: name not in main_metrics)):
        points = [
            [(line.step, {"loss": line.loss, **line.metrics}.get(metric, math.nan)) for line in data.evaluations]
            for data in runs
        ]
        if any(points):
            charts.append(_make_chart_of_runs(f"Validation {metric}", names, points))
    rates = [[(line.step, line.learning_rate) for line in data.steps] for data in runs]
    charts.append(_make_chart_of_runs("Learning rate", names, rates))
    speeds = [[(line.step, line.samples_per_s) for line in data.steps] for data in runs]
    charts.append(_make_chart_of_runs("Rows per second", names, speeds, is_smoothed=True))
    return tuple(charts)


def colour_of_run(index: int) -> str:
    """Return the colour of a run in charts and tables."""
    return _PALETTE[index % len(_PALETTE)]


def _make_difference_charts(names: Sequence[str], runs: Sequence[ReportData]) -> list[Chart]:
    """Return a chart of the second run's loss minus the first one's, or [] if no step is in both."""
    first, second = ({line.step: line.loss for line in data.steps} for data in runs)
    # Common steps only: runs may log at different intervals, or one may still be training.
    steps = sorted(first.keys() & second.keys())
    if not steps:
        return []
    line = _make_run_line("difference", [(step, second[step] - first[step]) for step in steps], GREY, width=1.5)
    figure = go.Figure(line).update_layout(showlegend=False)
    # Exact on purpose, as the note says. A NaN equals nothing, so it is not counted.
    identical = sum(first[step] == second[step] for step in steps)
    first_name, second_name = (clip(name, _NAME_CHARS) for name in names)
    note = f"{second_name} minus {first_name}: bit-identical at {identical:,} of {len(steps):,} steps."
    return [make_chart("Difference of the losses", format_step_axes(figure), 260, note, is_wide=True)]


def _make_chart_of_runs(
    title: str,
    names: Sequence[str],
    curves: Sequence[Points],
    is_smoothed: bool = False,
    note: str = "",
    height_px: int = 320,
) -> Chart:
    """Return a chart with a curve per run. A smoothed curve has a faint line of its values behind it."""
    figure = go.Figure()
    for index, (name, curve) in enumerate(zip(names, curves, strict=True)):
        if not curve:
            continue
        colour = colour_of_run(index)
        # Colours repeat after seven runs, dashes tell their rounds apart.
        dash = DASHES[index // len(_PALETTE) % len(DASHES)]
        # A click on the name hides both lines of the run.
        group = f"run-{index}"
        if is_smoothed:
            raw = _make_run_line(name, curve, colour + _FAINT, width=1)
            figure.add_trace(raw.update(legendgroup=group, showlegend=False, hoverinfo="skip"))
            # Before the line is thinned: a mean of the extremes that thinning keeps would be another curve.
            means = smooth([value for _, value in curve], smoothing_span(len(curve)))
            curve = [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]
        # The first run is wide, or it could not be seen below another one with the same curve.
        is_covered = index == 0 and len(names) > 1
        strong = _make_run_line(name, curve, colour, width=6 if is_covered else 2, dash=dash)
        figure.add_trace(strong.update(legendgroup=group, showlegend=True))
    return make_chart(title, format_step_axes(figure), height_px, note)


def _make_run_line(name: str, points: Points, colour: str, width: float, dash: str = "solid") -> go.Scatter:
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    line = make_step_line(clip(name, _NAME_CHARS), steps, values, colour, width=width)
    return line.update(line_dash=dash, marker_size=5)
