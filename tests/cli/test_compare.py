"""`launcher compare`, and the refusals of `replay` and `evaluate --data`, that need no Ray."""

import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import launcher.cli.main as cli
from launcher.driver.evaluate import differences, exported
from launcher.driver.prepare import prepare
from launcher.errors import RunError
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.records import ResultRecord, ScoresRecord, StepRecord
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.spec.scored import check_scores_name, scores_name
from tests.support.jobs import example_table, make_job, write_splits


def _launcher(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def _step(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step, epoch=1, loss=loss, learning_rate=1e-3, grad_norm=None, samples=8, skipped_rows=0,
        samples_per_s=10.0, elapsed_s=float(step),
    )  # fmt: skip


@pytest.fixture
def finished(tiny_bert: Path, tmp_path: Path) -> RunDir:
    """A run that looks finished: all but its checkpoints and weights."""
    prepared = prepare(make_job(tiny_bert, write_splits(tmp_path / "data", 40, test=20), tmp_path / "runs"))
    run = prepared.run
    run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    run.write_record("plan.json", prepared.plan)
    run.append_metrics([_step(step, 1.0 / step) for step in range(1, 5)])
    run.write_record(
        "result.json", ResultRecord(steps=4, best_step=4, stopped_early=False, skipped_rows=0, elapsed_s=4.0)
    )
    run.write_record("scores-test.json", _scores("test", 0.8))
    shutil.copytree(tiny_bert, run.path("model"))
    return run


def _scores(split: str, accuracy: float) -> ScoresRecord:
    return ScoresRecord(
        split=split, step=4, loss=0.5, rows=20, skipped_rows=0, metrics={"accuracy": accuracy},
        baseline={"accuracy": 0.5}, confusion=None, classes=(), worst=(),
    )  # fmt: skip


def _twin(run: RunDir, name: str, metrics: bool = True) -> RunDir:
    twin = RunDir(run.uri.rpartition("/")[0] + f"/{name}")
    for file in ("job.yaml", "plan.json", "result.json", "metrics.jsonl"):
        if metrics or file != "metrics.jsonl":
            twin.write_bytes(file, run.read_bytes(file))
    return twin


def test_compare_prints_and_writes(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = _twin(finished, "twin")
    monkeypatch.chdir(tmp_path)
    assert _launcher("compare", finished.uri, twin.uri, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "test accuracy" in said and "0.8000" in said
    assert "the losses of all 4 steps have the same bits" in said
    assert (tmp_path / "compare.html").read_text().startswith("<!doctype html>")
    (tmp_path / "mine.html").write_text("mine")
    assert _launcher("compare", finished.uri, "--output", "mine.html", monkeypatch=monkeypatch) == 2
    assert "is no comparison page and would be lost; give another file" in capsys.readouterr().err


def test_compare_refuses_what_is_no_run_or_has_no_metrics(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _launcher("compare", finished.uri, str(tmp_path), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.count("no run there (it has no job.yaml)") == 1
    bare = _twin(finished, "bare", metrics=False)
    assert _launcher("compare", finished.uri, bare.uri, monkeypatch=monkeypatch) == 2
    assert "bare: has no metrics yet (metrics.jsonl)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["train.learning_rate=1"],
            "override train.learning_rate=1: train.learning_rate belongs to what was trained, which",
        ),
        (["seed=3"], "override seed=3: seed belongs to what was trained, which stays; only cluster, parallel"),
        (["cluster.workers=0"], "cluster.workers is 0, which is below 1"),
        (["--name", "a/b"], "--name: a/b is not made of at most 63 letters"),
        (["--name", "test"], "--name: test is the run itself; give another name"),
    ],
)
def test_replay_refuses_what_would_be_another_curve(
    finished: RunDir,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _launcher("replay", finished.uri, *arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_replay_refuses_other_data_and_unfinished_runs(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_splits(tmp_path / "data", 41)
    assert _launcher("replay", finished.uri, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "the training data are not those of the run (fingerprint " in said and said.count("\n") == 1
    assert not RunDir(finished.uri + "-replay").exists()
    finished.delete("result.json")
    assert _launcher("replay", finished.uri, monkeypatch=monkeypatch) == 2
    assert "is not finished; finish it with `launcher train` before replaying it" in capsys.readouterr().err


# ---- evaluate --data ----


def _evaluate(run: RunDir, data: Path, *more: str, monkeypatch: pytest.MonkeyPatch) -> int:
    return _launcher("evaluate", run.uri, "--data", str(data), *more, monkeypatch=monkeypatch)


def test_evaluate_says_what_does_not_fit(
    finished: RunDir,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = example_table(12)
    pq.write_table(table.rename_columns(["sentence", "label"]), tmp_path / "named.parquet")
    assert _evaluate(finished, tmp_path / "named.parquet", monkeypatch=monkeypatch) == 2
    assert "named.parquet: has no column 'text', which the task reads" in capsys.readouterr().err
    other = table.set_column(1, "label", pa.array(["a"] * 5 + ["neutral"] * 7))
    pyarrow.csv.write_csv(other, tmp_path / "other.csv")
    assert _evaluate(finished, tmp_path / "other.csv", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/other.csv: row 5: label is 'neutral', which is not one of a, b; mend the row, or set "
        "data.on_bad_row: skip to leave such rows out\n"
    )
    # The files number classes of other names.
    import datasets

    turned = datasets.ClassLabel(names=["spam", "ham"])
    features = datasets.Features({"text": datasets.Value("string"), "label": turned})
    found = datasets.Dataset.from_dict({"text": ["w1"] * 4, "label": [0, 1, 0, 1]}, features=features)
    found.to_parquet(str(tmp_path / "turned.parquet"))
    assert _evaluate(finished, tmp_path / "turned.parquet", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "the classes of label are spam, ham, but the model knows a, b; write the model's names instead" in said
    assert _evaluate(finished, tmp_path / "nowhere", monkeypatch=monkeypatch) == 2
    assert "nowhere does not exist; give a file, a directory or a glob that does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "x.csv", "--split", "test"], "--data and --split: give one of them"),
        (["--name", "x"], "--name: names the scores on --data; give --data too, or leave it out"),
        (["--data", "x.csv", "--name", "test"], "--name: test is a split of the run itself, whose scores stay"),
        (["--data", "x.csv", "train.epochs=3"], "override train.epochs=3: train.epochs belongs to what was trained"),
        (["--split", "train"], "--split is train, which is not one of validation, test"),
    ],
)
def test_evaluate_refuses_what_contradicts_itself(
    finished: RunDir,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _launcher("evaluate", finished.uri, *arguments, monkeypatch=monkeypatch) == 2
    assert said in capsys.readouterr().err


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
def test_the_name_of_scores_comes_from_the_location(location: str, name: str) -> None:
    assert scores_name(location) == name
    assert check_scores_name(name) == name


def test_scores_stand_beside_the_runs_own(finished: RunDir) -> None:
    split, rows = differences(finished, _scores("yelp", 0.7))
    accuracy = rows[0]
    assert split == "test" and accuracy.name == "accuracy" and accuracy.baseline == 0.5
    assert accuracy.change == pytest.approx(-0.1)
    finished.delete("scores-test.json")
    split, rows = differences(finished, _scores("yelp", 0.7))
    assert split == "" and rows[0].change is None
    with pytest.raises(RunError, match="--name: a b is not made of"):
        check_scores_name("a b")


def test_an_evaluation_needs_no_disk_for_states(finished: RunDir) -> None:
    """Else a model that was trained on a cluster's NVMe disks could be scored there alone."""
    parallel = {"offload_optimizer": True, "offload_path": "/mnt/nvme"}
    trained = read_job(finished)
    job = JobSpec.model_validate({**trained.model_dump(), "parallel": parallel})
    scored = exported(finished, job)
    assert (scored.parallel.offload_path, scored.zero_stage) == (None, 3)
    assert scored.model.name == finished.path("model")
