"""The command line: one clear sentence and exit code 2 for what a user can mend, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import launcher.cli.main as cli
from launcher.cli import train as runs
from tests.support.jobs import example_table, write_splits

_JOB = """\
name: cli
task: {{type: text-classification}}
model: {{name: {model}}}
data: {{train: {train}}}
"""


def launcher(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, cwd=cwd)


def _job(folder: Path, model: Path | str, train: Path | str) -> Path:
    path = folder / "job.yaml"
    path.write_text(_JOB.format(model=model, train=train))
    return path


def test_check_prints_the_plan(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", 100)
    done = launcher(
        "check",
        str(_job(tmp_path, tiny_bert, data["train"])),
        "train.batch_size=10",
        "task.max_length=32",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "30 (10 per epoch, 3 epochs) of 10" in done.stdout and "no validation data" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_all_problems_of_a_job_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: x\ntask:\n  type: text-clasification\nmodel: {name: m}\ndata: {train: t}\ntrain:\n  bach_size: 3\n"
    )
    done = launcher("check", "job.yaml", "parallel.zero=7", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("job.yaml:3: task.type is text-clasification")
    assert lines[0].endswith("did you mean text-classification?")
    assert lines[1] == "job.yaml:7: train.bach_size is not a key of train; did you mean batch_size?"
    assert lines[2].startswith("override parallel.zero=7: parallel.zero is 7, which is not one of auto, 0, 1, 2, 3")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("column", "model", "said"),
    [
        ("text", "/nowhere/model", "model.name: there is no directory /nowhere/model; give one that exists"),
        ("txt", None, "has no column 'text', which the task reads; did you mean 'txt'?".replace("'txt'?", "txt?")),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tiny_bert: Path, tmp_path: Path, column: str, model: str | None, said: str
) -> None:
    table = example_table(20)
    pq.write_table(table.rename_columns([column, "label"]), tmp_path / "train.parquet")
    done = launcher("check", str(_job(tmp_path, model or tiny_bert, tmp_path / "train.parquet")), cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_place_without_a_run(tmp_path: Path) -> None:
    for command in (["report"], ["evaluate"]):
        done = launcher(*command, str(tmp_path), cwd=tmp_path)
        assert done.returncode == 2 and "no run there (it has no job.yaml)" in done.stderr


def test_a_storage_that_is_a_file(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", 20)
    for command in ("check", "train"):
        job = _job(tmp_path, tiny_bert, data["train"])
        done = launcher(command, str(job), "output.storage=job.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == f"output.storage: {job} is a file; give a directory that can be written\n"


def test_what_nobody_foresaw_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr(runs, "load", fail)
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["launcher", "check", "job.yaml"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    said = capsys.readouterr().err
    assert said.startswith("the launcher failed (KeyError: 'a\\nb'); the same command with --debug after `launcher`")
    assert said.count("\n") == 1
    monkeypatch.setenv("LAUNCHER_DEBUG", "")  # which --debug sets
    monkeypatch.setattr(sys, "argv", ["launcher", "--debug", "check", "job.yaml"])
    with pytest.raises(KeyError):
        cli.main()


def test_schema_is_json_schema(tmp_path: Path) -> None:
    from jsonschema import Draft202012Validator

    done = launcher("schema", cwd=tmp_path)
    schema = json.loads(done.stdout)
    Draft202012Validator.check_schema(schema)
    job = {"name": "a", "task": {"type": "text-classification"}, "model": {"name": "m"}, "data": {"train": ["t"]}}
    validator = Draft202012Validator(schema)
    assert validator.is_valid({**job, "data": {"train": "t.parquet"}})
    assert validator.is_valid(job) and not validator.is_valid({**job, "tran": {}})
