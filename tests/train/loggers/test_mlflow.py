"""MLflow: a run, or the trials of a sweep as children of one run, with the numbers that metrics.jsonl has."""

from io import StringIO
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from launcher.driver.prepare import with_absolute_paths
from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, StepRecord
from launcher.rundir.trials import TrialRecord
from launcher.spec.job import JobSpec
from launcher.train.loggers import mlflow
from launcher.train.loggers.sinks import scalars_of
from launcher.tune.run import run_sweep
from tests.support.jobs import make_job, write_splits


def _job(tiny_bert: Path, folder: Path, uri: str) -> JobSpec:
    data = write_splits(folder / "data", 64, validation=20, test=20)
    return make_job(
        tiny_bert, data, folder / "runs",
        train={"epochs": 2, "batch_size": 16}, evaluation={"every_steps": 4}, logging={"mlflow": uri},
        tune={"space": {"train.learning_rate": {"choice": [1e-4, 1e-3]}}, "search": "grid", "max_concurrent": 2},
    )  # fmt: skip


def _step(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step, epoch=1, loss=loss, learning_rate=1e-3, grad_norm=None, samples=8, skipped_rows=0, samples_per_s=1.0,
        elapsed_s=1.0,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_a_run_that_goes_on_keeps_its_name_there(tiny_bert: Path, tmp_path: Path, store: str) -> None:
    job, run = _job(tiny_bert, tmp_path, store), RunDir(str(tmp_path / "run"))
    first = mlflow.begin(run, job, {"train.learning_rate": 1e-4, "long": "x" * 10_000})
    assert first is not None
    assert mlflow.begin(run, job, {}) == first
    for attempt in range(2):
        tracker = mlflow.MlflowSink(store, first)
        for step in range(5):
            line = _step(5 * attempt + step, 1.0 / (1 + step))
            tracker.write(line, scalars_of(line))
        tracker.close()
    found = MlflowClient(tracking_uri=store)
    assert [m.step for m in found.get_metric_history(first, "train/loss")] == list(range(10))
    assert found.get_run(first).data.params["train.learning_rate"] == "0.0001"


def test_a_server_that_is_not_there(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before the run it is an error; a server that goes while the run trains costs a warning."""
    job, run = _job(tiny_bert, tmp_path, "http://127.0.0.1:9"), RunDir(str(tmp_path / "run"))
    with pytest.raises(RunError, match=r"logging\.mlflow: http://127\.0\.0\.1:9 cannot be used .*; fix it, or drop"):
        mlflow.begin(run, job, {})
    assert mlflow.find(run, job) is None
    tracker = mlflow.MlflowSink("http://127.0.0.1:9", "gone")
    tracker.write(_step(1, 1.0), {"train/loss": 1.0})
    tracker.close()
    assert "accepts no more numbers" in caplog.text


def test_a_store_in_a_file_is_the_same_for_all_workers(tiny_bert: Path, tmp_path: Path) -> None:
    job = _job(tiny_bert, tmp_path, "sqlite:///mlflow.db")
    assert with_absolute_paths(job).logging.mlflow == f"sqlite:///{Path.cwd()}/mlflow.db"
    assert with_absolute_paths(with_absolute_paths(job)) == with_absolute_paths(job)


@pytest.mark.parametrize("uri", ["nowhere://x", "plain-folder"])
def test_a_store_that_cannot_be(tiny_bert: Path, tmp_path: Path, uri: str) -> None:
    with pytest.raises(RunError, match=r"logging\.mlflow: .* cannot be used .*; fix it, or drop logging\.mlflow"):
        mlflow.begin(RunDir(str(tmp_path / "run")), _job(tiny_bert, tmp_path, uri), {})


@pytest.mark.ray
@pytest.mark.long
def test_trials_are_children_of_the_sweep(tiny_bert: Path, tmp_path: Path, store: str, ray_cluster: None) -> None:
    job = _job(tiny_bert, tmp_path, store)
    run = run_sweep(job, Console(file=StringIO(), width=200))
    sweep, found = mlflow.find(run, job), MlflowClient(tracking_uri=store)
    assert sweep is not None
    for number in range(2):
        trial = RunDir(run.path(f"sweep/trials/trial-{number:04d}"))
        known = mlflow.find(trial, job)
        assert known is not None
        shown = found.get_run(known.run_id)
        assert shown.data.tags["mlflow.parentRunId"] == sweep.run_id
        params = trial.read_record("trial.json", TrialRecord).params
        assert shown.data.params == {key: str(value) for key, value in params.items()}
        losses = [(x.step, x.loss) for x in trial.read_metrics() if isinstance(x, EvaluationRecord)]
        history = found.get_metric_history(known.run_id, "validation/loss")
        assert [(m.step, m.value) for m in history] == losses
