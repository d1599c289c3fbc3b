"""Which failures a run bears, and how long it waits."""

import pytest

from launcher.driver.failure_policy import FailurePolicy, normalize_cause
from launcher.errors import TrainingError, WorkerLostError
from launcher.spec.fault_tolerance import FaultToleranceSpec


def _lost(text: str = "a worker stopped: ActorDiedError: pid=12, ip=10.0.0.7 exited") -> WorkerLostError:
    return WorkerLostError(text)


def test_waits_grow_without_progress_and_begin_anew_with_it() -> None:
    failures = FailurePolicy(FaultToleranceSpec(backoff_s=2, same_step=100, max_failures=100))
    assert [failures.decide(_lost(), 10) for _ in range(9)] == [0, 2, 4, 8, 16, 32, 64, 128, 256]
    assert failures.decide(_lost(), 10) == 300
    assert failures.decide(_lost(), 11) == 0


def test_one_too_many() -> None:
    failures = FailurePolicy(FaultToleranceSpec(max_failures=2))
    failures.decide(_lost(), 1)
    failures.decide(_lost(), 2)
    assert failures.summary() == "failure 2 of at most 2 within 24 hours"
    said = r"failure 3 within 24 hours, and fault_tolerance\.max_failures is 2; run the same command"
    with pytest.raises(TrainingError, match=said):
        failures.decide(_lost(), 3)


def test_a_node_a_day_is_borne_for_ever() -> None:
    now = [0.0]
    failures = FailurePolicy(FaultToleranceSpec(max_failures=2, within_hours=24), lambda: now[0])
    for day in range(100):
        now[0] = day * 86400.0
        failures.decide(_lost(), day + 1)
    now[0] += 3600
    failures.decide(_lost(), 101)
    with pytest.raises(TrainingError, match="failure 3 within 24 hours"):
        failures.decide(_lost(), 102)


def test_what_always_fails_is_not_tried_for_ever() -> None:
    failures = FailurePolicy(FaultToleranceSpec(max_failures=100, same_step=3))
    for pid in (4711, 815):
        failures.decide(_lost(f"a worker stopped: RuntimeError: CUDA error in process {pid} at 0x7f{pid}"), 40)
    with pytest.raises(TrainingError, match="failed 3 times in a row after step 40 for the same reason"):
        failures.decide(_lost("a worker stopped: RuntimeError: CUDA error in process 99 at 0x7f99"), 40)


def test_other_reasons_and_other_steps_are_not_the_same() -> None:
    failures = FailurePolicy(FaultToleranceSpec(max_failures=100, same_step=2))
    for step, text in ((40, "out of luck"), (41, "out of luck"), (41, "connection lost"), (41, "out of luck")):
        failures.decide(_lost(text), step)


def test_at_once() -> None:
    with pytest.raises(TrainingError, match="failure 1"):
        FailurePolicy(FaultToleranceSpec(max_failures=0)).decide(_lost(), 0)
    with pytest.raises(TrainingError, match="failed once after step 0"):
        FailurePolicy(FaultToleranceSpec(same_step=1)).decide(_lost(), 0)


def test_a_reason_without_its_numbers() -> None:
    assert normalize_cause("Rank 3 of 10.0.0.7:4711 died") == normalize_cause("rank 12 of 10.231.1.9:80 died")
    assert normalize_cause("rank 3 died") != normalize_cause("rank 3 hung")
