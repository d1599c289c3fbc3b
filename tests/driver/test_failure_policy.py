"""Which failures are retried, and after how long."""

import pytest

from launcher.driver.failure_policy import FailurePolicy, normalize_cause
from launcher.errors import TrainingError, WorkerLostError
from launcher.spec.fault_tolerance import FaultToleranceSpec


def _lost(text: str = "a worker stopped: ActorDiedError: pid=12, ip=10.0.0.7 exited") -> WorkerLostError:
    return WorkerLostError(text)


def test_waits_double_without_progress_and_reset_with_it() -> None:
    policy = FailurePolicy(FaultToleranceSpec(backoff_s=2, same_step=100, max_failures=100))
    assert [policy.decide(_lost(), 10) for _ in range(9)] == [0, 2, 4, 8, 16, 32, 64, 128, 256]
    assert policy.decide(_lost(), 10) == 300
    assert policy.decide(_lost(), 11) == 0


def test_more_than_max_failures_end_the_run() -> None:
    policy = FailurePolicy(FaultToleranceSpec(max_failures=2))
    policy.decide(_lost(), 1)
    policy.decide(_lost(), 2)
    assert policy.summary() == "failure 2 of at most 2 within 24 hours"
    sentence = r"failure 3 within 24 hours, and fault_tolerance\.max_failures is 2; run the same command"
    with pytest.raises(TrainingError, match=sentence):
        policy.decide(_lost(), 3)


def test_only_failures_within_the_window_count() -> None:
    now = [0.0]
    policy = FailurePolicy(FaultToleranceSpec(max_failures=2, within_hours=24), lambda: now[0])
    for day in range(100):
        now[0] = day * 86400.0
        policy.decide(_lost(), day + 1)
    now[0] += 3600
    policy.decide(_lost(), 101)
    with pytest.raises(TrainingError, match="failure 3 within 24 hours"):
        policy.decide(_lost(), 102)


def test_the_same_failure_at_the_same_step_ends_the_run() -> None:
    policy = FailurePolicy(FaultToleranceSpec(max_failures=100, same_step=3))
    for pid in (4711, 815):
        policy.decide(_lost(f"a worker stopped: RuntimeError: CUDA error in process {pid} at 0x7f{pid}"), 40)
    with pytest.raises(TrainingError, match="failed 3 times in a row after step 40 for the same reason"):
        policy.decide(_lost("a worker stopped: RuntimeError: CUDA error in process 99 at 0x7f99"), 40)


def test_another_reason_or_step_resets_the_count() -> None:
    policy = FailurePolicy(FaultToleranceSpec(max_failures=100, same_step=2))
    for step, text in ((40, "out of luck"), (41, "out of luck"), (41, "connection lost"), (41, "out of luck")):
        policy.decide(_lost(text), step)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (FaultToleranceSpec(max_failures=0), "failure 1"),
        (FaultToleranceSpec(same_step=1), "failed once after step 0"),
    ],
)
def test_the_smallest_limits_allow_no_retry(spec: FaultToleranceSpec, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        FailurePolicy(spec).decide(_lost(), 0)


def test_causes_are_compared_without_numbers() -> None:
    assert normalize_cause("Rank 3 of 10.0.0.7:4711 died") == normalize_cause("rank 12 of 10.231.1.9:80 died")
    assert normalize_cause("rank 3 died") != normalize_cause("rank 3 hung")
