"""Runs of a job with injected faults, and their comparison with a run without."""

from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.driver.run import run_job
from launcher.rundir.directory import RunDir
from launcher.rundir.records import StepRecord
from launcher.spec.fault_injection import parse_faults
from launcher.spec.job import JobSpec


def run_with(job: JobSpec, name: str, chaos: str | None = None, **sections: Any) -> tuple[RunDir, str]:
    """Train the job under another name; return the run and its console output."""
    console = Console(file=StringIO(), width=200)
    changed = JobSpec.model_validate({**job.model_dump(), "name": name, **sections})
    run = run_job(changed, console, parse_faults(chaos) if chaos else None)
    return run, console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def curve(run: RunDir) -> list[tuple[int, int, float]]:
    """Return (step, samples, loss) of each line, in the order of the file."""
    return [(line.step, line.samples, line.loss) for line in run.read_metrics() if isinstance(line, StepRecord)]


def assert_same_run(run: RunDir, plain: RunDir) -> None:
    """Compare curve, model and scores bit by bit, and check that no half-written file is left."""
    assert curve(run) == curve(plain)
    for name in ("model/model.safetensors", "scores-test.json"):
        assert run.read_bytes(name) == plain.read_bytes(name), name
    assert not [path for path in Path(run.uri).rglob("*") if path.name.endswith(".tmp") or path.name == "parts"]
    assert not [name for name in run.list("") if name.startswith("ray-")]
    for folder in Path(run.uri, "checkpoints").iterdir():
        assert list(folder.glob("*/manifest.json")), "a half-written checkpoint is left"
