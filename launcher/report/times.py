"""Where a run's time went, worker by worker, as a figure. Pure; runs on the client or the head."""

from collections.abc import Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types

from launcher.records import TimesRecord
from launcher.report.charts import AMBER, BLUE, GREY, ORANGE, Chart, chart

_MAX_RANKS = 40
"""Beyond this many workers the bars of those that waited longest, and shortest, for data tell enough."""


def time_chart(times: Sequence[TimesRecord]) -> Chart | None:
    """A bar per worker: steps, waiting for data, evaluations, checkpoints; None where nothing was timed."""
    # A run that went on with another number of workers has lines of both; the latest number is shown.
    if not times:
        return None
    times = [line for line in times if len(line.data_s) == len(times[-1].data_s)]
    seconds = sum(line.seconds for line in times)
    data, evaluation, checkpoint = (
        [sum(values) for values in zip(*(getattr(line, name) for line in times), strict=True)]
        for name in ("data_s", "evaluation_s", "checkpoint_s")
    )
    ranks = _shown(data)
    steps = [max(0.0, seconds - data[r] - evaluation[r] - checkpoint[r]) for r in range(len(data))]
    parts = {
        "steps": (steps, BLUE),
        "waiting for data": (data, ORANGE),
        "evaluations": (evaluation, GREY),
        "checkpoints": (checkpoint, AMBER),
    }
    names = [f"rank {rank}" for rank in ranks]
    figure = go.Figure()
    for name, (values, colour) in parts.items():
        shares = [100 * values[rank] / seconds if seconds else 0.0 for rank in ranks]
        figure.add_bar(
            name=name, y=names, x=[values[rank] for rank in ranks], orientation="h", marker_color=colour,
            customdata=shares, hovertemplate="%{y}: %{x:.1f} s, %{customdata:.1f} %<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        barmode="stack", legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    )
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return chart("Where the time goes", figure, 150 + 26 * len(ranks), _note(data, seconds, len(ranks)))


def _shown(data_s: Sequence[float]) -> list[int]:
    """Ranks that get a bar, in order."""
    if len(data_s) <= _MAX_RANKS:
        return list(range(len(data_s)))
    by_wait = sorted(range(len(data_s)), key=lambda rank: data_s[rank])
    return sorted([*by_wait[: _MAX_RANKS // 2], *by_wait[-_MAX_RANKS // 2 :]])


def _note(data_s: Sequence[float], seconds: float, shown: int) -> str:
    slowest = max(range(len(data_s)), key=lambda rank: data_s[rank])
    share = 100 * data_s[slowest] / seconds if seconds else 0.0
    cut = f" {shown} of {len(data_s)} workers: those that waited shortest and longest." if shown < len(data_s) else ""
    return f"Rank {slowest} waited longest for data: {data_s[slowest]:.1f} s, {share:.1f} % of the time.{cut}"
