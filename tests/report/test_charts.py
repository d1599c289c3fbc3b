"""The figures: what they hold, and how little of it."""

import json
import math
from collections.abc import Callable
from typing import Any

from launcher.report.charts import MAX_POINTS, confusion, curves, smooth, thin
from launcher.report.collect import collect
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ConfusionMatrix


def square(size: int) -> ConfusionMatrix:
    counts = tuple(tuple(9 if i == j else 1 for j in range(size)) for i in range(size))
    return ConfusionMatrix(labels=tuple(f"<b>{i}" for i in range(size)), counts=counts)


def heat(size: int) -> dict[str, Any]:
    chart = confusion(square(size))
    assert chart is not None
    figure: dict[str, Any] = json.loads(chart.json)
    return figure


def test_thin_leaves_short_curves_alone() -> None:
    assert thin([1, 2, 3], [0.1, 0.2, 0.3]) == ([1, 2, 3], [0.1, 0.2, 0.3])


def test_thin_keeps_ends_and_spikes() -> None:
    xs = list(range(1, 100_001))
    ys = [math.sin(x / 900) for x in xs]
    ys[41_234], ys[77_777] = 9.0, -9.0
    kept_x, kept_y = thin(xs, ys)
    assert len(kept_x) <= MAX_POINTS
    assert (kept_x[0], kept_x[-1]) == (1, 100_000)
    assert kept_x == sorted(set(kept_x))
    assert (max(kept_y), min(kept_y)) == (9.0, -9.0)
    assert all(ys[x - 1] == y for x, y in zip(kept_x, kept_y, strict=True))


def test_thin_keeps_a_hole_as_a_hole() -> None:
    ys = [0.5] * 10_000
    ys[4000:6000] = [math.nan] * 2000
    _, kept = thin(range(10_000), ys)
    assert any(math.isnan(y) for y in kept) and sum(y == 0.5 for y in kept) > 500


def test_smooth_starts_at_the_first_value_and_skips_what_is_not_finite() -> None:
    assert smooth([4.0, 4.0, 4.0], 5) == [4.0, 4.0, 4.0]
    smoothed = smooth([1.0, math.nan, 1.0], 5)
    assert smoothed[0] == 1.0 and math.isnan(smoothed[1]) and smoothed[2] == 1.0


def test_no_charts_before_anything_is_logged(begun: RunDir) -> None:
    assert curves(collect(begun)) == ()


def test_curves_of_a_classifier(make_run: Callable[..., RunDir]) -> None:
    charts = curves(collect(make_run("done", ("a", "b"), steps=3000)))
    titles = [chart.title for chart in charts]
    assert titles == ["Loss", "Validation metrics", "Learning rate", "Throughput", "Gradient norm"]
    loss = json.loads(charts[0].json)
    assert [trace["name"] for trace in loss["data"]] == [
        "training, each step",
        "training, mean of ~100 steps",
        "validation",
    ]
    assert all(len(trace["x"]) <= MAX_POINTS for chart in charts for trace in json.loads(chart.json)["data"])
    assert len(loss["layout"]["shapes"]) == 2, "two epoch ends inside three epochs"
    star = json.loads(charts[1].json)["data"][-1]
    assert (star["x"], star["marker"]["symbol"]) == ([2100], "star")


def test_metrics_on_another_scale_have_their_own_chart(make_run: Callable[..., RunDir]) -> None:
    titles = [chart.title for chart in curves(collect(make_run("done", steps=20)))]
    assert titles[1:4] == ["Validation metrics", "Validation mse", "Validation rmse"]


def test_no_gradient_norm_where_the_engine_does_not_tell(make_run: Callable[..., RunDir]) -> None:
    run = make_run("done", ("a", "b"), steps=20)
    lines = [line.model_copy(update={"grad_norm": None}) for line in run.read_metrics() if line.kind == "step"]
    run.delete("metrics.jsonl")
    run.append_metrics(lines)
    assert [chart.title for chart in curves(collect(run))] == ["Loss", "Learning rate", "Throughput"]


def test_confusion_shows_counts_and_row_percentages() -> None:
    trace = heat(3)["data"][0]
    assert trace["text"][0] == ["9<br>82 %", "1<br>9 %", "1<br>9 %"]
    assert trace["z"][0] == [81.82, 9.09, 9.09]
    assert trace["customdata"][0] == [9, 1, 1]


def test_confusion_labels_are_no_markup() -> None:
    assert heat(3)["layout"]["xaxis"]["ticktext"][0] == "&lt;b&gt;0"


def test_confusion_of_more_classes_shows_less_text() -> None:
    assert heat(20)["data"][0]["text"][0][0] == "9"
    assert "text" not in heat(40)["data"][0] and "texttemplate" not in heat(40)["data"][0]
    assert heat(100)["layout"]["height"] < 1600
    assert confusion(square(101)) is None


def test_a_class_without_rows_has_no_percentage() -> None:
    chart = confusion(ConfusionMatrix(labels=("a", "b"), counts=((0, 0), (1, 3))))
    assert chart is not None
    assert json.loads(chart.json)["data"][0]["z"] == [[None, None], [25.0, 75.0]]
