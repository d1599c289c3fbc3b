"""A stop request reaches all workers after the same step, saves it, and does not change the curve."""

import os
import signal
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


class _Control:
    """Driver that requests a stop at the n-th question."""

    def __init__(self, stop_at: int) -> None:
        self.questions = 0
        self.stop_at = stop_at
        self.training = [False]

    def set_training(self, training: bool) -> None:
        self.training.append(training)

    def is_stop_requested(self) -> bool:
        self.questions += 1
        return self.questions >= self.stop_at


def _decide(stop_at: int, drained_at: int, calls: int) -> Any:
    """Call `should_stop` on all ranks; return the decisions by rank, and what the driver was told about training."""
    import torch.distributed as dist

    preemption._POLL_CONTROL_S = preemption._POLL_PREEMPTION_S = 0.0
    questions = iter(range(1, calls + 1))
    control: Any = _Control(stop_at)
    stop_signal = StopSignal(control, lambda: next(questions) >= drained_at)
    decisions = []
    for _ in range(calls):
        if dist.get_rank() == 1:
            time.sleep(0.01)  # ranks are out of step
        decisions.append(stop_signal.should_stop())
    stop_signal.close()
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, decisions)
    return {"ranks": by_rank, "training": control.training}


def test_stop_request_reaches_all_workers_after_the_same_step() -> None:
    answer = run_group(3, _decide, 4, 99, 7)
    # Requested before the broadcast of the fourth step, read with the fifth; requested ever after.
    assert answer["ranks"] == [[False] * 4 + [True] * 3] * 3
    assert answer["training"] == [False, True, False], "a stop is handled from the first step to the last"


def test_drained_node_stops_all_workers() -> None:
    ranks = run_group(2, _decide, 99, 2, 5)["ranks"]
    assert ranks == [[False, False, True, True, True]] * 2


def _train(prepared: PreparedJob, stop_at: int) -> Any:
    preemption._POLL_CONTROL_S = 0.0
    control: Any = _Control(stop_at)
    stop_signal = StopSignal(control, lambda: False)
    answer = train_here(prepared, leave=stop_signal.should_stop)
    stop_signal.close()
    return answer


@pytest.mark.parametrize("zero", [*(pytest.param(zero, marks=pytest.mark.long) for zero in (0, 2)), 3])
def test_resume_after_a_stop_matches_uninterrupted_run(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    data = write_splits(tmp_path / "data", train=200, validation=20)
    sections: dict[str, Any] = {"parallel": {"zero": zero}, "evaluation": {"every_steps": 5}}
    whole = run_group(2, train_here, prepared_job(tiny_bert, data, tmp_path / "whole", **sections))
    parts = prepared_job(tiny_bert, data, tmp_path / "parts", **sections)
    first = run_group(2, _train, parts, 7)
    assert first["result"] is None
    stopped = catalog.latest_step(parts.run)
    assert 7 <= stopped <= 9 and [step for step, _ in first["lines"]] == list(range(1, stopped + 1))
    second = run_group(2, _train, parts, 999)
    assert first["lines"] + second["lines"] == whole["lines"]
    assert second["result"]["steps"] == whole["result"]["steps"]


def test_stop_after_the_last_step_completes_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = prepared_job(tiny_bert, write_splits(tmp_path / "data", train=22), tmp_path / "runs")
    assert run_group(2, _train, prepared, 1)["result"]["steps"] == 2 == prepared.plan.total_steps


def test_errors_of_the_work_are_raised() -> None:
    def fail() -> None:
        raise TrainingError("no")

    with pytest.raises(TrainingError, match="no"):
        run_interruptibly(fail, lambda: True)
    run_interruptibly(lambda: None, lambda: True)


@pytest.mark.parametrize(
    ("signals", "can_save", "is_forced"),
    [(1, True, False), (2, True, True), (1, False, True)],
    ids=["first signal waits", "second signal stops at once", "nothing can be saved"],
)
def test_signals_stop_the_work(signals: int, can_save: bool, is_forced: bool) -> None:
    requests: list[bool] = []

    def request_stop() -> bool:
        requests.append(can_save)
        return can_save

    def send() -> None:
        for _ in range(signals):
            time.sleep(0.25)
            os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    started_at = time.monotonic()
    sender.start()
    was_forced = False
    try:
        run_interruptibly(lambda: time.sleep(2.0), request_stop)
    except ForcedStop:
        was_forced = True
    took = time.monotonic() - started_at
    sender.join()
    assert len(requests) == 1
    assert was_forced == is_forced and (took < 1.5 if is_forced else took >= 2.0)
