"""Detection of a worker group that hangs, and of the rank that it waits for."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.driver.watchdog import Watchdog
from launcher.rundir.directory import RunDir
from launcher.train import worker_heartbeat
from launcher.train.worker_heartbeat import Heartbeat, WorkerHeartbeat

_ALL_WAIT = ("communication",) * 3


class _Group:
    """A worker group that sends heartbeats under a simulated clock.

    Args:
        limit_s: Limit of its watchdog.
        stages: Stage of each rank.
        step: Step that every rank has done; 7 is one more than at the start.
    """

    def __init__(self, limit_s: float | None = 300, stages: tuple[str, ...] = _ALL_WAIT, step: int = 7) -> None:
        self.now = 0.0
        self.watchdog = Watchdog(limit_s, lambda: self.now)
        self.beats = {rank: Heartbeat(rank, f"node-{rank}", step, 70, stage) for rank, stage in enumerate(stages)}
        self.counts = dict.fromkeys(self.beats, 0)
        self.watchdog.find_hang({0: Heartbeat(0, "node-0", 6, 60, "compute")}, {0: 0})

    def set(self, rank: int, **changes: Any) -> None:
        self.beats[rank] = replace(self.beats[rank], **changes)

    def wait(self, seconds: float, silent: tuple[int, ...] = ()) -> str:
        """Let time pass; return the first sentence of the watchdog, or an empty one."""
        hang = None
        for _ in range(int(seconds / 5)):
            self.now += 5
            for rank in self.counts:
                self.counts[rank] += rank not in silent
            hang = hang or self.watchdog.find_hang(self.beats, self.counts)
        return hang or ""


def test_the_rank_that_is_behind_is_named() -> None:
    group = _Group()
    group.set(1, stage="data", step=6)
    assert not group.wait(295)
    assert group.wait(20).endswith("after step 7: the others wait for rank 1 on node-1 (data)")


def test_any_progress_resets_the_watchdog() -> None:
    group = _Group()
    for calls in range(100):
        group.set(2, forward_passes=calls, stage="evaluation")
        assert not group.wait(200)
    assert group.wait(400)


def test_silence_while_others_move_is_no_hang() -> None:
    group = _Group()
    for step in range(10):
        group.set(0, step=step)
        assert not group.wait(50, silent=(1,))


@pytest.mark.parametrize(
    ("stages", "step", "waits_s", "hangs_s", "silent", "sentence"),
    [
        (_ALL_WAIT, 7, 295, 25, (), "all ranks wait for each other (communication); check the network"),
        (("compute",), 7, 295, 25, (), "it is rank 0 on node-0 (compute)"),
        (_ALL_WAIT, 7, 100, 80, (2,), "rank 2 on node-2 has sent no heartbeat for 60 s or more"),
        (("checkpoint",) * 3, 7, 100, 300, (1,), "rank 1 on node-1 has sent no heartbeat for 60 s or more"),
        (("checkpoint", *_ALL_WAIT[1:]), 7, 1150, 100, (), "the others wait for rank 0 on node-0 (checkpoint)"),
        (("data",) * 3, 7, 1150, 100, (), "it is rank 0 on node-0 (data), rank 1 on node-1 (data)"),
        (("communication", "compute", "compute"), 6, 1150, 100, (), "the others wait for rank 1 on node-1 (compute)"),
        (_ALL_WAIT, 6, 295, 25, (), "all ranks wait for each other"),
    ],
    ids=[
        "collective", "one-rank", "frozen", "frozen-in-checkpoint", "slow-storage", "slow-data", "first-step-compiles",
        "first-collective",
    ],
)  # fmt: skip
def test_a_hang_is_reported_after_the_limit_of_its_stage(
    stages: tuple[str, ...], step: int, waits_s: float, hangs_s: float, silent: tuple[int, ...], sentence: str
) -> None:
    group = _Group(stages=stages, step=step)
    assert not group.wait(waits_s)
    assert sentence in group.wait(hangs_s, silent)


def test_the_first_step_after_a_restart_has_its_patience_again() -> None:
    group = _Group(stages=("compute",), step=7)
    assert group.wait(400)
    beats, counts = group.beats, group.counts
    group.beats, group.counts = {}, {}
    assert not group.wait(5)
    group.beats, group.counts = beats, counts
    assert not group.wait(1150) and group.wait(100)


def test_without_a_limit_or_a_heartbeat_nothing_is_reported() -> None:
    assert not _Group(limit_s=None).wait(9999, silent=(1,))
    assert Watchdog(30).find_hang({}, {}) is None


def test_a_hung_worker_dumps_its_stacks_and_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def end(code: int) -> None:
        assert code == 70
        ended.set()
        threading.Event().wait()  # os._exit does not return

    monkeypatch.setattr(worker_heartbeat, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(worker_heartbeat.os, "_exit", end)
    beats: list[Heartbeat] = []

    def send(beat: Heartbeat) -> bool:
        beats.append(beat)
        return len(beats) == 3

    WorkerHeartbeat(RunDir(str(tmp_path)), 4, lambda: (12, 34, "data"), send)
    assert ended.wait(10)
    assert (beats[0].rank, beats[0].step, beats[0].forward_passes, beats[0].stage) == (4, 12, 34, "data")
    stacks = (tmp_path / "hangs/step-00000012/rank-00004.txt").read_text()
    assert "test_a_hung_worker_dumps_its_stacks_and_exits" in stacks or "wait" in stacks
    time.sleep(0.05)
    assert len(beats) == 3
