"""The charts of a sweep's report as plotly figures. Pure; runs on the client or the head.

`optuna.visualization` draws similar figures but cannot replace these: its parallel coordinates are a `parcoords` trace,
whose WebGL library (regl) compiles code with `Function`, which the page's content security policy forbids; and its
figures know neither pruned trials' statuses, nor a colour by a second key, nor a limit on the number of points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types
from pydantic import JsonValue

from launcher.formatting import format_number, format_param
from launcher.report.charts import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    LEGEND_ON_TOP,
    ORANGE,
    PINK,
    SKY,
    Chart,
    escape_label,
    make_chart,
)
from launcher.rundir.trials import SweepRecord, TrialEvaluation, TrialRecord

_PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER)
_STATUS_COLOURS = {"finished": BLUE, "running": GREEN, "pruned": GREY, "failed": ORANGE}
# Five colours from bad to good (from viridis), which can be told apart on white and on black.
_RANK_COLOURS = ("#5b4a8a", "#3b7c8f", "#2ba17c", "#86c043", "#f2b01e")
_MAX_POINTS = 2000
"""Maximum points of all curves together: the page stays small at any number of trials."""
_MAX_NAMED = 120
"""With more trials than this, charts do not show the names of trials."""
_MAX_BINS = 8
"""Number of bins of a range in heat maps and legends."""
_LABEL_CHARS = 40


@dataclass(frozen=True)
class _Axis:
    """A searched key as the axis of a chart.

    Args:
        form: Form of the dimension: choice, uniform, loguniform, int or logint.
        values: Values of a choice, or the lower and upper end of a range.
    """

    form: str
    values: tuple[JsonValue, ...]

    @property
    def is_range(self) -> bool:
        return self.form != "choice"

    @property
    def is_log(self) -> bool:
        return self.form in ("loguniform", "logint")

    @property
    def ends(self) -> tuple[float, float]:
        low, high = (float(str(end)) for end in self.values)
        return low, high

    @property
    def bins(self) -> list[str]:
        """Names of the values or, for a range, of its bins, in order."""
        if not self.is_range:
            return [format_param(value, None) for value in self.values]
        # A narrow range gives two bins the same name in two digits; they are one row then.
        return list(dict.fromkeys(self._bin_name(i) for i in range(self._num_bins)))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position from 0 to 1, and text, of each mark."""
        if self.is_range:
            low, high = self.ends
            return [(0.0, f"{low:g}"), (1.0, f"{high:g}")]
        return [(self.position_of(value), format_param(value, None)) for value in self.values]

    def bin_of(self, value: JsonValue) -> str:
        """Return the name of the bin that a value falls into."""
        if not self.is_range:
            return format_param(value, None)
        index = int(self.position_of(value) * self._num_bins)
        # The upper end of the range belongs to the last bin.
        return self._bin_name(min(self._num_bins - 1, max(0, index)))

    def position_of(self, value: JsonValue) -> float:
        """Return the position of a value on the axis, from 0 to 1."""
        if not self.is_range:
            # A choice of one value has one position, and nothing to divide by.
            return self.values.index(value) / max(1, len(self.values) - 1)
        low, high = self.ends
        # Positions follow the scale of the search: on a linear axis all small learning rates would be one tick.
        at, first, last = (math.log(v) if self.is_log else v for v in (float(str(value)), low, high))
        return (at - first) / (last - first)

    @property
    def _num_bins(self) -> int:
        low, high = self.ends
        return int(min(_MAX_BINS, high - low + 1)) if self.form in ("int", "logint") else _MAX_BINS

    def _bin_name(self, index: int) -> str:
        low, high = self.ends
        bins = self._num_bins
        # A bin for each number, named by it, where there are few.
        if self.form in ("int", "logint") and bins == high - low + 1:
            return str(int(low) + index)
        fractions = (index / bins, (index + 1) / bins)
        start, end = (low * (high / low) ** f if self.is_log else low + (high - low) * f for f in fractions)
        return f"{start:.2g} to {end:.2g}"


