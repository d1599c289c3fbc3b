"""`launcher runs`: one line per run of a storage, including runs whose driver has died."""

import json
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.driver.prepare import prepare
from launcher.rundir.records import ResultRecord, StepRecord
from launcher.rundir.run_status import FILE, HeartbeatRecord
from launcher.spec.loader import dump_job
from tests.support.jobs import make_job, write_splits


def _runs(*words: str) -> str:
    done = CliRunner().invoke(app, ["runs", *words])
    assert done.exit_code == 0, done.output
    return done.output


def _run(model: Path, folder: Path, name: str, **heartbeat: Any) -> None:
    """Write the records of a run that has completed 3 of its 4 steps."""
    prepared = prepare(make_job(model, write_splits(folder.parent / "data", 40), folder, name=name))
    run = prepared.run
    run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    run.write_record("plan.json", prepared.plan)
    step = StepRecord(
        step=3, epoch=1, loss=0.5, learning_rate=1e-3, grad_norm=None, samples=8, skipped_rows=0, samples_per_s=10.0,
        elapsed_s=3.0,
    )  # fmt: skip
    run.append_metrics([step])
    if heartbeat:
        run.write_record(FILE, HeartbeatRecord(token=1, **heartbeat))
    else:
        result = ResultRecord(steps=4, best_step=4, stopped_early=False, skipped_rows=0, elapsed_s=4.0)
        run.write_record("result.json", result)


def test_each_run_is_listed_with_its_state(tiny_bert: Path, tmp_path: Path) -> None:
    storage, now = tmp_path / "runs", time.time()
    _run(tiny_bert, storage, "one")
    _run(tiny_bert, storage, "gone", at=now - 7200, state="running")
    _run(tiny_bert, storage, "stopped", at=now - 60, state="interrupted", reason="the same command resumes it")
    (storage / "notes").mkdir()
    (storage / "broken").mkdir()
    (storage / "broken/job.yaml").write_text("{")
    (storage / "broken/plan.json").write_text("{")
    lines = _runs(str(storage)).splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["broken", "unreadable", "0/0"], ["gone", "dead", "3/4"], ["one", "finished", "3/4"],
        ["stopped", "interrupted", "3/4"],
    ]  # fmt: skip
    assert "2 h ago" in lines[2] and "stopped: the same command resumes it" in lines
    assert any(line.startswith("broken: ") and "plan.json" in line for line in lines)
    records = [json.loads(line) for line in _runs(str(storage), "--json").splitlines()]
    assert {record["name"]: record["state"] for record in records}["gone"] == "dead"


def test_a_storage_without_runs_is_said_to_be_empty(tmp_path: Path) -> None:
    assert _runs(str(tmp_path)) == f"no run in {tmp_path} yet\n"
    assert _runs(str(tmp_path), "--json") == ""
