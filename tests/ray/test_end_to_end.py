"""The commands on a real Ray: train, resume, evaluate, predict; the exported model needs plain transformers only."""

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from launcher.driver.evaluate import evaluate_run
from launcher.driver.run import run_job
from launcher.errors import DataError, RunError
from launcher.predict.run import PredictionResult, predict_run
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, ScoresRecord, StepRecord
from launcher.spec.job import JobSpec
from tests.support.jobs import example_table, make_job, write_splits

pytestmark = pytest.mark.ray

# Predicts with transformers and torch alone, in a process without this package.
_PLAIN = """
import json, sys, torch, pyarrow.parquet as pq
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, data = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = pq.read_table(data).to_pylist()
inputs = tokenizer([row["text"] for row in rows], truncation=True, max_length=32, padding=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits.softmax(-1)
print(json.dumps([[model.config.id2label[int(s.argmax())], s.tolist()] for s in scores]))
assert "launcher" not in sys.modules
"""


@pytest.fixture(scope="module")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("end-to-end")
    data = write_splits(folder / "data", 0, validation=53, test=41)
    pa.csv.write_csv(example_table(201, 7), folder / "data" / "train.csv")
    return make_job(
        tiny_bert,
        {"train": str(folder / "data" / "train.csv"), **data},
        folder / "runs",
        train={"learning_rate": 5e-3, "epochs": 3},
        parallel={"zero": 3},
        cluster={"data_workers": 1},  # explicitly, as so little data would be read in the train workers
    )


@pytest.fixture(scope="module")
def run(job: JobSpec, ray_cluster: None) -> RunDir:
    return run_job(job, Console(quiet=True))


def test_a_run_writes_metrics_scores_and_model(run: RunDir, job: JobSpec) -> None:
    lines = list(run.read_metrics())
    steps = [line for line in lines if isinstance(line, StepRecord)]
    assert [line.step for line in steps] == list(range(1, 58))  # 3 epochs of ceil(201 / 11)
    assert [line.samples for line in steps].count(11) == 54 and sum(line.samples for line in steps) == 603
    evaluations = [line for line in lines if isinstance(line, EvaluationRecord) and line.split == "validation"]
    assert [(line.step, line.rows) for line in evaluations] == [(19, 53), (38, 53), (57, 53)]
    scores = run.read_record("scores-test.json", ScoresRecord)
    assert scores.rows == 41 and scores.metrics["accuracy"] > 0.8 > scores.baseline["accuracy"]
    assert len(scores.worst) == 20 and scores.worst[0].loss >= scores.worst[-1].loss
    for name in ("job.yaml", "plan.json", "environment.json", "result.json", "report.html", "model/README.md"):
        assert run.exists(name), name
    assert not [name for name in run.list("") if name.endswith(".tmp")]


def test_plain_transformers_predict_the_same_with_the_exported_model(run: RunDir, job: JobSpec, tmp_path: Path) -> None:
    assert job.data.test is not None
    data = job.data.test[0]
    output = tmp_path / "predictions"
    assert predict_run(run, data, str(output)) == PredictionResult(41, 0, 0)
    ours = pq.read_table(output).to_pylist()
    assert [row["text"] for row in ours] == pq.read_table(data).column("text").to_pylist()  # order and columns kept
    command = [sys.executable, "-c", _PLAIN, run.path("model"), data]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    plain = json.loads(done.stdout.strip().splitlines()[-1])
    assert [row["prediction"] for row in ours] == [label for label, _ in plain]
    for row, (_, scores) in zip(ours, plain, strict=True):
        assert list(json.loads(row["scores"]).values()) == pytest.approx(scores, abs=1e-5)
    right = sum(row["prediction"] == row["label"] for row in ours)
    assert right / 41 == pytest.approx(run.read_record("scores-test.json", ScoresRecord).metrics["accuracy"])
    with pytest.raises(RunError, match="is not empty; give a new directory"):
        predict_run(run, data, str(output.parent))


def test_evaluate_reproduces_the_scores_of_the_run(run: RunDir) -> None:
    before = run.read_record("scores-test.json", ScoresRecord)
    after = evaluate_run(run, "test", Console(quiet=True))
    assert after.metrics == pytest.approx(before.metrics, abs=1e-6) and after.rows == before.rows
    assert after.loss == pytest.approx(before.loss, abs=1e-5)
    with pytest.raises(RunError, match=r"--split is other, which is not one of validation, test"):
        evaluate_run(run, "other", Console(quiet=True))


def test_a_finished_run_is_not_trained_again(run: RunDir, job: JobSpec) -> None:
    before = run.read_bytes("metrics.jsonl")
    console = Console(file=StringIO(), width=200)
    run_job(job, console)
    assert "is complete" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert run.read_bytes("metrics.jsonl") == before
    changed = job.model_copy(update={"train": job.train.model_copy(update={"learning_rate": 1e-3})})
    with pytest.raises(RunError, match=r"belongs to another job \(train\.learning_rate: 0\.005 -> 0\.001\)"):
        run_job(changed, Console(quiet=True))


@pytest.mark.parametrize("data_workers", [0, 1])
def test_a_bad_row_stops_the_run_and_is_named(
    ray_cluster: None, tiny_bert: Path, tmp_path: Path, data_workers: int
) -> None:
    """Raise in a train worker and in a data worker: the error comes unchanged through Ray Data and Ray Train."""
    table = example_table(60)
    labels = table.column("label").to_pylist()
    labels[31] = None
    pq.write_table(table.set_column(1, "label", pa.array(labels)), tmp_path / "bad.parquet")
    cluster = {"data_workers": data_workers}
    job = make_job(tiny_bert, {"train": str(tmp_path / "bad.parquet")}, tmp_path / "runs", cluster=cluster)
    with pytest.raises(DataError, match=r"bad\.parquet: row 31: label is null; fix the row, or set data\.on_bad_row"):
        run_job(job, Console(quiet=True))


def test_the_custom_task_of_a_readme_trains(
    tiny_bert: Path, tmp_path: Path, user_modules: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    readme = Path(__file__).resolve().parents[2] / "launcher" / "README.md"
    match = re.search(r"```python\n# my_tasks.py\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert match
    (user_modules / "my_tasks.py").write_text(match[1], encoding="utf-8")
    monkeypatch.syspath_prepend(user_modules)
    data = write_splits(tmp_path / "data", 121, validation=53)
    job = make_job(
        tiny_bert, data, tmp_path / "runs", task={"type": "my_tasks:Focal", "gamma": 3.0, "max_length": 32},
        train={"epochs": 3, "learning_rate": 5e-3},
    )  # fmt: skip
    lines = list(run_job(job, Console(quiet=True)).read_metrics())
    first = next(line for line in lines if isinstance(line, StepRecord))
    assert first.loss == pytest.approx(0.693 / 8, rel=0.2)  # random guess: log 2, times (1 - 1/2) ** gamma
    assert [line for line in lines if isinstance(line, EvaluationRecord)][-1].metrics["accuracy"] > 0.9
