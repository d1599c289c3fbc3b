"""Leases and heartbeats: of two attempts of one run, only the newer one may write."""

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


def test_newer_attempt_makes_the_older_one_stale(tmp_path: Path) -> None:
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


def test_concurrent_attempts_get_different_tokens(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    with ThreadPoolExecutor(16) as many:
        tokens = [acquired.token for acquired in many.map(lambda _: Lease.acquire(run), range(64))]
    assert sorted(tokens) == list(range(1, 65))
    assert len(run.list("attempts")) == 64
    newest = newest_attempt(run)
    assert newest is not None and newest.token == 64


def test_tokens_differ_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDir, "local", property(lambda _: None))
    run = RunDir(str(tmp_path / "run"))
    with ThreadPoolExecutor(4) as many:
        tokens = [acquired.token for acquired in many.map(lambda _: Lease.acquire(run), range(8))]
    assert len(set(tokens)) == 8
    Lease(run, max(tokens)).check()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_tokens_differ_on_a_mount_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # Such as gcsfuse. A record that is created but not written yet counts as an unknown attempt.
    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lease.os, "link", link)
    run = RunDir(str(tmp_path / "run"))
    with ThreadPoolExecutor(8) as many:
        tokens = [acquired.token for acquired in many.map(lambda _: Lease.acquire(run), range(32))]
    assert sorted(tokens) == list(range(1, 33))
    (tmp_path / "run/attempts/000033.json").touch()
    assert newest_attempt(run) is None
    with pytest.raises(StaleAttemptError, match="attempt 33 has taken over from attempt 32"):
        Lease(run, 32).check()


def test_second_driver_on_the_same_machine_is_refused(tmp_path: Path) -> None:
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
    check_not_running(run)  # the driver is dead


def test_reused_pid_is_not_the_driver(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    record = AttemptRecord.here(1).model_copy(update={"pid": os.getppid(), "process_began": 1})
    run.write_record("attempts/000001.json", record)
    check_not_running(run)
    real = record.model_copy(update={"process_began": lease.process_began(os.getppid())})
    run.write_record("attempts/000001.json", real)
    with pytest.raises(RunError, match="works on this run now"):
        check_not_running(run)
    run.write_record("attempts/000001.json", real.model_copy(update={"host": "elsewhere"}))
    check_not_running(run)  # a driver on another machine cannot be seen; its token is stale


def _status_after(run: RunDir, error: BaseException | None) -> HeartbeatRecord:
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


def test_outcome_of_a_run_is_recorded(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    assert run_state(run) == ("unknown", None)
    assert _status_after(run, None).state == "finished"
    assert _status_after(run, RunInterrupted("stopped")).state == "interrupted"
    failed = _status_after(run, TrainingError("the loss is nan"))
    assert (failed.state, failed.reason, failed.token) == ("failed", "the loss is nan", 3)
    assert _status_after(run, ZeroDivisionError()).reason == "ZeroDivisionError"


def test_run_without_heartbeat_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(str(tmp_path / "run"))
    Lease.acquire(run)
    run.write_record("heartbeat.json", HeartbeatRecord(token=1, at=time.time(), state="running"))
    assert run_state(run)[0] == "running"
    run.write_record("heartbeat.json", HeartbeatRecord(token=1, at=time.time() - 100, state="running"))
    assert run_state(run)[0] == "dead"
    # Killed on this machine a moment ago: the heartbeat is recent, but the process does not exist.
    gone = AttemptRecord.here(1).model_copy(update={"process_began": 1})
    run.write_record("attempts/000001.json", gone)
    run.write_record("heartbeat.json", HeartbeatRecord(token=1, at=time.time(), state="running"))
    assert run_state(run)[0] == "dead"


def test_stale_attempt_writes_no_heartbeat(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    other = AttemptRecord.here(2).model_copy(update={"host": "elsewhere"})
    run.write_record("attempts/000002.json", other)
    run_status._write(run, "failed")
    assert not run.exists("heartbeat.json")
