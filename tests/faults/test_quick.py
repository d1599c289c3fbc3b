"""Faults on a real Ray, as `--chaos` makes them: whatever happens, the curve is the undisturbed run's, bit by bit."""

import pytest

from launcher.errors import TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.events import read_events
from launcher.rundir.listing import runs_of
from launcher.spec.job import JobSpec
from tests.support.fault_runs import run_with, same

pytestmark = pytest.mark.ray


def test_workers_are_killed_while_they_do_this_and_that(job: JobSpec, plain: RunDir) -> None:
    run, said = run_with(job, "killed", "kill=1@step13,kill=0@upload,kill=0@export")
    same(run, plain)
    lost = [event for event in read_events(run) if event.kind == "worker-lost"]
    assert len(lost) == 3 and said.count("resuming from step") >= 3 and "failure 3 of at most 8" in said
    assert [run.name for run in runs_of(job.output.storage) if run.state == "finished"] == ["killed", "plain"]


def test_a_checkpoint_is_damaged_and_a_disk_is_full(job: JobSpec, plain: RunDir) -> None:
    run, said = run_with(job, "damaged", "corrupt@step23,kill=0@step23,disk_full@step30,term=node@step36")
    same(run, plain)
    assert "is damaged" in said and "its sha256 differs" in said and "a node is preempted" in said
    kinds = [event.kind for event in read_events(run)]
    assert kinds == ["worker-lost", "checkpoint-damaged", "checkpoint-failed", "preempted"]


def test_what_always_fails_ends(job: JobSpec, ray_cluster: None) -> None:
    said = r"lost.*this was failure 1 within 24 hours, and fault_tolerance\.max_failures is 0"
    with pytest.raises(TrainingError, match=said):
        run_with(job, "given-up", "kill=0@step7", fault_tolerance={"max_failures": 0})
    (summary,) = [run for run in runs_of(job.output.storage) if run.name == "given-up"]
    assert summary.state == "failed" and "lost" in summary.why
