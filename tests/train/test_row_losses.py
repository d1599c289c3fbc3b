"""Losses of the rows of a step, recomputed from a checkpoint by one worker: those that the run has trained with."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from launcher.data.batch_rows import read_step_rows
from launcher.driver.prepare import PreparedJob
from launcher.rundir.recovery import SkippedBatch, record_skipped_batch
from launcher.train.checkpoint import catalog
from tests.support.jobs import example_table, prepared_job, write_splits
from tests.support.tiny_models import make_tiny_resnet
from tests.support.worker_group import run_group, train_here, with_job

_STEPS = 8
_PACKED: dict[str, Any] = {"task": {"max_length": 48, "packing": True}}

# Name -> task, and sections of the job. Dropout is on, and two workers train.
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text-micro": ("text-classification", {"parallel": {"micro_batch": 1, "zero": 1}}),
    "text-ema-bf16": ("text-classification", {"train": {"precision": "bf16", "ema": 0.9}, "parallel": {"zero": 0}}),
    "mixture": ("text-classification", {"parallel": {"zero": 0}}),
    "packed": ("causal-lm", {**_PACKED, "parallel": {"zero": 1}}),
    "embedding": ("sentence-embedding", {"parallel": {"zero": 0}}),
    "kto": ("preference", {"task": {"loss": "kto", "max_length": 48}, "parallel": {"zero": 1, "micro_batch": 1}}),
    "resnet": ("image-classification", {"model": {"batch_norm": "trained"}, "parallel": {"zero": 0}}),
    "zero-2": ("text-classification", {"parallel": {"zero": 2}}),
    "zero-3": ("text-classification", {"parallel": {"zero": 3}}),
    "zero-3-embedding": ("sentence-embedding", {"parallel": {"zero": 3}}),
}
_EXACT = {name for name in _CASES if "zero" not in name}


@pytest.fixture
def job(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path: Path) -> PreparedJob:
    task, sections = _CASES[request.param]
    model = make_tiny_resnet(tmp_path / "resnet") if request.param == "resnet" else tiny_models[task]
    data: dict[str, Any] = write_splits(tmp_path / "data", train=71, validation=13, row_group=37, task=task)
    if request.param == "mixture":
        pq.write_table(example_table(7, 9, task), tmp_path / "data/small.parquet")
        small = {"train": str(tmp_path / "data/small.parquet"), "weight": 0.3}
        data = {"mixture": {"large": {"train": data["train"], "weight": 0.7}, "small": small}, "until": "repeat"}
    job = {
        "model": {"dropout": None},
        "evaluation": {"every_steps": 3},
        "checkpoint": {"every_steps": 4, "every_minutes": None, "keep_last": 9},
        **sections,
        "task": {"type": task, "max_length": 32, **sections.get("task", {})},
        "train": {"max_steps": _STEPS, "epochs": 2, "learning_rate": 3e-3, **sections.get("train", {})},
    }
    if task == "image-classification":
        del job["task"]["max_length"]
    return prepared_job(model, data, tmp_path, **job)


def _row_losses(prepared: PreparedJob, first: int, last: int) -> Any:
    """Compute the losses in this process's group of one; return them with the steps completed, as told on the way."""
    from launcher.train.row_losses import compute_row_losses

    done: list[int] = []
    job = with_job(prepared, cluster={"workers": 1}).job
    run, plan, train = prepared.run, prepared.plan, prepared.splits["train"]
    found = compute_row_losses(run, job, plan, train, range(first, last + 1), on_step=done.append)
    steps = [(step.step, step.sequences, step.loss) for step in found]
    return {"steps": steps, "done": done}


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "job",
    [pytest.param(name, marks=pytest.mark.long if name in ("zero-2", "zero-3") else ()) for name in _CASES],
    indirect=True,
)
def test_losses_of_rows_are_those_that_the_run_has_trained_with(
    job: PreparedJob, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["job"]
    assert bool(job.plan.inexact) == (name not in _EXACT)
    curve = dict(run_group(2, train_here, job)["lines"])
    before = _files(Path(job.run.uri))
    found = run_group(1, _row_losses, job, 6, 7)
    assert found["done"] == [4, 5, 6]
    single = run_group(1, _row_losses, job, 5, 5)
    assert single["done"] == [4]
    assert _files(Path(job.run.uri)) == before
    steps = [*single["steps"], *found["steps"]]
    assert [step for step, _, _ in steps] == [5, 6, 7]
    rows = [*read_step_rows(job.job, job.plan, job.splits["train"], range(5, 8))]
    for (step, sequences, loss), own in zip(steps, rows, strict=True):
        if name in _EXACT:
            assert loss == curve[step]
        else:
            assert loss == pytest.approx(curve[step], rel=1e-5)
        assert len(sequences) == own.sequence[-1] + 1
        assert sum(sequences) / own.weight.sum() == pytest.approx(loss, rel=1e-6)
        assert len(set(sequences)) > 1


@pytest.mark.parametrize("job", ["text-micro"], indirect=True)
def test_without_a_usable_checkpoint_an_earlier_one_or_the_beginning_is_taken(job: PreparedJob) -> None:
    curve = dict(run_group(2, train_here, job)["lines"])
    found = run_group(1, _row_losses, job, 3, 3)
    assert (found["done"], found["steps"][0][2]) == ([0, 1, 2], curve[3])
    newest = catalog.newest_files_dir(job.run, 4)
    assert newest is not None
    folder = Path(job.run.uri) / newest
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    found = run_group(1, _row_losses, job, 6, 6)
    assert (found["done"], found["steps"][0][2]) == ([3, 4, 5], curve[6])
    # It is left for the training to find. Step 3 is the first evaluation, and so the best one until then.
    assert {3, 4, 8} <= set(catalog.complete_steps(job.run))


@pytest.mark.parametrize("job", ["text-ema-bf16"], indirect=True)
def test_a_batch_that_the_run_has_skipped_is_not_trained(job: PreparedJob) -> None:
    record_skipped_batch(job.run, SkippedBatch(step=6, reason="the loss is nan at step 6", rows=()))
    curve = dict(run_group(2, train_here, job)["lines"])
    assert 6 not in curve
    found = run_group(1, _row_losses, job, 6, 7)
    (_, sequences, _), (_, _, loss) = found["steps"]
    assert np.isfinite(sequences).all()
    assert loss == curve[7]
