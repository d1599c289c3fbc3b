"""Faults of `--chaos` on a real Ray: the curve equals that of a run without faults, bit by bit."""

import pytest

from launcher.errors import TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.events import read_events
from launcher.rundir.listing import list_runs
from launcher.spec.job import JobSpec
from tests.support.fault_runs import assert_same_run, run_with

pytestmark = pytest.mark.ray


def test_killed_workers_leave_the_curve_unchanged(job: JobSpec, plain: RunDir) -> None:
    run, output = run_with(job, "killed", "kill=1@step13,kill=0@upload,kill=0@export")
    assert_same_run(run, plain)
    lost = [event for event in read_events(run) if event.kind == "worker-lost"]
    assert len(lost) == 3 and output.count("resuming from step") >= 3 and "failure 3 of at most 8" in output
    assert [run.name for run in list_runs(job.output.storage) if run.state == "finished"] == ["killed", "plain"]


def test_corrupt_checkpoint_full_disk_and_preemption_leave_the_curve_unchanged(job: JobSpec, plain: RunDir) -> None:
    run, output = run_with(job, "damaged", "corrupt@step23,kill=0@step23,disk_full@step30,term=node@step36")
    assert_same_run(run, plain)
    assert "is damaged" in output and "its sha256 differs" in output and "a node is preempted" in output
    kinds = [event.kind for event in read_events(run)]
    assert kinds == ["worker-lost", "checkpoint-damaged", "checkpoint-failed", "preempted"]


def test_the_run_ends_after_max_failures(job: JobSpec, ray_cluster: None) -> None:
    sentence = r"lost.*this was failure 1 within 24 hours, and fault_tolerance\.max_failures is 0"
    with pytest.raises(TrainingError, match=sentence):
        run_with(job, "failed", "kill=0@step7", fault_tolerance={"max_failures": 0})
    (summary,) = [run for run in list_runs(job.output.storage) if run.name == "failed"]
    assert summary.state == "failed" and "lost" in summary.why
