"""A run directory is read at any stage of the run (`launcher/report/collect.py`)."""

from collections.abc import Callable

import pytest

from launcher.errors import RunError
from launcher.report.collect import collect, list_missing_parts
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, MemoryUsage, ScoresRecord
from launcher.rundir.uri import open_uri


def test_a_run_with_only_a_job_file(begun: RunDir) -> None:
    data = collect(begun)
    assert (data.steps_done, data.best_evaluation, data.main_metric, data.scores) == (0, None, None, ())
    assert data.files == ("job.yaml",)
    assert list_missing_parts(data) == (
        "No training step is logged yet (metrics.jsonl).",
        "The validation data has not been evaluated yet (metrics.jsonl).",
        "The test data has not been scored yet (scores-test.json).",
        "The validation data has not been scored yet (scores-validation.json).",
        "The environment is not recorded yet (environment.json).",
        "There is no plan yet (plan.json).",
    )


def test_an_unfinished_run_names_its_last_step(make_run: Callable[..., RunDir]) -> None:
    run = make_run("running", ("a", "b"), steps=20)
    run.delete("result.json")
    data = collect(run)
    assert data.steps_done == 20
    assert data.best_evaluation is not None and data.best_evaluation.step == 14, "the last one that was best so far"
    assert list_missing_parts(data) == ("Training has not finished: the last logged step is 20 (result.json).",)


def test_a_finished_run_misses_nothing(make_run: Callable[..., RunDir]) -> None:
    data = collect(make_run("done", ("a", "b"), steps=20))
    assert list_missing_parts(data) == ()
    assert [record.split for record in data.scores] == ["test", "validation"]
    assert data.main_metric == "accuracy"
    assert "model/README.md" in data.files
    assert ("zero.stage", "2") in data.plan and ("windows", "[13, 32]") in data.plan


def test_the_metric_of_the_job_file_is_the_main_one(make_run: Callable[..., RunDir]) -> None:
    run = make_run("chosen", ("a", "b"), steps=20)
    run.write_bytes("job.yaml", run.read_bytes("job.yaml") + b"evaluation: {metric: mcc}\n")
    assert collect(run).main_metric == "mcc"


def test_other_splits_come_last(make_run: Callable[..., RunDir]) -> None:
    run = make_run("more", ("a", "b"), steps=20)
    scores = run.read_record("scores-test.json", ScoresRecord)
    run.write_record("scores-dialect.json", scores.model_copy(update={"split": "dialect"}))
    assert [record.split for record in collect(run).scores] == ["test", "validation", "dialect"]


def test_curves_have_only_validation_data(begun: RunDir) -> None:
    line = EvaluationRecord(
        split="test", step=3, loss=1.0, metrics={"accuracy": 0.5}, rows=4, skipped_rows=0, seconds=1.0, best=False
    )
    begun.append_metrics([line])
    assert collect(begun).evaluations == ()


def test_the_location_has_no_credentials(begun: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_uri(begun.uri)
    monkeypatch.setattr("launcher.rundir.directory.open_uri", lambda uri: opened)
    data = collect(RunDir("s3://KEY:SECRET@bucket/runs/begun?secret_key=SECRET"))
    assert data.location == "s3://bucket/runs/begun"


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("job.yaml", b"name: [", "not a resolved job file"),
        ("job.yaml", b"name: x\n", "not a resolved job file"),
        ("job.yaml", b"\xff\xfe\n", "not a resolved job file"),
        ("plan.json", b"{", "plan.json: not valid JSON"),
        ("environment.json", b"{}", r"environment\.json: not a valid EnvironmentRecord \(.*\); remove it, and"),
    ],
)
def test_an_invalid_file_is_named(begun: RunDir, file: str, content: bytes, text: str) -> None:
    begun.write_bytes(file, content)
    with pytest.raises(RunError, match=text):
        collect(begun)


@pytest.mark.parametrize("content", [b"", b"{", b'{"steps": 3}', b"\xff"])
def test_a_damaged_certificate_is_named_and_left_out(make_run: Callable[..., RunDir], content: bytes) -> None:
    run = make_run("damaged", ("a", "b"), steps=20)
    run.write_bytes("certificate.json", content)
    data = collect(run)
    assert data.certificate is None
    assert list_missing_parts(data) == (
        "The certificate cannot be read; write it again with `launcher replay RUN --prove` (certificate.json).",
    )


def test_a_record_that_is_being_written_is_not_read(begun: RunDir) -> None:
    begun.write_record("workers/memory-1.json", MemoryUsage(rank=1, predicted_bytes=None, used_bytes=7))
    begun.write_bytes("workers/memory-0.json.0123456789ab.tmp", b'{"rank"')
    assert [usage.rank for usage in collect(begun).memory] == [1]


def test_a_directory_without_a_run_is_refused(begun: RunDir) -> None:
    with pytest.raises(RunError, match=r"job\.yaml: not found"):
        collect(RunDir(begun.uri + "-else"))
