"""The command line: what the user can fix is one sentence with exit code 2, a bug is one line with exit code 1."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError

import launcher.cli.main as cli
from launcher.cli import train
from launcher.cli.main import explain_system_error
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
    job = _job(tmp_path, tiny_bert, data["train"])
    done = launcher("check", str(job), "train.batch_size=10", "task.max_length=32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "30 (10 per epoch, 3 epochs) of 10" in done.stdout and "no validation data" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_all_problems_of_a_job_file_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: x\ntask:\n  type: text-clasification\nmodel: {name: m}\ndata: {train: t}\ntrain:\n  bach_size: 3\n"
    )
    done = launcher("check", "job.yaml", "parallel.zero=7", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    task, key, override = done.stderr.strip().splitlines()
    assert task.startswith("job.yaml:3: task.type is text-clasification")
    assert task.endswith("did you mean text-classification?")
    assert key == "job.yaml:7: train.bach_size is not a key of train; did you mean batch_size?"
    assert override.startswith("override parallel.zero=7: parallel.zero is 7, which is not one of auto, 0, 1, 2, 3")


@pytest.mark.parametrize(
    ("column", "model", "sentence"),
    [
        ("text", "/nowhere/model", "model.name: there is no directory /nowhere/model; give one that exists"),
        ("txt", None, "has no column 'text', which the task reads; did you mean txt?"),
    ],
)
def test_an_unusable_model_or_column_is_one_sentence(
    tiny_bert: Path, tmp_path: Path, column: str, model: str | None, sentence: str
) -> None:
    pq.write_table(example_table(20).rename_columns([column, "label"]), tmp_path / "train.parquet")
    done = launcher("check", str(_job(tmp_path, model or tiny_bert, tmp_path / "train.parquet")), cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    for command in ("report", "evaluate"):
        done = launcher(command, str(tmp_path), cwd=tmp_path)
        assert done.returncode == 2 and "no run there (it has no job.yaml)" in done.stderr


def test_a_storage_that_is_a_file_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    job = _job(tmp_path, tiny_bert, write_splits(tmp_path / "data", 20)["train"])
    for command in ("check", "train"):
        done = launcher(command, str(job), "output.storage=job.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == f"output.storage: {job} is a file; give a directory that can be written\n"


def test_schema_is_json_schema(tmp_path: Path) -> None:
    from jsonschema import Draft202012Validator

    schema = json.loads(launcher("schema", cwd=tmp_path).stdout)
    Draft202012Validator.check_schema(schema)
    job = {"name": "a", "task": {"type": "text-classification"}, "model": {"name": "m"}, "data": {"train": ["t"]}}
    validator = Draft202012Validator(schema)
    assert validator.is_valid({**job, "data": {"train": "t.parquet"}})
    assert validator.is_valid(job) and not validator.is_valid({**job, "tran": {}})


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "full", "/x"), 2, "/x: No space left on device; free space there, or choose another"),
        (KeyError("a\nb"), 1, "the launcher failed (KeyError: 'a\\nb'); run the same command with --debug after"),
    ],
)
def test_system_errors_and_bugs_have_different_exit_codes(
    error: Exception, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "load", fail)
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["launcher", "check", "job.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err
    assert ended.value.code == code and shown.startswith(line) and shown.count("\n") == 1
    assert ("report it" in shown) == (code == 1)
    monkeypatch.setenv("LAUNCHER_DEBUG", "")  # --debug sets it
    monkeypatch.setattr(sys, "argv", ["launcher", "--debug", "check", "job.yaml"])
    with pytest.raises(type(error)):
        cli.main()


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free space there"),
        (errno.EDQUOT, "free space there"),
        (errno.EROFS, "choose a writable directory"),
        (errno.EACCES, "get permission to write there"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.ESTALE, "check the disk or the mount"),
    ],
)
def test_a_system_error_names_the_place_and_the_fix(number: int, fix: str) -> None:
    sentence = explain_system_error(OSError(number, os.strerror(number), "/scratch/x"))
    assert sentence is not None and sentence.startswith(f"/scratch/x: {os.strerror(number)}; ") and fix in sentence
    wrapped = RuntimeError("odd")
    wrapped.__cause__ = OSError(number, os.strerror(number), "/scratch/x")
    assert explain_system_error(wrapped) == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError("Error writing bytes. Detail: [errno 28] No space left on device"), "this machine: No space left on"),
        (Exception("Error while serializing: No space left on device (os error 28)"), "this machine: No space left on"),
        (MemoryError(), "this machine: Cannot allocate memory; close other programs"),
        (
            OutOfMemoryError("Task was killed"),
            "Ray: a process of the command was lost (OutOfMemoryError); ask for fewer",
        ),
        (RayActorError(error_msg="killed by the memory monitor (OOM)"), "Ray: a process of the command was lost (Out"),
        (ActorDiedError(), "Ray: a process of the command was lost (ActorDiedError); run the command again"),
        (RuntimeError("can't start new thread"), "this machine: no more threads can be started; raise the limit"),
    ],
)
def test_system_errors_are_recognised_in_the_errors_of_libraries(error: Exception, sentence: str) -> None:
    assert str(explain_system_error(error)).startswith(sentence)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        FileNotFoundError(errno.ENOENT, "no", "x"),
        RuntimeError("odd"),
        RayActorError(error_msg="its constructor raised KeyError", actor_init_failed=True),
    ],
)
def test_a_bug_is_not_a_system_error(error: Exception) -> None:
    assert explain_system_error(error) is None


def test_a_deleted_working_directory_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory does not exist any more" in str(explain_system_error(FileNotFoundError()))
    monkeypatch.chdir(tmp_path)


def test_ctrl_c_while_the_command_imports_exits_with_130(tmp_path: Path) -> None:
    slow = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "typer.py").write_text(slow)  # found before the library: the signal arrives in the middle of an import
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[2]}"}
    ended = subprocess.run([sys.executable, "-m", "launcher", "tasks"], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")
