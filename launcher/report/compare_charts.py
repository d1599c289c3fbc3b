"""The curves of several runs laid on each other, as plotly figures. Pure; runs on the client or the head."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types

from launcher.report.charts import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    Chart,
    chart,
    over_steps,
    smooth,
    step_line,
)
from launcher.report.collect import ReportData
from launcher.report.numbers import clip

_PALETTE = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, GREY)
_DASHES = ("solid", "dash", "dot", "dashdot")
_FAINT = "48"  # alpha of an #rrggbbaa colour
_NAME_CHARS = 48


def charts(names: Sequence[str], runs: Sequence[ReportData]) -> tuple[Chart, ...]:
    """Training loss, validation loss, every metric of the validation data, learning rate and throughput."""
    found = [_loss(names, runs)]
    if len(runs) == 2:
        found += _difference(names, runs)
    metrics = dict.fromkeys(name for data in runs for line in data.evaluations for name in line.metrics)
    for metric in ("loss", *_main_first(list(metrics), runs)):
        points = [
            [(line.step, {"loss": line.loss, **line.metrics}.get(metric, math.nan)) for line in data.evaluations]
            for data in runs
        ]
        if any(points):
            found.append(_lines(f"Validation {metric}", names, points))
    found.append(_lines("Learning rate", names, [[(s.step, s.learning_rate) for s in data.steps] for data in runs]))
    speeds = [[(s.step, s.samples_per_s) for s in data.steps] for data in runs]
    found.append(_lines("Rows per second", names, speeds, smoothed=True))
    return tuple(found)


def colour(index: int) -> str:
    """The colour of a run, in charts and tables."""
    return _PALETTE[index % len(_PALETTE)]


def _main_first(metrics: list[str], runs: Sequence[ReportData]) -> list[str]:
    main = {data.main_metric for data in runs}
    return sorted(metrics, key=lambda name: name not in main)  # stable: the others keep their order


def _loss(names: Sequence[str], runs: Sequence[ReportData]) -> Chart:
    points = [[(line.step, line.loss) for line in data.steps] for data in runs]
    note = "Faint: each step. Strong: moving average. A click on a name hides the run, two clicks show it alone."
    return _lines("Training loss", names, points, smoothed=True, note=note, height_px=440)


def _difference(names: Sequence[str], runs: Sequence[ReportData]) -> list[Chart]:
    """The second run's loss less the first one's, at the steps that both have."""
    one, other = ({line.step: line.loss for line in data.steps} for data in runs)
    both = sorted(one.keys() & other.keys())
    if not both:
        return []
    figure = go.Figure(_trace("difference", [(s, other[s] - one[s]) for s in both], GREY, width=1.5))
    figure.update_layout(showlegend=False)
    same = sum(one[step] == other[step] for step in both)
    first, second = (clip(name, _NAME_CHARS) for name in names)
    note = f"{second} less {first}: the same bits at {same:,} of {len(both):,} steps."
    return [_framed("Difference of the losses", figure, note, 260, wide=True)]


def _lines(
    title: str,
    names: Sequence[str],
    points: Sequence[Sequence[tuple[int, float]]],
    smoothed: bool = False,
    note: str = "",
    height_px: int = 320,
) -> Chart:
    """A curve per run; smoothed ones show the values themselves as well, faint."""
    figure = go.Figure()
    for index, (name, curve) in enumerate(zip(names, points, strict=True)):
        if not curve:
            continue
        tint, dash = colour(index), _DASHES[index // len(_PALETTE) % len(_DASHES)]
        group = f"run-{index}"  # a click on the name hides both
        if smoothed:
            raw = _trace(name, curve, tint + _FAINT, width=1)
            raw.update(legendgroup=group, showlegend=False, hoverinfo="skip")
            figure.add_trace(raw)
            means = smooth([value for _, value in curve], min(200, max(5, len(curve) // 30)))
            curve = [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]
        strong = _trace(name, curve, tint, width=2.5, dash=dash)
        strong.update(legendgroup=group, showlegend=True)
        figure.add_trace(strong)
    return _framed(title, figure, note, height_px)


def _trace(name: str, points: Sequence[tuple[int, float]], tint: str, width: float, dash: str = "solid") -> go.Scatter:
    steps, values = [step for step, _ in points], [value for _, value in points]
    trace = step_line(clip(name, _NAME_CHARS), steps, values, tint, width=width)
    return trace.update(line_dash=dash, marker_size=5)


def _framed(title: str, figure: go.Figure, note: str, height_px: int, wide: bool = False) -> Chart:
    return chart(title, over_steps(figure), height_px, note, wide)