def make_sweep_charts(record: SweepRecord, trials: Sequence[TrialRecord]) -> tuple[Chart, ...]:
    """Return the charts that the trials have data for."""
    evaluated = [trial for trial in trials if trial.best_evaluation(record.mode) is not None]
    if not evaluated:
        return ()
    axes = {key: _make_axis(dimension) for key, dimension in record.space.items()}
    charts = [_make_curves(record, evaluated)]
    by_importance = list(record.importances) or list(axes)
    ranges = [key for key, axis in axes.items() if axis.is_range]
    choice = next((key for key, axis in axes.items() if not axis.is_range), None)
    for key in ranges:
        colour_key = choice or next((other for other in by_importance if other != key), None)
        charts.append(_make_scatter(record, axes, evaluated, key, colour_key))
    if len(axes) > 1:
        x = ranges[0] if ranges else by_importance[0]
        others = [key for key in (*by_importance, *axes) if key != x]
        y = choice if choice is not None and choice != x else others[0]
        charts += [_make_heat_map(record, axes, evaluated, x, y), _make_parallel_coordinates(record, axes, evaluated)]
    if record.importances:
        charts.append(_make_importance_chart(record))
    charts.append(_make_compute_chart(trials))
    return tuple(charts)


def _make_axis(dimension: Mapping[str, JsonValue]) -> _Axis:
    form, values = next(iter(dimension.items()))
    assert isinstance(values, list)
    return _Axis(form, tuple(values))


def _best_value(record: SweepRecord, trial: TrialRecord) -> float:
    best = trial.best_evaluation(record.mode)
    assert best is not None
    return best.value


