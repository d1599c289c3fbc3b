"""Seconds by phase."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.train.loggers.timer import PHASES, Timer
from tests.support.worker_group import run_group


def test_waiting_for_items_counts_as_data_and_work_on_them_does_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    timer = Timer()
    seen = []
    for number in timer.time_data_wait(slow()):
        seen.append(number)
        time.sleep(0.05)
    with timer.phase("checkpoint"):
        time.sleep(0.03)
    seconds, phases = timer.take()
    spent = dict(zip(PHASES, phases, strict=True))
    assert seen == [0, 1, 2]
    assert 0.06 <= spent["data"] < 0.15 and spent["evaluation"] == 0 and spent["checkpoint"] >= 0.03
    assert seconds >= sum(phases) + 0.15


def test_take_resets_the_timer() -> None:
    timer = Timer()
    with pytest.raises(ValueError, match="no"), timer.phase("evaluation"):
        raise ValueError("no")
    timer.take()
    assert timer.take()[1] == (0.0, 0.0, 0.0, 0.0)


def _wait_for_late_ranks(ranks: list[int]) -> Any:
    """Return both ranks' seconds by phase; the late ranks reach each of three collectives 0.3 s after the others."""
    timer, rank = Timer(), dist.get_rank()
    numbers = torch.zeros(4)
    inner = dist.Work.wait
    dist.barrier()
    with timer.time_step():
        if rank in ranks:
            time.sleep(0.3)
        dist.all_reduce(numbers)
        if rank in ranks:
            time.sleep(0.3)
        dist.all_reduce(numbers, async_op=True).wait()
        with timer.phase("evaluation"):
            if rank in ranks:
                time.sleep(0.3)
            dist.all_reduce(numbers)
    assert dist.Work.wait is inner
    dist.all_reduce(numbers)  # outside of the block
    spent: list[Any] = [None, None]
    dist.all_gather_object(spent, dict(zip(PHASES, timer.spent, strict=True)))
    return spent


def test_waiting_for_other_ranks_counts_as_communication() -> None:
    fast, late = run_group(2, _wait_for_late_ranks, [1])
    assert 0.5 < fast["communication"] < 0.9 and 0.25 < fast["evaluation"] < 0.6
    assert late["communication"] < 0.2 and late["evaluation"] > 0.25
