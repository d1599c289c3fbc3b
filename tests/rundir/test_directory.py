"""Run directories: atomic, typed, on local and other file systems."""

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
from launcher.rundir.records import ResultRecord, StepRecord
from launcher.rundir.writable import check_storage

_RESULT = ResultRecord(steps=3, best_step=2, stopped_early=False, skipped_rows=0, elapsed_s=1.5)


def _step(step: int, loss: float = 0.5) -> StepRecord:
    return StepRecord(
        step=step, epoch=1, loss=loss, learning_rate=0.1, grad_norm=None, samples=4, skipped_rows=0,
        samples_per_s=1.0, elapsed_s=1.0,
    )  # fmt: skip


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """`memory://` is an fsspec file system that cannot append or rename in place, as object stores cannot."""
    return RunDir(str(tmp_path / "run") if request.param == "local" else f"memory://runs/{tmp_path.name}")


def test_records_come_back(run: RunDir) -> None:
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


def test_metrics_grow_and_are_truncated(run: RunDir) -> None:
    assert list(run.read_metrics()) == []
    run.append_metrics([_step(1), _step(2)])
    run.append_metrics([_step(3, math.nan)])
    assert [line.step for line in run.read_metrics()] == [1, 2, 3]
    assert math.isnan(list(run.read_metrics())[-1].loss)
    metrics_log.truncate_after(run, 1)
    assert list(run.read_metrics()) == [_step(1)]


def test_lines_of_later_steps_are_forgotten_wherever_they_stand(run: RunDir) -> None:
    """An attempt that did not know it was stale may have written between another's lines."""
    run.append_metrics([_step(1), _step(9), _step(2), _step(3)])
    metrics_log.truncate_after(run, 2)
    assert list(run.read_metrics()) == [_step(1), _step(2)]


def test_a_long_log_is_cut_and_looked_over(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.rundir.directory, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(metrics_log, "_LONG_BYTES", 4000)
    lines = [_step(step) for step in range(1, 101)]
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


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run.append_metrics([_step(1)])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "st')
    assert list(run.read_metrics()) == [_step(1)]
    metrics_log.truncate_after(run, 1)
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: not a record"):
        list(run.read_metrics())


def test_directories_are_published_and_fetched(run: RunDir, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_text("new")
    for _ in range(2):
        run.publish_directory(source, "model")
    assert (run.download("model", tmp_path / "copy") / "deep" / "file").read_text() == "new"
    assert run.list("model") == ["deep"]


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run there"):
        find_run(str(tmp_path))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"file/run/a\.json: cannot be written \(Not a directory\); give the job another"
    ):
        RunDir(str(tmp_path / "file" / "run")).write_bytes("a.json", b"")


def test_a_run_is_found_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDir(str(tmp_path / "runs" / "a")).write_bytes("job.yaml", b"")
    monkeypatch.chdir(tmp_path)
    assert find_run("runs/a/").uri == str(tmp_path / "runs" / "a")


def test_a_storage_is_tried_without_making_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(
            RunError, match=r"^output\.storage: .*/file is a file; give a directory that can be written$"
        ):
            check_storage(str(storage))
    check_storage(str(tmp_path / "a" / "b"))
    check_storage("memory://runs")
    assert not (tmp_path / "a").exists()


def test_many_publishers_of_one_cache_entry(tmp_path: Path) -> None:
    """Nobody fails, and a reader finds it at any time once it is there."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.txt").write_text("x")
    run, missing = RunDir(str(tmp_path / "cache")), []
    run.publish_directory(source, "entry", keep=True)

    def read(_: int) -> None:
        missing.extend(n for n in range(5) if not (tmp_path / f"cache/entry/{n}.txt").exists())

    with ThreadPoolExecutor(8) as many:
        publishing = [many.submit(run.publish_directory, source, "entry", keep=True) for _ in range(100)]
        list(many.map(read, range(500)))
        for one in publishing:
            one.result()
    assert not missing and run.list("") == ["entry"]


def test_what_was_taken_over_half_is_taken_over_again(tmp_path: Path) -> None:
    """A sweep that is killed between its trials and its best job goes on."""
    one, other = RunDir(str(tmp_path / "one")), RunDir(str(tmp_path / "other"))
    one.write_bytes("checkpoints/step-00000003/state", b"states")
    for _ in range(2):
        other.copy_from(one, "checkpoints", immutable=True)
    assert other.read_bytes("checkpoints/step-00000003/state") == b"states" and other.list("") == ["checkpoints"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EACCES])
def test_what_may_pass_is_told_from_what_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def replace(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunError) as told:
        RunDir(str(tmp_path / "run")).write_bytes("a/b.json", b"1")
    assert isinstance(told.value, StorageUnavailableError) is (number not in (errno.ENOSPC, errno.EACCES))
    assert os.strerror(number) in told.value.message and not (tmp_path / "run/a").exists()


def test_a_key_of_a_newer_version_is_no_damage(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    run.write_bytes("new.json", b'{"kind": "x", "step": 1, "at": 0.0, "text": "t", "later": 1}')
    run.write_bytes("torn.json", b'{"kind": "x", "step"')
    with pytest.raises(RunError, match=r"holds later, which this version .* use the version that wrote it") as told:
        run.read_record("new.json", Event)
    assert not isinstance(told.value, CorruptRecordError)
    with pytest.raises(CorruptRecordError, match=r"torn\.json: not a valid Event"):
        run.read_record("torn.json", Event)