def _make_curves(record: SweepRecord, trials: Sequence[TrialRecord]) -> Chart:
    """Return a chart of every trial's metric over its progress. The best trial is strong, pruned ones are faint."""
    figure = go.Figure()
    max_points = max(2, _MAX_POINTS // len(trials))
    best, others = trials[0], trials[1:]
    if len(trials) <= _MAX_NAMED:
        groups = [[trial] for trial in others]
    # One trace per status: thousands of traces would make the page slow.
    else:
        groups = [[trial for trial in others if trial.status == status] for status in _STATUS_COLOURS]
    for members in [*(group for group in groups if group), [best]]:
        first, is_best = members[0], members == [best]
        xs: list[float | None] = []
        ys: list[float | None] = []
        for trial in members:
            evaluations = _thin(trial.evaluations, max_points)
            # None ends the line: one trace holds many.
            xs += [*(round(evaluation.progress, 1) for evaluation in evaluations), None]
            ys += [*(_round(evaluation.value) for evaluation in evaluations), None]
        name = f"trial {first.number} ({first.status})" if len(members) == 1 else first.status
        figure.add_trace(
            go.Scatter(
                x=xs[:-1],
                y=ys[:-1],
                mode="lines+markers" if len(trials) <= 60 else "lines",
                line={"color": AMBER if is_best else _STATUS_COLOURS[first.status], "width": 3 if is_best else 1.5},
                marker={"size": 5},
                opacity=1.0 if is_best else 0.3 if first.status in ("pruned", "failed") else 0.75,
                hovertemplate=f"{name}<br>%{{x:.0f}} %: %{{y}}<extra></extra>",
            )
        )
    figure.update_layout(showlegend=False, hovermode="closest")
    figure.update_xaxes(title_text="progress of the trial, %", range=[0, 102])
    figure.update_yaxes(automargin=True)
    note = f"Strong: the best trial ({best.number}). Blue: finished. Green: running. Grey: pruned. Orange: failed."
    return make_chart(f"Validation {record.metric}, all trials", figure, 380, note)


def _thin(evaluations: Sequence[TrialEvaluation], max_points: int) -> Sequence[TrialEvaluation]:
    # Every n-th, not by extremes as in `charts.thin`: a trial has few evaluations. The last one is kept: it is where a
    # pruned trial stopped.
    chosen = evaluations[:: max(1, -(-len(evaluations) // max_points))]
    return chosen if chosen[-1] == evaluations[-1] else (*chosen, evaluations[-1])


def _make_scatter(
    record: SweepRecord, axes: Mapping[str, _Axis], trials: Sequence[TrialRecord], key: str, colour_key: str | None
) -> Chart:
    """Return a chart of one key against the metric, coloured by another key."""
    figure = go.Figure()
    groups = {"all": list(trials)}
    if colour_key is not None:
        axis = axes[colour_key]
        groups = {
            name: [trial for trial in trials if axis.bin_of(trial.params[colour_key]) == name] for name in axis.bins
        }
    for index, (name, members) in enumerate((name, members) for name, members in groups.items() if members):
        values = [trial.params[key] for trial in members]
        figure.add_trace(
            go.Scatter(
                x=[float(f"{value:.4g}") if isinstance(value, float) else value for value in values],
                y=[_round(_best_value(record, trial)) for trial in members],
                mode="markers",
                name=_label(name),
                marker={
                    "size": 10,
                    "color": _PALETTE[index % len(_PALETTE)],
                    "symbol": ["circle" if trial.status == "finished" else "circle-open" for trial in members],
                },
                text=[f"trial {trial.number}" for trial in members],
                hovertemplate=f"%{{text}}<br>{_label(key)} %{{x}}<br>{_label(record.metric)} %{{y}}<extra></extra>",
            )
        )
    figure.update_layout(
        showlegend=colour_key is not None,
        hovermode="closest",
        legend={**LEGEND_ON_TOP, "title": {"text": _label(colour_key or "")}},
    )
    figure.update_xaxes(title_text=_label(key), type="log" if axes[key].is_log else "linear", exponentformat="power")
    figure.update_yaxes(title_text=_label(record.metric), automargin=True)
    title = f"{_label(key)} against {record.metric}"
    return make_chart(title, figure, 360, "Filled: finished. Open: pruned, failed or running.")


def _make_heat_map(
    record: SweepRecord, axes: Mapping[str, _Axis], trials: Sequence[TrialRecord], x: str, y: str
) -> Chart:
    """Return a heat map of the best metric for each combination of two keys."""
    xs, ys = axes[x].bins, axes[y].bins
    # The best of a cell, not the mean: pruned trials would pull a mean down.
    choose = max if record.mode == "max" else min
    cells: dict[tuple[str, str], list[float]] = {}
    for trial in trials:
        cell = (axes[x].bin_of(trial.params[x]), axes[y].bin_of(trial.params[y]))
        cells.setdefault(cell, []).append(_best_value(record, trial))
    best = [[_round(choose(cells[a, b])) if (a, b) in cells else None for a in xs] for b in ys]
    counts = [[len(cells.get((a, b), ())) for a in xs] for b in ys]
    figure = go.Figure(
        go.Heatmap(
            x=[_label(name) for name in xs],
            y=[_label(name) for name in ys],
            z=best,
            customdata=counts,
            text=[["" if value is None else format_number(value) for value in row] for row in best],
            texttemplate="%{text}",
            xgap=2,
            ygap=2,
            hovertemplate="%{x}, %{y}<br>best %{z}, %{customdata} trials<extra></extra>",
            colorbar={"thickness": 12, "outlinewidth": 0},
            # The strong end of the scale, which `report.js` sets, is always the better one.
            reversescale=record.mode == "min",
        )
    )
    figure.update_xaxes(title_text=_label(x), type="category", automargin=True)
    figure.update_yaxes(title_text=_label(y), type="category", automargin=True)
    note = f"Best {record.metric} of the trials in each cell."
    return make_chart(f"{_label(x)} and {_label(y)}", figure, 170 + 56 * len(ys), note)


def _make_parallel_coordinates(record: SweepRecord, axes: Mapping[str, _Axis], trials: Sequence[TrialRecord]) -> Chart:
    """Return a chart with a line per trial across all keys, coloured from worst to best in five groups."""
    figure = go.Figure()
    # Worst first: the best lines are drawn last, on top.
    ranked = list(reversed(trials))
    groups = min(len(_RANK_COLOURS), len(ranked))
    values = [_best_value(record, trial) for trial in trials]
    low, high = min(values), max(values)
    for group in range(groups):
        # Groups differ in size by one trial at most, and none is empty.
        members = ranked[len(ranked) * group // groups : len(ranked) * (group + 1) // groups]
        xs: list[int | None] = []
        ys: list[float | None] = []
        texts: list[str | None] = []
        for trial in members:
            value = _best_value(record, trial)
            # All trials equal: the middle, instead of a division by 0.
            metric_position = 0.5 if high == low else (value - low) / (high - low)
            positions = [*(axis.position_of(trial.params[key]) for key, axis in axes.items()), metric_position]
            shown = {key: _label(format_param(trial.params[key], None)) for key in axes}
            shown[record.metric] = format_number(value)
            xs += [*range(len(positions)), None]
            ys += [*(round(position, 3) for position in positions), None]
            texts += [*(f"trial {trial.number}<br>{_label(key)} {text}" for key, text in shown.items()), None]
        has_names = len(trials) <= _MAX_NAMED
        # Texts of many trials would make the page large.
        hover = {"text": texts, "hovertemplate": "%{text}<extra></extra>"} if has_names else {"hoverinfo": "skip"}
        is_best = group == groups - 1
        figure.add_trace(
            go.Scatter(
                x=xs, y=ys, mode="lines+markers" if has_names else "lines",
                name="best" if is_best else "worst" if group == 0 else f"fifth {group + 1}",
                line={"color": _RANK_COLOURS[len(_RANK_COLOURS) - groups + group], "width": 2}, marker={"size": 5},
                opacity=0.9 if is_best else 0.45,
                **hover,
            )
        )  # fmt: skip
    metric_axis = [(0.0, format_number(low)), (1.0, format_number(high))]
    _draw_vertical_axes(figure, [*((key, axis.ticks) for key, axis in axes.items()), (record.metric, metric_axis)])
    figure.update_layout(hovermode="closest", legend=LEGEND_ON_TOP, showlegend=groups > 1)
    note = "One line per trial, coloured from the worst fifth to the best."
    return make_chart("Parallel coordinates", figure, 400, note, is_wide=True)


def _draw_vertical_axes(figure: go.Figure, axes: Sequence[tuple[str, Sequence[tuple[float, str]]]]) -> None:
    """Draw an axis for each (name, ticks) at x = 0, 1, 2, ..."""
    for x, (_, ticks) in enumerate(axes):
        figure.add_vline(x=x, line={"color": GREY, "width": 1})
        for position, text in ticks:
            figure.add_annotation(
                x=x, y=position, text=_label(text), showarrow=False, xanchor="left", xshift=5, font={"size": 11}
            )
    names = [_label(name) for name, _ in axes]
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(axes))),
        ticktext=names,
        showgrid=False,
        range=[-0.1, len(axes) - 1 + 0.35],
    )
    figure.update_yaxes(visible=False, range=[-0.08, 1.08])


def _make_importance_chart(record: SweepRecord) -> Chart:
    # plotly draws the first bar at the bottom.
    names = list(reversed(record.importances))
    figure = go.Figure(
        go.Bar(
            x=[round(record.importances[name], 4) for name in names], y=[_label(name) for name in names],
            orientation="h", marker={"color": BLUE}, text=[f"{record.importances[name]:.0%}" for name in names],
            hovertemplate="%{y}: %{x:.0%}<extra></extra>", textposition="outside", cliponaxis=False,
        )
    )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", range=[0, 1.05])
    figure.update_yaxes(automargin=True)
    note = "Fraction of the metric's variance that each key explains (PED-ANOVA, arXiv:2304.10255)."
    return make_chart("Hyperparameter importance", figure, 110 + 44 * len(names), note)


def _make_compute_chart(trials: Sequence[TrialRecord]) -> Chart:
    """Return a bar of the worker time by status of the trials."""
    figure = go.Figure()
    for status, colour in _STATUS_COLOURS.items():
        members = [trial for trial in trials if trial.status == status]
        if members:
            minutes = sum(trial.seconds * trial.workers for trial in members) / 60
            figure.add_trace(
                go.Bar(
                    x=[round(minutes, 3)], y=[""], orientation="h", name=f"{status} ({len(members)})",
                    marker={"color": colour}, text=[f"{minutes:,.1f} min"], textposition="inside",
                    hovertemplate=f"{status}: {len(members)} trials, {minutes:,.1f} min<extra></extra>",
                )
            )  # fmt: skip
    figure.update_layout(barmode="stack", showlegend=True, legend={**LEGEND_ON_TOP, "y": 1.05})
    figure.update_xaxes(title_text="worker minutes")
    return make_chart("Compute by status", figure, 190, "Time of all workers, by status of the trial.")


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _label(name: str) -> str:
    return escape_label(name, _LABEL_CHARS)
