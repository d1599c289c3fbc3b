"""Replay on a real Ray: the same curve under another cut of the batches; and evaluation on new data."""

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
from rich.console import Console

import launcher.cli.main as cli
from launcher.driver.run import run_job
from launcher.rundir.certificate import Certificate
from launcher.rundir.directory import RunDir
from launcher.rundir.leakage import LeakageRecord
from launcher.rundir.records import ScoresRecord, StepRecord
from tests.support.jobs import example_table, make_job, write_splits

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(tiny_bert: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("replay")
    data = write_splits(folder / "data", 60, validation=21, test=19)
    return run_job(make_job(tiny_bert, data, folder / "runs", train={"learning_rate": 5e-3}), Console(quiet=True))


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*arguments: str) -> int:
        monkeypatch.setattr(cli, "_quiet", lambda: None)
        monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return int(exit_info.value.code or 0)

    return call


def test_the_run_records_rows_that_its_splits_have_in_common(run: RunDir) -> None:
    record = run.read_record("leakage.json", LeakageRecord)
    assert [(pair.split, pair.other, pair.duplicates) for pair in record.pairs] == [
        ("validation", "train", 0), ("test", "train", 0), ("test", "validation", 0),
    ]  # fmt: skip
    assert "Rows in common: no row of validation is in train" in run.read_bytes("report.html").decode()


def test_a_replay_under_another_cut_agrees_and_a_changed_run_does_not(
    run: RunDir, launcher: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher("replay", run.uri, "cluster.workers=1", "parallel.micro_batch=4", "parallel.zero=0") == 0
    output = capsys.readouterr().out
    assert "the losses of all 6 steps agree within 1e-05" in output or "are bit-identical" in output
    assert "the metrics of all 1 evaluations agree" in output and "dropout" not in output
    replay = RunDir(f"{run.uri}-replay")
    assert b"launcher compare" in replay.read_bytes("compare.html")[:2000]
    lines = list(run.read_metrics())
    broken = [
        line.model_copy(update={"loss": 9.5}) if isinstance(line, StepRecord) and line.step == 4 else line
        for line in lines
    ]
    run.delete("metrics.jsonl")
    run.append_metrics(broken)
    try:
        assert launcher("replay", run.uri, "--name", replay.name) == 1, "a complete replay is only compared"
    finally:
        run.delete("metrics.jsonl")
        run.append_metrics(lines)
    output = capsys.readouterr().out
    assert "the loss curves differ: loss at step 4: 9.5 and " in output


def test_a_run_is_proven_on_one_and_two_workers_and_verified(
    tiny_bert: Path,
    ray_cluster: None,
    launcher: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_splits(tmp_path / "data", 30, validation=11, test=9)
    dropout = {"dropout": 0.1}
    run = run_job(
        make_job(tiny_bert, data, tmp_path / "runs", model=dropout, parallel={"zero": 1}), Console(quiet=True)
    )
    assert launcher("replay", run.uri, "--prove", "--workers", "1,2", "--zero", "0,1") == 0
    output = capsys.readouterr().out
    sentence = "Proven: the same bits on 1 and 2 workers, ZeRO 0 and 1 (certificate.json)"
    assert "shape 4 of 4: 2 workers, ZeRO 1 (test-prove-w2-z1)" in output and sentence in output
    certificate = run.read_record("certificate.json", Certificate)
    assert {shape.hardware for shape in certificate.shapes} == {certificate.hardware} and certificate.hardware
    assert all(shape.versions == certificate.versions and "torch" in shape.versions for shape in certificate.shapes)
    assert list(certificate.hashes.scores) == ["validation", "test"]
    assert sentence in run.read_bytes("model/README.md").decode()
    assert sentence in run.read_bytes("report.html").decode()
    assert launcher("verify", run.uri) == 0
    weights = bytearray(run.read_bytes("model/model.safetensors"))
    weights[-1] ^= 1
    run.write_bytes("model/model.safetensors", bytes(weights))
    assert launcher("verify", run.uri) == 1
    assert "model/model.safetensors, weights: differs, " in capsys.readouterr().out


def test_new_data_are_scored_next_to_the_own_test_data(
    run: RunDir, launcher: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = example_table(40, 9)
    labels = table.column("label").to_pylist()
    hard = ["b" if label == "a" else "a" for label in labels[:10]] + labels[10:]
    pyarrow.csv.write_csv(table.set_column(1, "label", pa.array(hard)), tmp_path / "far.csv")
    before = run.read_bytes("scores-test.json")
    assert launcher("evaluate", run.uri, "cluster.workers=1", "--data", str(tmp_path / "far.csv")) == 0
    output = capsys.readouterr().out
    scores = run.read_record("scores-far.json", ScoresRecord)
    own = run.read_record("scores-test.json", ScoresRecord)
    assert scores.rows == 40 and scores.split == "far" and scores.step == own.step
    assert scores.worst[0].file == str(tmp_path / "far.csv")
    change = scores.metrics["accuracy"] - own.metrics["accuracy"]
    assert f"{change:+.4f}" in output and "difference" in output and "test" in output
    assert run.read_bytes("scores-test.json") == before
    assert "Scores on far" in run.read_bytes("report.html").decode()
