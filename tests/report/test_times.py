"""The bars that tell where the time went."""

import json

from launcher.report.times import time_chart
from launcher.rundir.records import TimesRecord


def _times(data_s: tuple[float, ...], seconds: float = 10.0, communication_s: tuple[float, ...] = ()) -> TimesRecord:
    rest = tuple(0.5 for _ in data_s)
    return TimesRecord(
        step=1, steps=1, seconds=seconds, data_s=data_s, communication_s=communication_s, evaluation_s=rest,
        checkpoint_s=rest,
    )  # fmt: skip


def _bars(*lines: TimesRecord) -> dict[str, dict[str, list[float]]]:
    chart = time_chart(lines)
    assert chart is not None
    return {bar["name"]: bar for bar in json.loads(chart.json)["data"]}


def test_a_bar_adds_up_to_the_time_there_was() -> None:
    bars = _bars(_times((1.0, 2.0)), _times((1.0, 4.0)))
    assert bars["waiting for data"]["x"] == [2.0, 6.0]
    assert bars["computing"]["x"] == [16.0, 12.0]
    assert [sum(bar["x"][rank] for bar in bars.values()) for rank in (0, 1)] == [20.0, 20.0]


def test_the_one_who_waited_longest_is_named() -> None:
    chart = time_chart([_times((1.0, 1.2))])
    assert chart is not None and chart.note == "Rank 1 waited longest for data: 1.2 s, 12.0 % of the time."


def test_the_slowest_is_named() -> None:
    chart = time_chart([_times((0.0, 0.0, 0.0), communication_s=(4.0, 1.0, 3.5))])
    assert chart is not None
    assert chart.note.endswith(" Rank 1 is the slowest: it computed 3.0 s longer than rank 0, for which all wait.")
    bars = {bar["name"]: bar["x"] for bar in json.loads(chart.json)["data"]}
    assert bars["waiting for other workers"] == [4.0, 1.0, 3.5] and bars["computing"] == [5.0, 8.0, 5.5]


def test_after_a_change_of_workers_the_latest_number_is_shown() -> None:
    bars = _bars(_times((1.0, 2.0, 3.0)), _times((1.0, 2.0)))
    assert bars["waiting for data"]["y"] == ["rank 0", "rank 1"]
    assert bars["waiting for data"]["x"] == [1.0, 2.0]


def test_of_many_workers_the_extremes_are_shown() -> None:
    waits = tuple(float(rank) for rank in range(200))
    bars = _bars(_times(waits, seconds=1000.0))
    assert len(bars["computing"]["y"]) == 40
    assert bars["computing"]["y"][0] == "rank 0" and bars["computing"]["y"][-1] == "rank 199"


def test_nothing_timed_is_no_chart() -> None:
    assert time_chart([]) is None
