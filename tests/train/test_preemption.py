"""A wish to stop reaches all workers after the same step, saves it, and costs the curve nothing."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.driver.prepare import PreparedJob
from launcher.driver.signals import ForcedStop, run_interruptibly
from launcher.errors import TrainingError
from launcher.train import preemption
from launcher.train.checkpoint import catalog
from launcher.train.preemption import StopSignal
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here


class _Caller:
    """Asks for a stop at the given question."""

    def __init__(self, at: int) -> None:
        self.asked, self.at, self.told = 0, at, [False]

    def set_training(self, training: bool) -> None:
        self.told.append(training)

    def is_stop_requested(self) -> bool:
        self.asked += 1
        return self.asked >= self.at


def _leaves(stop_at: int, preempted_at: int, calls: int) -> Any:
    """For each call, whether to leave, as every rank saw it; and what the caller was told."""
    import torch.distributed as dist

    preemption._POLL_CONTROL_S = preemption._POLL_PREEMPTION_S = 0.0
    looks = iter(range(1, calls + 1))
    caller = _Caller(stop_at)
    notices = StopSignal(caller, lambda: next(looks) >= preempted_at)
    mine = []
    for _ in range(calls):
        if dist.get_rank() == 1:
            time.sleep(0.01)  # out of step, as workers are
        mine.append(notices.should_stop())
    notices.close()
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return {"ranks": everybody, "told": caller.told}


def test_all_workers_leave_after_the_same_step() -> None:
    found = run_group(3, _leaves, 4, 99, 7)
    # Asked before the fourth step's word, read with the fifth; asked again ever after.
    assert found["ranks"] == [[False] * 4 + [True] * 3] * 3
    assert found["told"] == [False, True, False], "a stop is heard from the first step to the last"


def test_a_node_that_goes_away_is_a_reason_too() -> None:
    ranks = run_group(2, _leaves, 99, 2, 5)["ranks"]
    assert ranks == [[False, False, True, True, True]] * 2


def _whole(prepared: PreparedJob) -> Any:
    return train_here(prepared)


def _stopped(prepared: PreparedJob, questions: int) -> Any:
    preemption._POLL_CONTROL_S = 0.0
    notices = StopSignal(_Caller(questions), lambda: False)
    found = train_here(prepared, leave=notices.should_stop)
    notices.close()
    return found


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_stopped_run_goes_on_as_if_nothing_was(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    data = write_splits(tmp_path / "data", train=200, validation=20)
    sections: dict[str, Any] = {"parallel": {"zero": zero}, "evaluation": {"every_steps": 5}}
    whole = prepared_job(tiny_bert, data, tmp_path / "whole", **sections)
    parts = prepared_job(tiny_bert, data, tmp_path / "parts", **sections)
    expected = run_group(2, _whole, whole)
    first = run_group(2, _stopped, parts, 7)
    assert first["result"] is None
    stopped = catalog.latest_step(parts.run)
    assert 7 <= stopped <= 9 and [step for step, _ in first["lines"]] == list(range(1, stopped + 1))
    second = run_group(2, _stopped, parts, 999)
    assert first["lines"] + second["lines"] == expected["lines"]
    assert second["result"]["steps"] == expected["result"]["steps"]


def test_a_stop_after_the_last_step_is_no_stop(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = prepared_job(tiny_bert, write_splits(tmp_path / "data", train=22), tmp_path / "runs")
    found = run_group(2, _stopped, prepared, 1)
    assert found["result"]["steps"] == 2 == prepared.plan.total_steps


def test_waiting_passes_on_what_was_raised() -> None:
    def fail() -> None:
        raise TrainingError("no")

    with pytest.raises(TrainingError, match="no"):
        run_interruptibly(fail, lambda: True)
    run_interruptibly(lambda: None, lambda: True)


def _signalled(signals: int, training: bool) -> tuple[list[str], float]:
    """What happened when so many SIGTERMs came during half a second of work."""
    import os
    import signal

    seen: list[str] = []

    def ask() -> bool:
        seen.append("asked")
        return training

    def send() -> None:
        for _ in range(signals):
            time.sleep(0.25)
            os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    began = time.monotonic()
    sender.start()
    try:
        run_interruptibly(lambda: time.sleep(2.0), ask)
    except ForcedStop:
        seen.append("at once")
    took = time.monotonic() - began
    sender.join()
    return seen, took


def test_the_first_signal_asks_and_waits() -> None:
    seen, took = _signalled(1, True)
    assert seen == ["asked"] and took >= 2.0


def test_the_second_signal_stops_at_once() -> None:
    seen, took = _signalled(2, True)
    assert seen == ["asked", "at once"] and took < 1.5


def test_nothing_is_waited_for_where_nothing_can_be_saved() -> None:
    seen, took = _signalled(1, False)
    assert seen == ["asked", "at once"] and took < 1.5
