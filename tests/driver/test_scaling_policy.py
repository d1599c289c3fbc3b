"""Number of workers of each attempt, and when a run grows."""

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


def _set_capacity(monkeypatch: pytest.MonkeyPatch, *polls: int) -> list[int]:
    """Make the cluster hold these numbers of workers, poll by poll; the last one stays. Return those still to come."""
    left = list(polls)
    monkeypatch.setattr(scaling_policy, "max_workers_available", lambda _: left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(scaling_policy, "_POLL_S", 0.01)
    return left


def test_min_and_max_fill_two_keys() -> None:
    spec = ClusterSpec.model_validate({"workers": {"min": 2, "max": 8}})
    assert (spec.min_workers, spec.workers) == (2, 8)
    assert ClusterSpec.model_validate(spec.model_dump()) == spec
    for wrong in ({"min": 2}, {"min": 0, "max": 2}, {"min": 1, "max": 2, "more": 3}, {"min": "1", "max": 2}):
        with pytest.raises(ValidationError, match="neither a number nor of the form"):
            ClusterSpec.model_validate({"workers": wrong})
    with pytest.raises(ValidationError, match="min_workers is 9, which is more than workers"):
        ClusterSpec.model_validate({"workers": {"min": 9, "max": 8}})


@pytest.mark.parametrize(
    ("workers", "capacity", "expected"),
    [
        ({"min": 1, "max": 4}, 1, 1),
        ({"min": 1, "max": 4}, 3, 3),
        ({"min": 1, "max": 4}, 9, 4),
        (4, 0, 4),  # a fixed number: Ray waits for the nodes
    ],
)
def test_an_attempt_takes_the_workers_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Any, capacity: int, expected: int
) -> None:
    log: list[str] = []
    _set_capacity(monkeypatch, capacity)
    assert ScalingPolicy(_job(tmp_path, workers)).next_workers(log.append) == expected
    assert not log


def test_an_attempt_waits_for_the_minimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    _set_capacity(monkeypatch, 0, 1, 1, 2, 3)
    assert ScalingPolicy(_job(tmp_path, {"min": 2, "max": 4})).next_workers(log.append) == 2
    assert log == ["the cluster can hold 0 workers; waiting until it can hold 2"]
    monkeypatch.setattr(scaling_policy, "_MAX_WAIT_S", 0.0)
    _set_capacity(monkeypatch, 1)
    with pytest.raises(ClusterError, match="the cluster can hold 1 workers, and at least 2 are needed; add nodes"):
        ScalingPolicy(_job(tmp_path, {"min": 2, "max": 4})).next_workers(log.append)


def test_a_run_grows_after_two_polls_with_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(tmp_path, {"min": 1, "max": 4})
    restart = threading.Event()
    following = _set_capacity(monkeypatch, 2, 3, 2, 2, 3, 2, 3, 3, 3)  # comes and goes, then stays
    policy = ScalingPolicy(job)
    with policy.watch_capacity(with_workers(job, 2), restart.set):
        assert restart.wait(5)
    assert policy.resize_requested
    assert following == [3], "the run grows at the eighth poll, the second in a row with capacity"
    _set_capacity(monkeypatch, 9)
    for started in (with_workers(job, 4), _job(tmp_path, 2)):
        policy = ScalingPolicy(job if started.cluster.min_workers else started)
        with policy.watch_capacity(started, lambda: pytest.fail("the run has all the workers it asked for")):
            time.sleep(0.1)
        assert not policy.resize_requested
