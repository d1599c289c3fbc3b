"""The job that all faults are injected into, and its run without faults."""

from pathlib import Path

import pytest

from launcher.rundir.directory import RunDir
from launcher.rundir.events import read_events
from launcher.spec.job import JobSpec
from tests.support.fault_runs import curve, run_with
from tests.support.jobs import make_job, write_splits


@pytest.fixture(scope="session")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("faults")
    data = write_splits(folder / "data", train=220, validation=33, test=20)
    return make_job(
        tiny_bert, data, folder / "runs",
        train={"epochs": 2}, evaluation={"every_steps": 16}, checkpoint={"every_steps": 5},
        fault_tolerance={"backoff_s": 0},
    )  # fmt: skip


@pytest.fixture(scope="session")
def plain(job: JobSpec, ray_cluster: None) -> RunDir:
    run, _ = run_with(job, "plain")
    assert [step for step, _, _ in curve(run)] == list(range(1, 41))
    assert not read_events(run)
    return run
