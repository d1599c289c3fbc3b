"""Whole commands on a local Ray: with the fork server killed while they run, and with `launcher up` and `down`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.rundir.directory import RunDir
from launcher.spec.loader import dump_job
from tests.support.fault_runs import curve
from tests.support.jobs import make_job, write_splits

_ROOT = Path(__file__).resolve().parents[2]
_STEPS = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux alone"),
]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return a directory for sockets. Its path is short, as socket paths are limited."""
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run"


@pytest.fixture
def job(tiny_bert: Path, tmp_path: Path) -> Path:
    data = write_splits(tmp_path / "data", train=220, validation=33)
    spec = make_job(
        tiny_bert, data, tmp_path / "runs", train={"epochs": 2}, checkpoint={"every_steps": 5},
        fault_tolerance={"backoff_s": 0},
    )  # fmt: skip
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(spec))
    return path


@pytest.fixture(autouse=True)
def check_nothing_remains(run_folder: Path) -> Iterator[None]:
    yield
    _wait(lambda: not _processes(run_folder), 30)
    # A killed server cannot remove its lock and its log.
    remaining = [path.name for path in (run_folder / "launcher").glob("*") if path.suffix not in (".log", ".lock")]
    assert remaining == []


def _processes(run_folder: Path) -> list[psutil.Process]:
    """Return all processes that were started with this directory in their environment, without zombies."""
    processes = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("XDG_RUNTIME_DIR") == str(run_folder) and process.pid != os.getpid()
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.Error:  # it has ended meanwhile, or is another user's
            continue
    return processes


def _start(run_folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"XDG_RUNTIME_DIR": str(run_folder), "PYTHONPATH": str(_ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", *arguments], cwd=run_folder.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _end(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def _wait(happened: Callable[[], object], limit_s: float = 120) -> None:
    until = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.05)


def _run(job: Path, name: str) -> RunDir:
    return RunDir(str(job.parent / "runs" / name))


def _steps(job: Path, name: str) -> int:
    run = _run(job, name)
    return len(curve(run)) if run.exists("metrics.jsonl") else 0


def _bits(job: Path, name: str) -> tuple[list[tuple[int, int, float]], bytes]:
    run = _run(job, name)
    return curve(run), run.read_bytes("model/model.safetensors")


def _servers(run_folder: Path) -> list[psutil.Process]:
    """Return the processes that listen at a socket in the directory."""
    sockets = {str(path) for path in (run_folder / "launcher").glob("*.sock")}
    return [
        process
        for process in _processes(run_folder)
        if {c.laddr for c in process.net_connections("unix") if c.status == psutil.CONN_NONE} & sockets
        and process.name() != "raylet"
    ]


def _kill_servers(run_folder: Path) -> int:
    servers = _servers(run_folder)
    for process in servers:
        process.kill()
    return len(servers)


@pytest.mark.long
def test_run_with_killed_servers_matches_uninterrupted_run(run_folder: Path, job: Path) -> None:
    # Servers are killed at the start, during training, and before a worker recovers.
    plain = _start(run_folder, "train", str(job), "name=plain")
    assert "done: 40 steps" in _end(plain)
    command = _start(run_folder, "train", str(job), "name=killed", "--chaos", "kill=1@step12,kill=0@step25")
    _wait(lambda: _servers(run_folder))
    assert _kill_servers(run_folder)  # workers then start as plain processes, and the first starts another server
    _wait(lambda: _steps(job, "killed") >= 8)
    _wait(lambda: _servers(run_folder))
    assert _kill_servers(run_folder)
    _wait(lambda: _steps(job, "killed") >= 20)
    for path in (run_folder / "launcher").glob("*.sock"):
        path.unlink()
    assert "done: 40 steps" in _end(command)
    assert _bits(job, "killed") == _bits(job, "plain")


@pytest.mark.long
def test_commands_share_a_warm_ray_and_down_leaves_no_process(run_folder: Path, job: Path) -> None:
    assert "up: Ray at" in _end(_start(run_folder, "up", "--idle-minutes", "5"))
    assert "is up already" in _end(_start(run_folder, "up"))
    both = [_start(run_folder, "train", str(job), f"name=shared-{n}") for n in (1, 2)]
    _wait(lambda: _steps(job, "shared-1") > 3)
    assert "a command runs on" in _end(_start(run_folder, "down"), 2)
    for command in both:
        output = _end(command)
        assert "runs on the Ray of `launcher up`" in output and "done: 40 steps" in output
    assert _bits(job, "shared-1") == _bits(job, "shared-2")

    stopped = _start(run_folder, "train", str(job), "name=stopped", "train.epochs=60")
    _wait(lambda: _steps(job, "stopped") > 3)
    stopped.send_signal(signal.SIGINT)
    assert "which is saved" in _end(stopped, 130)
    refused = _start(run_folder, "train", str(job), "data.train=/nowhere/*.parquet")
    assert "/nowhere" in _end(refused, 2)

    state = json.loads((run_folder / "launcher" / "up.json").read_text())
    os.kill(state["pid"], signal.SIGKILL)
    _wait(lambda: not _processes(run_folder), 30)
    assert "nothing is up" in _end(_start(run_folder, "down"))
    assert "up: Ray at" in _end(_start(run_folder, "up"))
    assert "down: Ray at" in _end(_start(run_folder, "down"))


def test_command_with_another_environment_does_not_use_the_warm_ray(
    run_folder: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _end(_start(run_folder, "up", "--idle-minutes", "0.1"))
    assert "another value" not in _end(_start(run_folder, "check", str(job)))
    monkeypatch.setenv("MY_OWN", "1")
    output = _end(_start(run_folder, "check", str(job)))
    assert "another value of MY_OWN" in output and "steps" in output
    assert "not run on" not in _end(_start(run_folder, "--fresh", "check", str(job)))
    monkeypatch.delenv("MY_OWN")
    _wait(lambda: not (run_folder / "launcher" / "up.json").exists(), 60)  # it ends by itself when idle


def test_killed_command_leaves_no_process(run_folder: Path, job: Path) -> None:
    command = _start(run_folder, "train", str(job), "name=crashed")
    _wait(lambda: _steps(job, "crashed") > 3)
    command.kill()
    command.wait()
