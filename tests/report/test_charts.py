"""The charts of a run's report: content and size (`launcher/report/charts.py`)."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from launcher.report.charts import MAX_POINTS, make_confusion_chart, make_curve_charts, make_time_chart, smooth, thin
from launcher.report.collect import collect
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ConfusionMatrix, TimesRecord


def _matrix(size: int) -> ConfusionMatrix:
    counts = tuple(tuple(9 if i == j else 1 for j in range(size)) for i in range(size))
    return ConfusionMatrix(labels=tuple(f"<b>{i}" for i in range(size)), counts=counts)


def _heat_map(matrix: ConfusionMatrix) -> Any:
    chart = make_confusion_chart(matrix)
    assert chart is not None
    return json.loads(chart.json)


def test_thin_keeps_short_curves() -> None:
    assert thin([1, 2, 3], [0.1, 0.2, 0.3]) == ([1, 2, 3], [0.1, 0.2, 0.3])


def test_thin_keeps_ends_and_spikes() -> None:
    xs = list(range(1, 100_001))
    ys = [math.sin(x / 900) for x in xs]
    ys[41_234], ys[77_777] = 9.0, -9.0
    thin_x, thin_y = thin(xs, ys)
    assert len(thin_x) <= MAX_POINTS
    assert (thin_x[0], thin_x[-1]) == (1, 100_000)
    assert thin_x == sorted(set(thin_x))
    assert (max(thin_y), min(thin_y)) == (9.0, -9.0)
    assert all(ys[x - 1] == y for x, y in zip(thin_x, thin_y, strict=True))


def test_thin_keeps_gaps() -> None:
    ys = [0.5] * 10_000
    ys[4000:6000] = [math.nan] * 2000
    _, thinned = thin(range(10_000), ys)
    assert any(math.isnan(y) for y in thinned) and sum(y == 0.5 for y in thinned) > 500


def test_smooth_starts_at_the_first_value_and_skips_non_finite_values() -> None:
    assert smooth([4.0, 4.0, 4.0], 5) == [4.0, 4.0, 4.0]
    smoothed = smooth([1.0, math.nan, 1.0], 5)
    assert smoothed[0] == 1.0 and math.isnan(smoothed[1]) and smoothed[2] == 1.0


def test_no_charts_before_the_first_record(begun: RunDir) -> None:
    assert make_curve_charts(collect(begun)) == ()


def test_curves_of_a_classifier(make_run: Callable[..., RunDir]) -> None:
    charts = make_curve_charts(collect(make_run("done", ("a", "b"), steps=3000)))
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
    titles = [chart.title for chart in make_curve_charts(collect(make_run("done", steps=20)))]
    assert titles[1:4] == ["Validation metrics", "Validation mse", "Validation rmse"]


def test_nine_metrics_differ_in_colour_or_dashes(make_run: Callable[..., RunDir]) -> None:
    data = collect(make_run("done", ("a", "b"), steps=20))
    metrics = {f"metric{i}": i / 10 for i in range(9)}
    evaluations = tuple(line.model_copy(update={"metrics": metrics}) for line in data.evaluations)
    chart = make_curve_charts(replace(data, evaluations=evaluations))[1]
    lines = [trace["line"] for trace in json.loads(chart.json)["data"] if trace["name"] in metrics]
    assert len({(line["color"], line["dash"]) for line in lines}) == 9


def test_no_gradient_norm_chart_without_gradient_norms(make_run: Callable[..., RunDir]) -> None:
    run = make_run("done", ("a", "b"), steps=20)
    lines = [line.model_copy(update={"grad_norm": None}) for line in run.read_metrics() if line.kind == "step"]
    run.delete("metrics.jsonl")
    run.append_metrics(lines)
    assert [chart.title for chart in make_curve_charts(collect(run))] == ["Loss", "Learning rate", "Throughput"]


def test_confusion_shows_counts_and_row_percentages() -> None:
    trace = _heat_map(_matrix(3))["data"][0]
    assert trace["text"][0] == ["9<br>82 %", "1<br>9 %", "1<br>9 %"]
    assert trace["z"][0] == [81.82, 9.09, 9.09]
    assert trace["customdata"][0] == [9, 1, 1]


def test_confusion_labels_are_escaped() -> None:
    assert _heat_map(_matrix(3))["layout"]["xaxis"]["ticktext"][0] == "&lt;b&gt;0"


def test_confusion_of_more_classes_shows_less_text() -> None:
    assert _heat_map(_matrix(20))["data"][0]["text"][0][0] == "9"
    assert "text" not in _heat_map(_matrix(40))["data"][0] and "texttemplate" not in _heat_map(_matrix(40))["data"][0]
    assert _heat_map(_matrix(100))["layout"]["height"] < 1600
    assert make_confusion_chart(_matrix(101)) is None


def test_a_class_without_rows_has_no_percentage() -> None:
    figure = _heat_map(ConfusionMatrix(labels=("a", "b"), counts=((0, 0), (1, 3))))
    assert figure["data"][0]["z"] == [[None, None], [25.0, 75.0]]


def _times(data_s: tuple[float, ...], seconds: float = 10.0, communication_s: tuple[float, ...] = ()) -> TimesRecord:
    rest = tuple(0.5 for _ in data_s)
    return TimesRecord(
        step=1, steps=1, seconds=seconds, data_s=data_s, communication_s=communication_s, evaluation_s=rest,
        checkpoint_s=rest,
    )  # fmt: skip


def _bars(*lines: TimesRecord) -> dict[str, dict[str, list[float]]]:
    chart = make_time_chart(lines)
    assert chart is not None
    return {bar["name"]: bar for bar in json.loads(chart.json)["data"]}


def test_the_parts_of_a_bar_add_up_to_the_total_time() -> None:
    bars = _bars(_times((1.0, 2.0)), _times((1.0, 4.0)))
    assert bars["waiting for data"]["x"] == [2.0, 6.0]
    assert bars["computing"]["x"] == [16.0, 12.0]
    assert [sum(bar["x"][rank] for bar in bars.values()) for rank in (0, 1)] == [20.0, 20.0]


def test_the_worker_that_waited_longest_is_named() -> None:
    chart = make_time_chart([_times((1.0, 1.2))])
    assert chart is not None and chart.note == "Rank 1 waited longest for data: 1.2 s, 12.0 % of the time."


def test_the_slowest_worker_is_named() -> None:
    chart = make_time_chart([_times((0.0, 0.0, 0.0), communication_s=(4.0, 1.0, 3.5))])
    assert chart is not None
    assert chart.note.endswith(" Rank 1 is the slowest: all wait for it, 3.0 s longer than for rank 0.")
    bars = {bar["name"]: bar["x"] for bar in json.loads(chart.json)["data"]}
    assert bars["waiting for other workers"] == [4.0, 1.0, 3.5] and bars["computing"] == [5.0, 8.0, 5.5]


def test_a_time_chart_shows_the_latest_number_of_workers() -> None:
    bars = _bars(_times((1.0, 2.0, 3.0)), _times((1.0, 2.0)))
    assert bars["waiting for data"]["y"] == ["rank 0", "rank 1"]
    assert bars["waiting for data"]["x"] == [1.0, 2.0]


def test_of_many_workers_the_fastest_and_slowest_are_shown() -> None:
    waits = tuple(float(rank) for rank in range(200))
    bars = _bars(_times(waits, seconds=1000.0))
    assert len(bars["computing"]["y"]) == 40
    assert bars["computing"]["y"][0] == "rank 0" and bars["computing"]["y"][-1] == "rank 199"


def test_no_time_chart_without_records() -> None:
    assert make_time_chart([]) is None
