"""A run with an exported model that was never trained: what `predict` needs, without the price of training."""

from pathlib import Path
from typing import Any

from launcher.rundir.directory import RunDir
from launcher.spec.loader import dump_job
from launcher.tasks import build_task
from tests.support.jobs import make_job


def finished_run(model: Path, storage: Path, /, **sections: Any) -> RunDir:
    """Write a run whose model is `model` with a new head for the classes a and b."""
    task = {"type": "text-classification", "max_length": 32, "labels": ["a", "b"], **sections.pop("task", {})}
    job = make_job(model, {"train": "gone.parquet", **sections.pop("data", {})}, storage, task=task, **sections)
    run = RunDir(str(storage / job.name))
    built = build_task(job)
    built.build_model().save_pretrained(run.path("model"))
    built.processor().save_pretrained(run.path("model"))
    run.write_bytes("job.yaml", dump_job(job).encode())
    return run
