"""MLflow: a run, or the trials of a sweep as children of one run, with the numbers of metrics.jsonl."""

from io import StringIO
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from launcher.driver.prepare import with_absolute_paths
from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord
from launcher.rundir.trials import TrialRecord
from launcher.spec.job import JobSpec
from launcher.train.loggers import mlflow
from launcher.tune.run import run_sweep
from tests.support.jobs import make_job, write_splits
from tests.support.records import step_record


def _job(tiny_bert: Path, folder: Path, uri: str) -> JobSpec:
    data = write_splits(folder / "data", 64, validation=20, test=20)
    return make_job(
        tiny_bert, data, folder / "runs",
        train={"epochs": 2, "batch_size": 16}, evaluation={"every_steps": 4}, logging={"mlflow": uri},
        tune={"space": {"train.learning_rate": {"choice": [1e-4, 1e-3]}}, "search": "grid", "max_concurrent": 2},
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_resumed_run_continues_its_mlflow_run(tiny_bert: Path, tmp_path: Path, store: str) -> None:
    job, run = _job(tiny_bert, tmp_path, store), RunDir(str(tmp_path / "run"))
    run_id = mlflow.begin(run, job, {"train.learning_rate": 1e-4, "long": "x" * 10_000})
    assert run_id is not None
    assert mlflow.begin(run, job, {}) == run_id
    for attempt in range(2):
        sink = mlflow.MlflowSink(store, run_id)
        for step in range(5 * attempt, 5 * attempt + 5):
            sink.write(step_record(step), {"train/loss": 1.0 / (1 + step)})
        sink.close()
    client = MlflowClient(tracking_uri=store)
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == list(range(10))
    assert client.get_run(run_id).data.params["train.learning_rate"] == "0.0001"


def test_unreachable_server_is_an_error_before_the_run_and_a_warning_during_it(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, run = _job(tiny_bert, tmp_path, "http://127.0.0.1:9"), RunDir(str(tmp_path / "run"))
    with pytest.raises(RunError, match=r"logging\.mlflow: http://127\.0\.0\.1:9 cannot be used .*; fix it, or drop"):
        mlflow.begin(run, job, {})
    assert mlflow.find(run, job) is None
    sink = mlflow.MlflowSink("http://127.0.0.1:9", "gone")
    sink.write(step_record(1), {"train/loss": 1.0})
    sink.close()
    assert "accepts no more numbers" in caplog.text


def test_relative_store_becomes_absolute(tiny_bert: Path, tmp_path: Path) -> None:
    job = _job(tiny_bert, tmp_path, "sqlite:///mlflow.db")
    assert with_absolute_paths(job).logging.mlflow == f"sqlite:///{Path.cwd()}/mlflow.db"
    assert with_absolute_paths(with_absolute_paths(job)) == with_absolute_paths(job)


@pytest.mark.parametrize("uri", ["nowhere://x", "plain-folder"])
def test_unsupported_store_is_rejected(tiny_bert: Path, tmp_path: Path, uri: str) -> None:
    with pytest.raises(RunError, match=r"logging\.mlflow: .* cannot be used .*; fix it, or drop logging\.mlflow"):
        mlflow.begin(RunDir(str(tmp_path / "run")), _job(tiny_bert, tmp_path, uri), {})


@pytest.mark.ray
@pytest.mark.long
def test_trials_are_children_of_the_sweep(tiny_bert: Path, tmp_path: Path, store: str, ray_cluster: None) -> None:
    job = _job(tiny_bert, tmp_path, store)
    run = run_sweep(job, Console(file=StringIO(), width=200))
    sweep, client = mlflow.find(run, job), MlflowClient(tracking_uri=store)
    assert sweep is not None
    for number in range(2):
        trial = RunDir(run.path(f"sweep/trials/trial-{number:04d}"))
        record = mlflow.find(trial, job)
        assert record is not None
        logged = client.get_run(record.run_id)
        assert logged.data.tags["mlflow.parentRunId"] == sweep.run_id
        params = trial.read_record("trial.json", TrialRecord).params
        assert logged.data.params == {key: str(value) for key, value in params.items()}
        losses = [(line.step, line.loss) for line in trial.read_metrics() if isinstance(line, EvaluationRecord)]
        history = client.get_metric_history(record.run_id, "validation/loss")
        assert [(m.step, m.value) for m in history] == losses
