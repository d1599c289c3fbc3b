"""Two attempts of one run: the newer one writes, the older one ends."""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import LauncherError, RunError, RunInterrupted, StaleAttemptError, TrainingError
from launcher.rundir import lease, run_status
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import AttemptRecord, Lease, check_not_running, newest_attempt
from launcher.rundir.run_status import HeartbeatRecord, publish_run_status, run_state


def test_tokens_grow_and_the_older_attempt_is_stale(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    first = Lease.acquire(run)
    first.check()
    second = first.renew()
    assert (first.token, second.token) == (1, 2)
    second.check()
    with pytest.raises(
        StaleAttemptError, match=rf"attempt 2 \(process {os.getpid()} on .*\) has taken over from attempt 1"
    ):
        first.check()
    with pytest.raises(StaleAttemptError):
        first.renew()
    assert second.renew().token == 3


def test_no_two_get_the_same_token(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    with ThreadPoolExecutor(16) as many:
        tokens = [taken.token for taken in many.map(lambda _: Lease.acquire(run), range(64))]
    assert sorted(tokens) == list(range(1, 65))
    assert len(run.list("attempts")) == 64
    newest = newest_attempt(run)
    assert newest is not None and newest.token == 64


def test_a_storage_without_exclusive_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an object store: both write, and who sees the other gives way."""
    monkeypatch.setattr(RunDir, "local", property(lambda _: None))
    run = RunDir(str(tmp_path / "run"))
    with ThreadPoolExecutor(4) as many:
        tokens = [taken.token for taken in many.map(lambda _: Lease.acquire(run), range(8))]
    assert len(set(tokens)) == 8
    Lease(run, max(tokens)).check()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_a_mount_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As gcsfuse's; a place that was taken and not written yet is nobody's yet."""

    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lease.os, "link", link)
    run = RunDir(str(tmp_path / "run"))
    with ThreadPoolExecutor(8) as many:
        tokens = [taken.token for taken in many.map(lambda _: Lease.acquire(run), range(32))]
    assert sorted(tokens) == list(range(1, 33))
    (tmp_path / "run/attempts/000033.json").touch()
    assert newest_attempt(run) is None
    with pytest.raises(StaleAttemptError, match="attempt 33 has taken over from attempt 32"):
        Lease(run, 32).check()


def test_a_second_start_on_the_same_machine_is_refused(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    code = f"""
import time
from launcher.rundir.lease import Lease
from launcher.rundir.directory import RunDir
print(Lease.acquire(RunDir({run.uri!r})).token, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        with pytest.raises(RunError, match=f"process {other.pid} on this machine works on this run now"):
            check_not_running(run)
        other.kill()
    check_not_running(run)  # it is dead: go on


def test_another_process_of_the_same_pid_is_another(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    record = AttemptRecord.here(1).model_copy(update={"pid": os.getppid(), "process_began": 1})
    run.write_record("attempts/000001.json", record)
    check_not_running(run)
    real = record.model_copy(update={"process_began": lease.process_began(os.getppid())})
    run.write_record("attempts/000001.json", real)
    with pytest.raises(RunError, match="works on this run now"):
        check_not_running(run)
    run.write_record("attempts/000001.json", real.model_copy(update={"host": "elsewhere"}))
    check_not_running(run)  # nobody can tell from here; it is fenced off


def _ended(run: RunDir, error: BaseException | None) -> HeartbeatRecord:
    Lease.acquire(run)
    try:
        with publish_run_status(run):
            until = time.monotonic() + 5
            while run_state(run)[0] != "running":
                assert time.monotonic() < until
            if error is not None:
                raise error
    except (LauncherError, ZeroDivisionError):
        pass
    return run.read_record("heartbeat.json", HeartbeatRecord)


def test_how_a_run_ended_is_written_down(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    assert run_state(run) == ("unknown", None)
    assert _ended(run, None).state == "finished"
    assert _ended(run, RunInterrupted("stopped")).state == "interrupted"
    failed = _ended(run, TrainingError("the loss is nan"))
    assert (failed.state, failed.reason, failed.token) == ("failed", "the loss is nan", 3)
    assert _ended(run, ZeroDivisionError()).reason == "ZeroDivisionError"


def test_a_heart_that_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(str(tmp_path / "run"))
    Lease.acquire(run)
    run.write_record("heartbeat.json", HeartbeatRecord(token=1, at=time.time(), state="running"))
    assert run_state(run)[0] == "running"
    run.write_record("heartbeat.json", HeartbeatRecord(token=1, at=time.time() - 100, state="running"))
    assert run_state(run)[0] == "dead"
    # Killed a moment ago, on this machine: its process is not there.
    gone = AttemptRecord.here(1).model_copy(update={"process_began": 1})
    run.write_record("attempts/000001.json", gone)
    run.write_record("heartbeat.json", HeartbeatRecord(token=1, at=time.time(), state="running"))
    assert run_state(run)[0] == "dead"


def test_an_older_attempt_leaves_the_heartbeat_alone(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    other = AttemptRecord.here(2).model_copy(update={"host": "elsewhere"})
    run.write_record("attempts/000002.json", other)
    run_status._write(run, "failed")
    assert not run.exists("heartbeat.json")
