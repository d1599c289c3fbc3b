"""Standing still, and who is to blame for it."""

import threading
import time
from pathlib import Path

import pytest

from launcher.driver.watchdog import Watchdog
from launcher.rundir.directory import RunDir
from launcher.train import worker_heartbeat
from launcher.train.worker_heartbeat import Heartbeat, WorkerHeartbeat


class _Group:
    """Workers that beat, under a clock of one's own."""

    def __init__(self, limit_s: float | None = 300, ranks: int = 3) -> None:
        self.now = 0.0
        self.dog = Watchdog(limit_s, lambda: self.now)
        self.beats = {rank: Heartbeat(rank, f"node-{rank}", 7, 70, "communication") for rank in range(ranks)}
        self.counts = dict.fromkeys(self.beats, 0)
        self.dog.hang({0: Heartbeat(0, "node-0", 6, 60, "compute")}, {0: 0})  # a step was made since

    def set(self, rank: int, **facts: object) -> None:
        self.beats[rank] = Heartbeat(**{**self.beats[rank].__dict__, **facts})  # type: ignore[arg-type]

    def wait(self, seconds: float, silent: tuple[int, ...] = ()) -> str | None:
        found = None
        for _ in range(int(seconds / 5)):
            self.now += 5
            for rank in self.counts:
                self.counts[rank] += rank not in silent
            found = found or self.dog.hang(self.beats, self.counts)
        return found


def test_whoever_does_not_wait_is_waited_for() -> None:
    group = _Group()
    group.set(1, stage="data", step=6)
    assert group.wait(295) is None
    said = group.wait(20)
    assert said is not None and said.endswith("after step 7: the others wait for rank 1 on node-1 (data)")


def test_any_progress_counts() -> None:
    group = _Group()
    for calls in range(100):
        group.set(2, calls=calls, stage="evaluation")
        assert group.wait(200) is None
    assert group.wait(400) is not None


def test_a_frozen_worker_is_found_after_a_minute() -> None:
    group = _Group()
    assert group.wait(100) is None
    said = group.wait(80, silent=(2,))
    assert said is not None and "rank 2 on node-2 has not been heard of for 60 s or more" in said


def test_silence_while_others_move_is_no_hang() -> None:
    group = _Group()
    for step in range(10):
        group.set(0, step=step)
        assert group.wait(50, silent=(1,)) is None


def test_everybody_waits_for_everybody() -> None:
    said = _Group().wait(320)
    assert said is not None and "all ranks wait for each other (communication); look at the network" in said
    group = _Group(ranks=1)
    group.set(0, stage="compute")
    said = group.wait(320)
    assert said is not None and said.endswith("it is rank 0 on node-0 (compute)")


def test_no_limit_no_start_and_slow_storages() -> None:
    assert _Group(limit_s=None).wait(9999, silent=(1,)) is None
    assert Watchdog(30).hang({}, {}) is None
    group = _Group()
    group.set(0, stage="checkpoint")
    assert group.wait(1150) is None, "a slow storage is given four times as long"
    said = group.wait(100)
    assert said is not None and said.endswith("the others wait for rank 0 on node-0 (checkpoint)")


def test_the_first_step_and_slow_data_are_given_longer() -> None:
    group = _Group()
    for rank in group.beats:
        group.set(rank, step=6, stage="compute" if rank else "communication")
    assert group.wait(1150) is None, "the first step compiles"
    assert group.wait(100) is not None
    group = _Group()
    for rank in group.beats:
        group.set(rank, stage="data")
    assert group.wait(1150) is None, "a window of large pictures"
    assert group.wait(100) is not None
    group = _Group()
    for rank in group.beats:
        group.set(rank, step=6)
    assert group.wait(320) is not None, "a first collective that hangs is no long compilation"


def test_a_silent_worker_is_found_in_a_checkpoint_too() -> None:
    group = _Group()
    for rank in group.beats:
        group.set(rank, stage="checkpoint")
    assert group.wait(100) is None
    said = group.wait(300, silent=(1,))
    assert said is not None and "rank 1 on node-1 has not been heard of for 60 s or more" in said


def test_a_worker_dumps_its_stacks_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def end(code: int) -> None:
        assert code == 70
        ended.set()
        threading.Event().wait()  # as nothing follows it

    monkeypatch.setattr(worker_heartbeat, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(worker_heartbeat.os, "_exit", end)
    told: list[Heartbeat] = []

    def tell(beat: Heartbeat) -> bool:
        told.append(beat)
        return len(told) == 3

    WorkerHeartbeat(RunDir(str(tmp_path)), 4, lambda: (12, 34, "data"), tell)
    assert ended.wait(10)
    assert (told[0].rank, told[0].step, told[0].forward_passes, told[0].stage) == (4, 12, 34, "data")
    stacks = (tmp_path / "hangs/step-00000012/rank-00004.txt").read_text()
    assert "test_a_worker_dumps_its_stacks_and_ends" in stacks or "wait" in stacks
    time.sleep(0.05)
    assert len(told) == 3
