"""`launcher compare`, and runs and data that `replay` and `evaluate` refuse before Ray starts.

`tests/refusals/test_run_commands.py` shows the arguments that they refuse.
"""

import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from launcher.driver.evaluate import compare_with_own_scores, with_exported_model
from launcher.driver.prepare import prepare
from launcher.errors import RunError
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.records import ResultRecord, ScoresRecord, StepRecord
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.spec.scored import check_scores_name, scores_name
from tests.support.command_line import CommandLine
from tests.support.jobs import example_table, make_job, write_splits


def _step(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step, epoch=1, loss=loss, learning_rate=1e-3, grad_norm=None, samples=8, skipped_rows=0,
        samples_per_s=10.0, elapsed_s=float(step),
    )  # fmt: skip


@pytest.fixture
def finished(tiny_bert: Path, tmp_path: Path) -> RunDir:
    """Create a run that looks finished, but without checkpoints."""
    prepared = prepare(make_job(tiny_bert, write_splits(tmp_path / "data", 40, test=20), tmp_path / "runs"))
    run = prepared.run
    run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    run.write_record("plan.json", prepared.plan)
    run.append_metrics([_step(step, 1.0 / step) for step in range(1, 5)])
    result = ResultRecord(steps=4, best_step=4, stopped_early=False, skipped_rows=0, elapsed_s=4.0)
    run.write_record("result.json", result)
    run.write_record("scores-test.json", _scores("test", 0.8))
    shutil.copytree(tiny_bert, run.path("model"))
    return run


def _scores(split: str, accuracy: float) -> ScoresRecord:
    return ScoresRecord(
        split=split, step=4, loss=0.5, rows=20, skipped_rows=0, metrics={"accuracy": accuracy},
        baseline={"accuracy": 0.5}, confusion=None, classes=(), worst=(),
    )  # fmt: skip


def _copy(run: RunDir, name: str, metrics: bool = True) -> RunDir:
    copy = RunDir(run.uri.rpartition("/")[0] + f"/{name}")
    for file in ("job.yaml", "plan.json", "result.json", "metrics.jsonl"):
        if metrics or file != "metrics.jsonl":
            copy.write_bytes(file, run.read_bytes(file))
    return copy


def test_compare_prints_metrics_and_writes_a_page(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: CommandLine
) -> None:
    copy = _copy(finished, "copy")
    monkeypatch.chdir(tmp_path)
    ended = launcher("compare", finished.uri, copy.uri)
    assert ended.code == 0 and "test accuracy" in ended.out and "0.8000" in ended.out
    assert "the losses of all 4 steps are bit-identical" in ended.out
    assert (tmp_path / "compare.html").read_text().startswith("<!doctype html>")


def test_compare_refuses_a_run_without_metrics(finished: RunDir, launcher: CommandLine) -> None:
    ended = launcher("compare", finished.uri, _copy(finished, "bare", metrics=False).uri)
    assert ended.code == 2 and "bare: has no metrics yet (metrics.jsonl)" in ended.err


def test_replay_refuses_other_data_and_unfinished_runs(finished: RunDir, tmp_path: Path, launcher: CommandLine) -> None:
    write_splits(tmp_path / "data", 41)
    ended = launcher("replay", finished.uri)
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "the training data are not those of the run (fingerprint " in ended.err
    assert not RunDir(finished.uri + "-replay").exists()
    finished.delete("result.json")
    ended = launcher("replay", finished.uri)
    assert ended.code == 2
    assert "is not finished; finish it with `launcher train` before replaying it" in ended.err


def test_evaluate_refuses_data_that_does_not_fit_the_model(
    finished: RunDir, tmp_path: Path, launcher: CommandLine
) -> None:
    table = example_table(12)
    pq.write_table(table.rename_columns(["sentence", "label"]), tmp_path / "named.parquet")
    pyarrow.csv.write_csv(table.set_column(1, "label", pa.array(["a"] * 5 + ["neutral"] * 7)), tmp_path / "other.csv")
    # The numbers of these labels mean other class names.
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["spam", "ham"])}
    )
    spam = datasets.Dataset.from_dict({"text": ["w1"] * 4, "label": [0, 1, 0, 1]}, features=features)
    spam.to_parquet(str(tmp_path / "spam.parquet"))
    sentences = {
        "named.parquet": "named.parquet: has no column 'text', which the task reads",
        "other.csv": f"{tmp_path}/other.csv: row 5: label is 'neutral', which is not one of a, b; ",
        "spam.parquet": "the classes of label are spam, ham, but the model knows a, b; write the model's names instead",
        "nowhere": "nowhere does not exist; give a file, a directory or a glob that does",
    }
    for data, sentence in sentences.items():
        ended = launcher("evaluate", finished.uri, "--data", str(tmp_path / data))
        assert ended.code == 2 and sentence in ended.err, ended


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/data/yelp.parquet", "yelp"),
        ("/data/yelp/", "yelp"),
        ("yelp/v1.2", "v1"),
        ("s3://bucket/yelp/reviews.csv?region=x", "reviews"),
        ("/data/yelp/test.parquet", "yelp-test"),
        ("/data/yelp/*.parquet", "yelp"),
        ("/data/yelp/**/part-*.parquet", "yelp"),
        ("hub:ORG/NAME#test", "NAME-test"),
        ("hub:ORG/NAME/CONFIG#extra", "extra"),
        ("test.parquet", "other-test"),
        ("*.csv", "data"),
        ("../mine/my reviews (2).csv", "my-reviews-2"),
    ],
)
def test_scores_are_named_after_the_location(location: str, name: str) -> None:
    assert scores_name(location) == name
    assert check_scores_name(name) == name


def test_scores_on_other_data_are_compared_with_the_runs_own(finished: RunDir) -> None:
    split, rows = compare_with_own_scores(finished, _scores("yelp", 0.7))
    accuracy = rows[0]
    assert split == "test" and accuracy.name == "accuracy" and accuracy.baseline == 0.5
    assert accuracy.change == pytest.approx(-0.1)
    finished.delete("scores-test.json")
    split, rows = compare_with_own_scores(finished, _scores("yelp", 0.7))
    assert split == "" and rows[0].change is None
    with pytest.raises(RunError, match="--name: a b is not made of"):
        check_scores_name("a b")


def test_evaluation_needs_no_offload_directory(finished: RunDir) -> None:
    # A model that was trained with NVMe offload on a cluster can be evaluated elsewhere.
    parallel = {"offload_optimizer": True, "offload_path": "/mnt/nvme"}
    trained = read_job(finished)
    job = JobSpec.model_validate({**trained.model_dump(), "parallel": parallel})
    evaluated = with_exported_model(finished, job)
    assert (evaluated.parallel.offload_path, evaluated.zero_stage) == (None, 3)
    assert evaluated.model.name == finished.path("model")
