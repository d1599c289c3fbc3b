"""How many workers a run starts with, and when it grows."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.driver import scaling_policy
from launcher.driver.scaling_policy import ScalingPolicy, with_workers
from launcher.errors import ClusterError
from launcher.spec.cluster import ClusterSpec
from launcher.spec.job import JobSpec
from tests.support.jobs import make_job


def _job(folder: Path, workers: Any) -> JobSpec:
    return make_job(folder / "model", {"train": "none"}, folder, cluster={"workers": workers})


def _rooms(monkeypatch: pytest.MonkeyPatch, *rooms: int) -> None:
    left = list(rooms)
    monkeypatch.setattr(scaling_policy, "max_workers_available", lambda _: left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(scaling_policy, "_POLL_S", 0.01)


def test_two_numbers_stand_for_two_keys() -> None:
    spec = ClusterSpec.model_validate({"workers": {"min": 2, "max": 8}})
    assert (spec.min_workers, spec.workers) == (2, 8)
    assert ClusterSpec.model_validate(spec.model_dump()) == spec
    for wrong in ({"min": 2}, {"min": 0, "max": 2}, {"min": 1, "max": 2, "more": 3}, {"min": "1", "max": 2}):
        with pytest.raises(ValidationError, match="neither a number nor of the form"):
            ClusterSpec.model_validate({"workers": wrong})
    with pytest.raises(ValidationError, match="min_workers is 9, and there are at most 8 workers"):
        ClusterSpec.model_validate({"workers": {"min": 9, "max": 8}})


def test_as_many_as_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for room, expected in ((1, 1), (3, 3), (9, 4)):
        _rooms(monkeypatch, room)
        assert ScalingPolicy(_job(tmp_path, {"min": 1, "max": 4})).next_workers(said.append) == expected
    _rooms(monkeypatch, 0)
    assert ScalingPolicy(_job(tmp_path, 4)).next_workers(said.append) == 4, "Ray waits for those that are asked for"
    assert not said


def test_it_waits_for_the_fewest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    _rooms(monkeypatch, 0, 1, 1, 2, 3)
    assert ScalingPolicy(_job(tmp_path, {"min": 2, "max": 4})).next_workers(said.append) == 2
    assert said == ["the cluster can hold 0 workers; waiting until it can hold 2"]
    monkeypatch.setattr(scaling_policy, "_MAX_WAIT_S", 0.0)
    _rooms(monkeypatch, 1)
    with pytest.raises(ClusterError, match="the cluster can hold 1 workers, and at least 2 are needed; add nodes"):
        ScalingPolicy(_job(tmp_path, {"min": 2, "max": 4})).next_workers(said.append)


def test_it_grows_when_the_room_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(tmp_path, {"min": 1, "max": 4})
    left = threading.Event()
    _rooms(monkeypatch, 2, 3, 2, 2, 3, 2, 3, 3, 3)  # comes and goes, then stays
    it = ScalingPolicy(job)
    with it.watch_capacity(with_workers(job, 2), left.set):
        assert left.wait(5)
    assert it.resize_requested
    _rooms(monkeypatch, 9)
    for started in (with_workers(job, 4), _job(tmp_path, 2)):
        fixed = ScalingPolicy(job if started.cluster.min_workers else started)
        with fixed.watch_capacity(started, lambda: pytest.fail("it has all it asked for")):
            time.sleep(0.1)
        assert not fixed.resize_requested
