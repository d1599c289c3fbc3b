"""A loss that is no number: its batch is left out, its rows are named, and every policy gives the same curve."""

from pathlib import Path
from typing import Any

import pytest

from launcher.driver.prepare import PreparedJob
from launcher.errors import LauncherError
from launcher.rundir.events import read_events
from launcher.rundir.recovery import SkippedBatch, SkippedBatchesRecord, read_skipped_batches
from launcher.spec.fault_injection import Fault
from launcher.train.checkpoint import catalog
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here

_BAD = 7


def _job(model: Path, folder: Path, policy: str, zero: int, **sections: Any) -> PreparedJob:
    if not (folder.parent / "data").exists():
        write_splits(folder.parent / "data", train=150)
    data = {"train": str(folder.parent / "data/train.parquet")}
    sections = {"checkpoint": {"every_steps": 3}, **sections}
    return prepared_job(model, data, folder, train={"non_finite": policy}, parallel={"zero": zero}, **sections)


def _train(prepared: PreparedJob, steps: tuple[int, ...] = (_BAD,)) -> Any:
    try:
        return train_here(prepared, faults=tuple(Fault("nan", None, step) for step in steps))
    except LauncherError as error:
        return {"error": f"{type(error).__name__}: {error.message}"}


def _to_the_end(prepared: PreparedJob) -> tuple[dict[int, float], int]:
    """The curve, and how many starts it took; as the driver goes on, from the newest checkpoint."""
    curve: dict[int, float] = {}
    for starts in range(1, 5):
        found = run_group(2, _train, prepared)
        for line in prepared.run.read_metrics():
            if line.kind == "step":
                curve[line.step] = line.loss
        if "error" not in found:
            return {step: loss for step, loss in curve.items() if step != _BAD}, starts
        assert found["error"].startswith("NonFiniteLossError: the loss is")
        assert catalog.latest_step(prepared.run) == 6
    raise AssertionError("it never ended")


@pytest.mark.parametrize(
    "zero", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3]
)
def test_skipping_and_rolling_back_give_the_same_curve(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    skipped = _job(tiny_bert, tmp_path / "skip", "skip", zero)
    back = _job(tiny_bert, tmp_path / "back", "rollback", zero)
    curve, starts = _to_the_end(skipped)
    assert starts == (1 if zero < 2 else 2)
    assert _to_the_end(back) == (curve, 2)
    assert sorted(curve) == [*range(1, _BAD), *range(_BAD + 1, 15)]
    (batch,) = read_skipped_batches(skipped.run)
    assert batch.rows == read_skipped_batches(back.run)[0].rows and len(batch.rows) == 11 and batch.step == _BAD
    assert batch.rows[0].file.endswith("train.parquet") and 0 <= batch.rows[0].file_row < 150
    (event,) = read_events(skipped.run)
    assert event.kind == "batch-skipped" and f"at step {_BAD}: its batch is skipped, 11 rows" in event.text


def test_without_a_word_in_the_job_file_it_stops(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "stop", "stop", 0)
    assert run_group(2, _train, prepared)["error"].startswith(f"TrainingError: the loss is nan at step {_BAD}; lower")
    assert not read_skipped_batches(prepared.run)


def test_not_everything_can_be_left_out(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "skip", "skip", 0)
    found = run_group(2, _train, prepared, tuple(range(2, 14)))
    assert found["error"].startswith("TrainingError: the loss is not finite at step 12, and 10 batches are skipped")
    assert [batch.step for batch in read_skipped_batches(prepared.run)] == list(range(2, 12))


def test_the_rows_are_those_of_the_batch(tiny_bert: Path, tmp_path: Path) -> None:
    """Every row is in the batch of exactly one step."""
    from launcher.data.stream import read_batch_rows

    prepared = _job(tiny_bert, tmp_path / "x", "skip", 0)
    rows = [read_batch_rows(prepared.job, prepared.plan, prepared.splits, step) for step in range(14)]
    assert sorted(row for batch in rows for row in batch.tolist()) == list(range(150))
    record = SkippedBatchesRecord(batches=(SkippedBatch(step=1, reason="x", rows=()),))
    assert SkippedBatchesRecord.model_validate_json(record.model_dump_json()) == record
