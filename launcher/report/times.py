"""Where a run's time went, worker by worker, as a figure. Pure; runs on the client or the head."""

from collections.abc import Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly ships no types

from launcher.report.charts import AMBER, BLUE, GREEN, GREY, ORANGE, Chart, chart
from launcher.rundir.records import TimesRecord

_MAX_RANKS = 40
"""Beyond this many workers the bars of those that computed longest, and shortest, tell enough."""
_UNEVEN = 0.1
"""Share by which the slowest worker may compute longer than the fastest before it is named."""


def time_chart(times: Sequence[TimesRecord]) -> Chart | None:
    """A bar per worker: computing, waiting for data and for others, the rest; None where nothing was timed."""
    # A run that went on with another number of workers has lines of both; the latest number is shown.
    if not times:
        return None
    times = [line for line in times if len(line.data_s) == len(times[-1].data_s)]
    seconds = sum(line.seconds for line in times)
    width = len(times[0].data_s)
    data, communication, evaluation, checkpoint = (
        [sum(values) for values in zip(*(getattr(line, name) or (0.0,) * width for line in times), strict=True)]
        for name in ("data_s", "communication_s", "evaluation_s", "checkpoint_s")
    )
    waits = zip(data, communication, evaluation, checkpoint, strict=True)
    computing = [max(0.0, seconds - sum(of_rank)) for of_rank in waits]
    ranks = _shown(computing)
    parts = {
        "computing": (computing, BLUE),
        "waiting for other workers": (communication, GREEN),
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
    return chart("Where the time goes", figure, 150 + 26 * len(ranks), _note(data, computing, seconds))


def _shown(computing_s: Sequence[float]) -> list[int]:
    """Ranks that get a bar, in order."""
    if len(computing_s) <= _MAX_RANKS:
        return list(range(len(computing_s)))
    by_time = sorted(range(len(computing_s)), key=lambda rank: computing_s[rank])
    return sorted([*by_time[: _MAX_RANKS // 2], *by_time[-_MAX_RANKS // 2 :]])


def _note(data_s: Sequence[float], computing_s: Sequence[float], seconds: float) -> str:
    count = len(data_s)
    waited = max(range(count), key=lambda rank: data_s[rank])
    share = 100 * data_s[waited] / seconds if seconds else 0.0
    said = f"Rank {waited} waited longest for data: {data_s[waited]:.1f} s, {share:.1f} % of the time."
    slowest, fastest = (choose(range(count), key=lambda rank: computing_s[rank]) for choose in (max, min))
    more = computing_s[slowest] - computing_s[fastest]
    if computing_s[fastest] and more > _UNEVEN * computing_s[fastest]:
        said += (
            f" Rank {slowest} is the slowest: it computed {more:.1f} s longer than rank {fastest}, for which all wait."
        )
    if count > _MAX_RANKS:
        said += f" {_MAX_RANKS} of {count} workers: those that computed shortest and longest."
    return said
