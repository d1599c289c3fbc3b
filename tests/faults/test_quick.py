"""Faults on a real Ray, as `--chaos` makes them: whatever happens, the curve is the undisturbed run's, bit by bit."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs import make_job, write_splits
from launcher.errors import TrainingError
from launcher.events import events_of
from launcher.records import StepRecord
from launcher.run import run_job
from launcher.rundir import RunDir
from launcher.runs import runs_of
from launcher.spec.chaos import parse_faults
from launcher.spec.job import JobSpec

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("faults")
    data = write_splits(folder / "data", train=220, validation=33, test=20)
    return make_job(
        tiny_bert, data, folder / "runs",
        train={"epochs": 2}, evaluation={"every_steps": 16}, checkpoint={"every_steps": 5},
        fault_tolerance={"backoff_s": 0},
    )  # fmt: skip


def _run(job: JobSpec, name: str, chaos: str | None = None, **sections: Any) -> tuple[RunDir, str]:
    console = Console(file=StringIO(), width=200)
    changed = JobSpec.model_validate({**job.model_dump(), "name": name, **sections})
    run = run_job(changed, console, parse_faults(chaos) if chaos else None)
    return run, console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def _curve(run: RunDir) -> list[tuple[int, int, float]]:
    """(step, samples, loss) of each line, in the order of the file."""
    return [(line.step, line.samples, line.loss) for line in run.read_metrics() if isinstance(line, StepRecord)]


@pytest.fixture(scope="module")
def plain(job: JobSpec, ray_cluster: None) -> RunDir:
    run, _ = _run(job, "plain")
    assert [step for step, _, _ in _curve(run)] == list(range(1, 41))
    assert not events_of(run)
    return run


def _same(run: RunDir, plain: RunDir) -> None:
    assert _curve(run) == _curve(plain)
    for name in ("model/model.safetensors", "scores-test.json"):
        assert run.read_bytes(name) == plain.read_bytes(name), name
    assert not [path for path in Path(run.uri).rglob("*") if path.name.endswith(".tmp") or path.name == "parts"]
    assert not [name for name in run.list("") if name.startswith("ray-")]
    for folder in Path(run.uri, "checkpoints").iterdir():
        assert (folder / "manifest.json").exists(), "no half checkpoint stays"


def test_workers_are_killed_while_they_do_this_and_that(job: JobSpec, plain: RunDir) -> None:
    run, said = _run(job, "killed", "kill=1@step13,kill=0@upload,kill=0@export")
    _same(run, plain)
    lost = [event for event in events_of(run) if event.kind == "worker-lost"]
    assert len(lost) == 3 and said.count("going on from step") >= 3 and "failure 3 of 8 that it bears" in said
    assert [run.name for run in runs_of(job.output.storage) if run.state == "finished"] == ["killed", "plain"]


def test_a_checkpoint_is_damaged_and_a_disk_is_full(job: JobSpec, plain: RunDir) -> None:
    run, said = _run(job, "damaged", "corrupt@step23,kill=0@step23,disk_full@step30,term=node@step36")
    _same(run, plain)
    assert "is damaged" in said and "its sha256 differs" in said and "a node is being taken away" in said
    kinds = [event.kind for event in events_of(run)]
    assert kinds == ["worker-lost", "checkpoint-damaged", "checkpoint-failed", "preempted"]


def test_what_always_fails_ends(job: JobSpec, ray_cluster: None) -> None:
    with pytest.raises(TrainingError, match=r"lost.*this was failure 1, and fault_tolerance\.max_failures is 0"):
        _run(job, "given-up", "kill=0@step7", fault_tolerance={"max_failures": 0})
    (summary,) = [run for run in runs_of(job.output.storage) if run.name == "given-up"]
    assert summary.state == "failed" and "lost" in summary.why
