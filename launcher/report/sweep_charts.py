"""The charts of a sweep's report as plotly figures. Pure; runs on the client or the head."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types
from pydantic import JsonValue

from launcher.report.charts import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY, Chart, chart
from launcher.report.numbers import clip, number
from launcher.report.sweep_axes import axis, bin_of, is_log, is_range, place_of, text_of, ticks
from launcher.rundir.trials import SweepRecord, TrialEvaluation, TrialRecord

_PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER)
_STATUS = {"finished": BLUE, "running": GREEN, "pruned": GREY, "failed": ORANGE}
# Five colours from bad to good (a cut of viridis): groups of trials that are told apart on white and on black.
_GOOD = ("#5b4a8a", "#3b7c8f", "#2ba17c", "#86c043", "#f2b01e")
_MAX_POINTS = 2000
"""Points of all curves together: the page stays small at any number of trials."""
_NAMED = 120
"""Beyond so many trials a chart does not tell them apart by name."""


def charts(record: SweepRecord, trials: Sequence[TrialRecord]) -> tuple[Chart, ...]:
    """Every chart there is data for."""
    seen = [t for t in trials if t.best(record.mode) is not None]
    if not seen:
        return ()
    found = [_curves(record, seen)]
    keys = list(record.importances) or list(record.space)
    numeric = [key for key in record.space if is_range(record, key)]
    other = next((key for key in record.space if not is_range(record, key)), None)
    for key in numeric:
        colour = other or next((k for k in keys if k != key), None)
        found.append(_scatter(record, seen, key, colour))
    if len(record.space) > 1:
        first = numeric[0] if numeric else keys[0]
        second = other if other not in (None, first) else next(k for k in [*keys, *record.space] if k != first)
        found += [_heat(record, seen, first, str(second)), _parallel(record, seen)]
    if record.importances:
        found.append(_importance(record))
    found.append(_compute(trials))
    return tuple(found)


def _value(record: SweepRecord, trial: TrialRecord) -> float:
    best = trial.best(record.mode)
    assert best is not None
    return best.value


def _curves(record: SweepRecord, trials: Sequence[TrialRecord]) -> Chart:
    """Every trial's metric over its progress; the best strong, pruned ones faded."""
    figure = go.Figure()
    each = max(2, _MAX_POINTS // len(trials))
    best, others = trials[0], trials[1:]
    groups = [[t] for t in others] if len(trials) <= _NAMED else [
        [t for t in others if t.status == status] for status in _STATUS
    ]  # fmt: skip
    for members in [*(group for group in groups if group), [best]]:
        first, strong = members[0], members == [best]
        xs: list[float | None] = []
        ys: list[float | None] = []
        for trial in members:
            looks = _thinned(trial.evaluations, each)
            xs += [*(round(look.progress, 1) for look in looks), None]
            ys += [*(_short(look.value) for look in looks), None]
        name = f"trial {first.number} ({first.status})" if len(members) == 1 else first.status
        figure.add_trace(
            go.Scatter(
                x=xs[:-1],
                y=ys[:-1],
                mode="lines+markers" if len(trials) <= 60 else "lines",
                line={"color": AMBER if strong else _STATUS[first.status], "width": 3 if strong else 1.5},
                marker={"size": 5},
                opacity=1.0 if strong else 0.3 if first.status in ("pruned", "failed") else 0.75,
                hovertemplate=f"{name}<br>%{{x:.0f}} %: %{{y}}<extra></extra>",
            )
        )
    figure.update_layout(showlegend=False, hovermode="closest")
    figure.update_xaxes(title_text="progress of the trial, %", range=[0, 102])
    figure.update_yaxes(automargin=True)
    note = f"Strong: the best, trial {trials[0].number}. Blue finished, green at work, grey stopped early."
    return chart(f"Validation {record.metric}, all trials", figure, 380, note)


def _thinned(looks: Sequence[TrialEvaluation], limit: int) -> Sequence[TrialEvaluation]:
    kept = looks[:: max(1, -(-len(looks) // limit))]
    return kept if kept[-1] == looks[-1] else (*kept, looks[-1])


def _scatter(record: SweepRecord, trials: Sequence[TrialRecord], key: str, colour: str | None) -> Chart:
    """One key against the metric, coloured by another."""
    figure = go.Figure()
    groups = _groups(record, trials, colour)
    for index, (name, members) in enumerate(groups.items()):
        figure.add_trace(
            go.Scatter(
                x=[_rounded(trial.params[key]) for trial in members],
                y=[_short(_value(record, trial)) for trial in members],
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
        showlegend=colour is not None, hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": {"text": _label(colour or "")}},
    )  # fmt: skip
    figure.update_xaxes(title_text=_label(key), type="log" if is_log(record, key) else "linear", exponentformat="power")
    figure.update_yaxes(title_text=_label(record.metric), automargin=True)
    return chart(f"{_label(key)} against {record.metric}", figure, 360, "Filled: finished. Open: stopped early.")


def _groups(record: SweepRecord, trials: Sequence[TrialRecord], key: str | None) -> dict[str, list[TrialRecord]]:
    if key is None:
        return {"all": list(trials)}
    names = [name for name in axis(record, trials, key) if any(bin_of(record, key, t) == name for t in trials)]
    return {name: [t for t in trials if bin_of(record, key, t) == name] for name in names}


def _heat(record: SweepRecord, trials: Sequence[TrialRecord], x: str, y: str) -> Chart:
    """The best metric in each cell of two keys."""
    xs, ys = axis(record, trials, x), axis(record, trials, y)
    pick = max if record.mode == "max" else min
    cells: dict[tuple[str, str], list[float]] = {}
    for trial in trials:
        cells.setdefault((bin_of(record, x, trial), bin_of(record, y, trial)), []).append(_value(record, trial))
    best = [[_short(pick(cells[a, b])) if (a, b) in cells else None for a in xs] for b in ys]
    counts = [[len(cells.get((a, b), ())) for a in xs] for b in ys]
    figure = go.Figure(
        go.Heatmap(
            x=[_label(name) for name in xs],
            y=[_label(name) for name in ys],
            z=best,
            customdata=counts,
            text=[["" if v is None else number(v) for v in row] for row in best],
            texttemplate="%{text}",
            xgap=2,
            ygap=2,
            hovertemplate="%{x}, %{y}<br>best %{z}, %{customdata} trials<extra></extra>",
            colorbar={"thickness": 12, "outlinewidth": 0},
            reversescale=record.mode == "min",
        )
    )
    figure.update_xaxes(title_text=_label(x), type="category", automargin=True)
    figure.update_yaxes(title_text=_label(y), type="category", automargin=True)
    return chart(
        f"{_label(x)} and {_label(y)}", figure, 170 + 56 * len(ys), f"The best {record.metric} of the trials in a cell."
    )


def _parallel(record: SweepRecord, trials: Sequence[TrialRecord]) -> Chart:
    """A line per trial across all keys, coloured from bad to good in five groups."""
    keys = list(record.space)
    ranked = list(reversed(trials))  # the best are drawn last, on top
    figure = go.Figure()
    groups = min(len(_GOOD), len(ranked))
    values = [_value(record, trial) for trial in trials]
    low, high = min(values), max(values)
    for group in range(groups):
        members = ranked[len(ranked) * group // groups : len(ranked) * (group + 1) // groups]
        xs: list[int | None] = []
        ys: list[float | None] = []
        texts: list[str | None] = []
        for trial in members:
            value = _value(record, trial)
            share = 0.5 if high == low else (value - low) / (high - low)
            places = [*(place_of(record, key, trial.params[key]) for key in keys), share]
            xs += [*range(len(places)), None]
            ys += [*(round(place, 3) for place in places), None]
            said = [f"trial {trial.number}<br>{_label(key)} {_label(text_of(trial.params[key]))}" for key in keys]
            texts += [*said, f"trial {trial.number}<br>{_label(record.metric)} {number(value)}", None]
        hover = {"text": texts, "hovertemplate": "%{text}<extra></extra>"}
        if len(trials) > _NAMED:
            hover = {"hoverinfo": "skip"}
        name = "best" if group == groups - 1 else "worst" if group == 0 else f"fifth {group + 1}"
        figure.add_trace(
            go.Scatter(
                x=xs, y=ys, mode="lines+markers" if len(trials) <= _NAMED else "lines", name=name,
                line={"color": _GOOD[len(_GOOD) - groups + group], "width": 2}, marker={"size": 5},
                opacity=0.9 if group == groups - 1 else 0.45,
                **hover,
            )
        )  # fmt: skip
    for index, key in enumerate(keys):
        figure.add_vline(x=index, line={"color": GREY, "width": 1})
        for place, name in ticks(record, key):
            figure.add_annotation(
                x=index, y=place, text=_label(name), showarrow=False, xanchor="left", xshift=5, font={"size": 11}
            )
    for place, end in ((0.0, low), (1.0, high)):
        figure.add_annotation(
            x=len(keys), y=place, text=number(end), showarrow=False, xanchor="left", xshift=5, font={"size": 11}
        )
    figure.add_vline(x=len(keys), line={"color": GREY, "width": 1})
    names = [_label(name) for name in (*keys, record.metric)]
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=names,
        showgrid=False,
        range=[-0.1, len(keys) + 0.35],
    )
    figure.update_yaxes(visible=False, range=[-0.08, 1.08])
    figure.update_layout(
        hovermode="closest", legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, showlegend=groups > 1
    )
    return chart(
        "Parallel coordinates", figure, 400, "A line per trial; colours from the worst fifth to the best.", wide=True
    )


def _importance(record: SweepRecord) -> Chart:
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
    note = "Share of the metric's variation that each key explains (PED-ANOVA, arXiv:2304.10255)."
    return chart("What matters", figure, 110 + 44 * len(names), note)


def _compute(trials: Sequence[TrialRecord]) -> Chart:
    """Worker time by what became of the trials."""
    figure = go.Figure()
    for status, colour in _STATUS.items():
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
    figure.update_layout(
        barmode="stack", showlegend=True, legend={"orientation": "h", "x": 0, "y": 1.05, "yanchor": "bottom"}
    )
    figure.update_xaxes(title_text="worker minutes")
    return chart("Where the compute went", figure, 190, "Time of all workers, by what became of the trial.")


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _rounded(value: JsonValue) -> JsonValue:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _label(name: str) -> str:
    """As plotly text, which reads a subset of HTML."""
    return html.escape(clip(name, 40), quote=False)
