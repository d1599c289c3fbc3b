"""Seconds by phase."""

import time
from collections.abc import Iterator

import pytest

from launcher.train.timer import PHASES, Timer


def test_waiting_for_items_is_counted_and_work_on_them_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    timer = Timer()
    seen = []
    for number in timer.waiting(slow()):
        seen.append(number)
        time.sleep(0.05)
    with timer.phase("checkpoint"):
        time.sleep(0.03)
    seconds, phases = timer.take()
    spent = dict(zip(PHASES, phases, strict=True))
    assert seen == [0, 1, 2]
    assert 0.06 <= spent["data"] < 0.15 and spent["evaluation"] == 0 and spent["checkpoint"] >= 0.03
    assert seconds >= sum(phases) + 0.15


def test_taking_begins_anew() -> None:
    timer = Timer()
    with pytest.raises(ValueError, match="no"), timer.phase("evaluation"):
        raise ValueError("no")
    timer.take()
    assert timer.take()[1] == (0.0, 0.0, 0.0)
