"""W&B, offline: a resumed run keeps its id, trials form a group, and an unreachable server costs one warning."""

import json
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import SpecError
from launcher.rundir.directory import RunDir
from launcher.spec.job import JobSpec
from launcher.train.loggers import trackers
from launcher.train.loggers import wandb as weights_biases
from launcher.train.loggers.sinks import open_sinks
from tests.support.jobs import make_job, write_splits
from tests.support.records import step_record

wandb = pytest.importorskip("wandb", reason="needs wandb (pip install launcher[wandb])")


@pytest.fixture
def job(tiny_bert: Path, tmp_path: Path) -> JobSpec:
    logs = {"wandb": "team/reviews", "prometheus": False}
    return make_job(tiny_bert, write_splits(tmp_path / "data", 20), tmp_path / "runs", logging=logs)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads its variables once


def _records(path: Path) -> Iterator[Any]:
    """Yield the records of wandb's offline file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header at a block's end
            place += 32768 - place % 32768
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def _files(run: RunDir) -> list[Path]:
    return sorted(Path(run.uri).glob("wandb/offline-run-*/*.wandb"))


def test_resumed_run_continues_its_wandb_run(job: JobSpec, tmp_path: Path, offline: None) -> None:
    run = RunDir(str(tmp_path / "runs" / "test"))
    for first in (1, 4):
        trackers.begin(run, job, {"train.learning_rate": 1e-3})
        (sink,) = [s for s in open_sinks(run, job, first - 1) if isinstance(s, weights_biases.WandbSink)]
        for step in range(first, first + 3):
            sink.write(step_record(step), {"train/loss": 1.0 / step})
        sink.close()
        time.sleep(1.1)  # offline directories are named by the second
    connection = weights_biases._open(run, weights_biases.find(run, job))
    connection.summary.update({"test/accuracy": 0.5})
    connection.finish(exit_code=0)
    files = _files(run)
    records = [record for file in files for record in _records(file)]
    begun = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(r.run_id, r.entity, r.project, r.display_name) for r in begun} == {
        (weights_biases.find(run, job).run_id, "team", "reviews", "test")
    }
    config = {item.key: json.loads(item.value_json) for item in begun[0].config.update}
    assert config["train.learning_rate"] == "0.001"
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(n, 1.0 / n) for n in range(1, 7)]
    summary = [item for r in records if r.WhichOneof("record_type") == "summary" for item in r.summary.update]
    assert "0.5" in [item.value_json for item in summary if "test/accuracy" in (item.key, *item.nested_key)]


def test_trials_form_a_group(job: JobSpec, tmp_path: Path) -> None:
    trial = RunDir(str(tmp_path / "runs" / "my-sweep" / "sweep" / "trials" / "trial-0003"))
    weights_biases.begin(trial, job, {})
    record = weights_biases.find(trial, job)
    assert record is not None and (record.group, record.name) == ("my-sweep", "my-sweep/trial-0003")


def test_unreachable_server_costs_one_warning(
    job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(weights_biases, "_INIT_S", 3.0)
    wandb.teardown()
    run = RunDir(str(tmp_path / "runs" / "test"))
    weights_biases.begin(run, job, {})
    started_at = time.monotonic()
    with caplog.at_level(logging.WARNING):
        sink = weights_biases.WandbSink(run, weights_biases.find(run, job))
        for step in range(1, 4):
            sink.write(step_record(step), {"train/loss": 1.0 / step})
        assert time.monotonic() - started_at < 1  # the training does not wait
        sink.close()
    warnings = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("W&B accepts no numbers of test (")
    assert warnings[0].endswith("); metrics.jsonl has them")


def test_missing_wandb_is_an_error_that_names_the_extra(
    job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_biases, "find_spec", lambda name: None)
    run = RunDir(str(tmp_path / "run"))
    with pytest.raises(SpecError, match=r"logging\.wandb: wandb is not installed; `pip install launcher\[wandb\]`"):
        trackers.begin(run, job, {})
    assert not run.exists()
