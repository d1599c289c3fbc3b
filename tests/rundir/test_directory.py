"""Run directories: atomic files and typed records, on local disks and on storages without append and rename."""

import errno
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import launcher.rundir.directory
from launcher.errors import CorruptRecordError, RunError, StorageUnavailableError
from launcher.rundir import metrics_log
from launcher.rundir.directory import RunDir, find_run
from launcher.rundir.events import Event
from launcher.rundir.records import ResultRecord
from launcher.rundir.writable import check_storage
from tests.support.records import step_record

_RESULT = ResultRecord(steps=3, best_step=2, stopped_early=False, skipped_rows=0, elapsed_s=1.5)


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """Return a run on a local disk and on `memory://`, which like an object store cannot append or rename in place."""
    return RunDir(str(tmp_path / "run") if request.param == "local" else f"memory://runs/{tmp_path.name}")


def test_record_is_read_as_it_was_written(run: RunDir) -> None:
    assert run.find_record("result.json", ResultRecord) is None
    run.write_record("result.json", _RESULT)
    assert run.read_record("result.json", ResultRecord) == _RESULT
    assert run.list("") == ["result.json"]
    run.write_bytes("result.json", b"{}")
    with pytest.raises(RunError, match="not a valid ResultRecord"):
        run.read_record("result.json", ResultRecord)
    run.delete("result.json")
    run.delete("result.json")
    with pytest.raises(RunError, match=r"result\.json: not found"):
        run.read_record("result.json", ResultRecord)


def test_metrics_are_appended_and_truncated(run: RunDir) -> None:
    assert list(run.read_metrics()) == []
    run.append_metrics([step_record(1), step_record(2)])
    run.append_metrics([step_record(3, math.nan)])
    assert [line.step for line in run.read_metrics()] == [1, 2, 3]
    assert math.isnan(list(run.read_metrics())[-1].loss)
    metrics_log.truncate_after(run, 1)
    assert list(run.read_metrics()) == [step_record(1)]


def test_lines_of_later_steps_are_removed_at_any_position(run: RunDir) -> None:
    # Lines of a stale attempt may stand between those of the newer one.
    run.append_metrics([step_record(1), step_record(9), step_record(2), step_record(3)])
    metrics_log.truncate_after(run, 2)
    assert list(run.read_metrics()) == [step_record(1), step_record(2)]


def test_long_log_is_truncated_and_validated_in_blocks(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.rundir.directory, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(metrics_log, "_LONG_BYTES", 4000)
    lines = [step_record(step) for step in range(1, 101)]
    run.append_metrics(lines)
    metrics_log.validate_log(run)
    assert metrics_log.summarize(run).step == 100
    metrics_log.truncate_after(run, 60)
    assert list(run.read_metrics()) == lines[:60]
    whole = run.read_bytes("metrics.jsonl")
    run.write_bytes("metrics.jsonl", whole + b"{}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:61: not a record"):
        metrics_log.validate_log(run)
    run.write_bytes("metrics.jsonl", whole.replace(b'"step":2,', b'"step":"no",'))
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a record"):
        metrics_log.validate_log(run)
    run.write_bytes("metrics.jsonl", whole.replace(b'"step":30,', b'"step":"no",'))
    with pytest.raises(RunError, match=r"metrics\.jsonl:30: not a record"):
        metrics_log.truncate_after(run, 100)


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run.append_metrics([step_record(1)])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "st')
    assert list(run.read_metrics()) == [step_record(1)]
    metrics_log.truncate_after(run, 1)
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: not a record"):
        list(run.read_metrics())


def test_directory_is_published_and_downloaded(run: RunDir, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_text("new")
    for _ in range(2):
        run.publish_directory(source, "model")
    assert (run.download("model", tmp_path / "copy") / "deep" / "file").read_text() == "new"
    assert run.list("model") == ["deep"]


def test_unwritable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"file/run/a\.json: cannot be written \(Not a directory\); give the job another"
    ):
        RunDir(str(tmp_path / "file" / "run")).write_bytes("a.json", b"")


def test_run_is_found_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="no run there"):
        find_run(str(tmp_path / "runs" / "a"))
    RunDir(str(tmp_path / "runs" / "a")).write_bytes("job.yaml", b"")
    monkeypatch.chdir(tmp_path)
    assert find_run("runs/a/").uri == str(tmp_path / "runs" / "a")


def test_storage_check_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(
            RunError, match=r"^output\.storage: .*/file is a file; give a directory that can be written$"
        ):
            check_storage(str(storage))
    check_storage(str(tmp_path / "a" / "b"))
    check_storage("memory://runs")
    assert not (tmp_path / "a").exists()


def test_concurrent_publishers_of_one_cache_entry_never_hide_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.txt").write_text("x")
    run = RunDir(str(tmp_path / "cache"))
    missing: list[int] = []
    run.publish_directory(source, "entry", keep=True)

    def read(_: int) -> None:
        missing.extend(n for n in range(5) if not (tmp_path / f"cache/entry/{n}.txt").exists())

    with ThreadPoolExecutor(8) as many:
        publishing = [many.submit(run.publish_directory, source, "entry", keep=True) for _ in range(100)]
        list(many.map(read, range(500)))
        for publication in publishing:
            publication.result()
    assert not missing and run.list("") == ["entry"]


def test_immutable_directory_can_be_copied_twice(tmp_path: Path) -> None:
    # A sweep that was killed while it copied the best trial repeats the copy.
    source, target = RunDir(str(tmp_path / "source")), RunDir(str(tmp_path / "target"))
    source.write_bytes("checkpoints/step-00000003/state", b"states")
    for _ in range(2):
        target.copy_from(source, "checkpoints", immutable=True)
    assert target.read_bytes("checkpoints/step-00000003/state") == b"states" and target.list("") == ["checkpoints"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EACCES])
def test_only_transient_errors_allow_a_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def replace(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunError) as caught:
        RunDir(str(tmp_path / "run")).write_bytes("a/b.json", b"1")
    assert isinstance(caught.value, StorageUnavailableError) is (number not in (errno.ENOSPC, errno.EACCES))
    assert os.strerror(number) in caught.value.message and not (tmp_path / "run/a").exists()


def test_record_of_a_newer_version_is_not_corrupt(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    run.write_bytes("new.json", b'{"kind": "x", "step": 1, "at": 0.0, "text": "t", "later": 1}')
    run.write_bytes("torn.json", b'{"kind": "x", "step"')
    with pytest.raises(RunError, match=r"holds later, which this version .* use the version that wrote it") as caught:
        run.read_record("new.json", Event)
    assert not isinstance(caught.value, CorruptRecordError)
    with pytest.raises(
        CorruptRecordError, match=r"torn\.json: not a valid Event \(.*\); remove it, and the report does without it"
    ):
        run.read_record("torn.json", Event)
