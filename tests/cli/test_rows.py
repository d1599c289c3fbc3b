"""`launcher rows`: tables on the console and in files, and the losses of a run of two workers."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from launcher.data.batch_rows import read_step_rows
from launcher.driver.prepare import PreparedJob
from launcher.rundir.recovery import SkippedBatch, record_skipped_batch
from launcher.spec.loader import dump_job
from tests.support.command_line import CommandLine
from tests.support.jobs import example_table, prepared_job, write_splits
from tests.support.records import step_record
from tests.support.worker_group import run_group, train_here


@pytest.fixture
def job(tiny_bert: Path, tmp_path: Path) -> PreparedJob:
    """A job with dropout whose run has begun; an epoch has seven steps."""
    data = write_splits(tmp_path / "data", train=71, validation=13, row_group=20)
    prepared = prepared_job(
        tiny_bert,
        data,
        tmp_path,
        model={"dropout": None},
        train={"epochs": 2, "learning_rate": 3e-3},
        parallel={"zero": 1},
        checkpoint={"every_steps": 5, "keep_last": 9},
    )
    prepared.run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    prepared.run.write_record("plan.json", prepared.plan)
    return prepared


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def _parts(rows: pa.Table) -> int:
    return len(set(rows.column("part").to_pylist()))


def _rows(job: PreparedJob, first: int, last: int) -> pa.Table:
    steps = read_step_rows(job.job, job.plan, job.splits["train"], range(first, last + 1))
    return pa.concat_tables([rows.table(job.splits["train"]) for rows in steps])


def test_rows_of_a_step_are_printed_and_written(job: PreparedJob, tmp_path: Path, launcher: CommandLine) -> None:
    record_skipped_batch(job.run, SkippedBatch(step=3, reason="the loss is nan at step 3", rows=()))
    # The other splits are not needed.
    (tmp_path / "data/validation.parquet").unlink()
    ended = launcher("rows", job.run.uri, "--step", "3")
    expected = _rows(job, 3, 3)
    assert ended.code == 0, ended
    lines = [line.split() for line in ended.out.splitlines()]
    assert ended.out.startswith(
        f"step 3: {len(expected)} rows in {_parts(expected)} parts; not trained on, as the loss is nan at step 3\n"
    )
    assert lines[1] == ["file", "file_row", "epoch", "part", "row"]
    columns = (expected.column(name).to_pylist() for name in lines[1])
    assert lines[2:] == [[str(cell) for cell in cells] for cells in zip(*columns, strict=True)]
    for name in ("rows.parquet", "rows.csv"):
        ended = launcher("rows", job.run.uri, "--step", "2-9", "--output", str(tmp_path / name))
        assert ended.out.splitlines()[-1] == f"{len(_rows(job, 2, 9))} rows: {tmp_path / name}"
    assert pq.read_table(tmp_path / "rows.parquet") == _rows(job, 2, 9)
    assert csv.read_csv(tmp_path / "rows.csv").to_pylist() == _rows(job, 2, 9).to_pylist()


def test_steps_of_a_row_are_printed_and_written(job: PreparedJob, tmp_path: Path, launcher: CommandLine) -> None:
    job.run.append_metrics([step_record(step) for step in range(1, 8)])
    ended = launcher("rows", job.run.uri, "--row", "train.parquet:44")
    assert ended.code == 0, ended
    both = [row for row in _rows(job, 1, 14).to_pylist() if row["row"] == 44]
    lines = ended.out.splitlines()
    assert lines[0] == f"row 44 of {tmp_path}/data/train.parquet"
    assert lines[1].split() == ["step", "epoch", "part", "row", "state"]
    states = ["trained", "not trained yet"]
    expected = [[str(row[name]) for name in ("step", "epoch", "part", "row")] for row in both]
    assert [line.split() for line in lines[2:]] == [
        [*cells, *state.split()] for cells, state in zip(expected, states, strict=True)
    ]
    launcher("rows", job.run.uri, "--row", "train.parquet:44", "--output", str(tmp_path / "steps.csv"))
    assert csv.read_csv(tmp_path / "steps.csv").column("step").to_pylist() == [row["step"] for row in both]


def test_rows_of_data_that_have_moved_are_found(job: PreparedJob, tmp_path: Path, launcher: CommandLine) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    ended = launcher("rows", job.run.uri, "--step", "3")
    assert (ended.code, ended.err.count("does not exist")) == (2, 1)
    assert launcher("rows", job.run.uri, "--step", "3", f"data.train={tmp_path}/elsewhere/train.parquet").code == 0
    pq.write_table(example_table(71, 5), tmp_path / "elsewhere/train.parquet", row_group_size=10)
    ended = launcher("rows", job.run.uri, "--step", "3", f"data.train={tmp_path}/elsewhere/train.parquet")
    assert (ended.code, ended.err.count("the training data are not those of the run")) == (2, 1)


def test_losses_are_exactly_those_of_the_run(job: PreparedJob, tmp_path: Path) -> None:
    curve = dict(run_group(2, train_here, job)["lines"])
    command = ["rows", job.run.uri, "--step", "8-9", "--losses", "--output", str(tmp_path / "losses.parquet")]
    # A process of its own: it forms a group of one worker, once.
    ended = subprocess.run([sys.executable, "-m", "launcher", *command], capture_output=True, text=True, check=True)
    rows = [_rows(job, step, step) for step in (8, 9)]
    steps = [
        [
            f"step {step}: {len(own)} rows in {_parts(own)} parts",
            f"loss {curve[step]:.6f}, exactly as the run has logged it",
        ]
        for step, own in zip((8, 9), rows, strict=True)
    ]
    assert ended.stdout.splitlines() == [
        "from the checkpoint of step 7, 1 step trained again before the last one",
        *steps[0],
        *steps[1],
        f"{sum(map(len, rows))} rows: {tmp_path}/losses.parquet",
    ]
    table = pq.read_table(tmp_path / "losses.parquet")
    assert table.drop_columns(["loss"]) == _rows(job, 8, 9)
    for step, own in zip((8, 9), rows, strict=True):
        losses = table.filter(pc.equal(table.column("step"), step)).column("loss").to_pylist()
        assert sum(losses) / len(own) == pytest.approx(curve[step], rel=1e-6)
