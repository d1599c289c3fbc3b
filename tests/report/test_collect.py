"""A run directory becomes data, whatever is missing in it."""

from collections.abc import Callable

import pytest

from launcher.errors import RunError
from launcher.report.collect import collect, missing
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, ScoresRecord
from launcher.rundir.uri import open_uri


def test_a_run_that_has_only_begun(begun: RunDir) -> None:
    data = collect(begun)
    assert (data.steps_done, data.best, data.main_metric, data.scores) == (0, None, None, ())
    assert data.files == ("job.yaml",)
    assert missing(data) == (
        "No training step is logged yet (metrics.jsonl).",
        "The validation data has not been evaluated yet (metrics.jsonl).",
        "The test data has not been scored yet (scores-test.json).",
        "The validation data has not been scored yet (scores-validation.json).",
        "The environment is not recorded yet (environment.json).",
        "There is no plan yet (plan.json).",
    )


def test_a_running_run_names_its_last_step(make_run: Callable[..., RunDir]) -> None:
    run = make_run("running", ("a", "b"), steps=20)
    run.delete("result.json")
    data = collect(run)
    assert data.steps_done == 20
    assert data.best is not None and data.best.step == 14, "the last evaluation that was the best so far"
    assert missing(data) == ("Training is not over: step 20 is the last one logged (result.json).",)


def test_a_finished_run_lacks_nothing(make_run: Callable[..., RunDir]) -> None:
    data = collect(make_run("done", ("a", "b"), steps=20))
    assert missing(data) == ()
    assert [record.split for record in data.scores] == ["test", "validation"]
    assert data.main_metric == "accuracy"
    assert "model/README.md" in data.files
    assert ("zero.stage", "2") in data.plan and ("windows", "[13, 32]") in data.plan


def test_the_jobs_own_metric_comes_first(make_run: Callable[..., RunDir]) -> None:
    run = make_run("chosen", ("a", "b"), steps=20)
    run.write_bytes("job.yaml", run.read_bytes("job.yaml") + b"evaluation: {metric: mcc}\n")
    assert collect(run).main_metric == "mcc"


def test_other_splits_are_found_and_come_last(make_run: Callable[..., RunDir]) -> None:
    run = make_run("more", ("a", "b"), steps=20)
    scores = run.read_record("scores-test.json", ScoresRecord)
    run.write_record("scores-dialect.json", scores.model_copy(update={"split": "dialect"}))
    assert [record.split for record in collect(run).scores] == ["test", "validation", "dialect"]


def test_only_validation_enters_the_curves(begun: RunDir) -> None:
    line = EvaluationRecord(
        split="test", step=3, loss=1.0, metrics={"accuracy": 0.5}, rows=4, skipped_rows=0, seconds=1.0, best=False
    )
    begun.append_metrics([line])
    assert collect(begun).evaluations == ()


def test_keys_in_the_location_stay_out(begun: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    here = open_uri(begun.uri)
    monkeypatch.setattr("launcher.rundir.directory.open_uri", lambda uri: here)
    data = collect(RunDir("s3://KEY:SECRET@bucket/runs/begun?secret_key=SECRET"))
    assert data.location == "s3://bucket/runs/begun"


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("job.yaml", b"name: [", "not a resolved job file"),
        ("job.yaml", b"name: x\n", "not a resolved job file"),
        ("plan.json", b"{", "plan.json: not valid JSON"),
        ("environment.json", b"{}", "environment.json: not a valid EnvironmentRecord"),
    ],
)
def test_a_broken_file_is_named(begun: RunDir, file: str, content: bytes, text: str) -> None:
    begun.write_bytes(file, content)
    with pytest.raises(RunError, match=text):
        collect(begun)


def test_no_run_there(begun: RunDir) -> None:
    with pytest.raises(RunError, match=r"job\.yaml: not found"):
        collect(RunDir(begun.uri + "-else"))
