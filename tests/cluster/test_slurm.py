"""cluster/slurm/launcher.sbatch: what it decides, with commands that pretend; and a real Ray over two real nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.jobs import write_splits
from tests.support.network_namespaces import why_no_nodes
from tests.support.slurm_nodes import Allocation
from tests.support.tiny_models import make_tiny_bert

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = _ROOT / "cluster" / "slurm" / "launcher.sbatch"
_WHY_NOT = why_no_nodes("ip", "unshare")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (Debian: shellcheck)")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", str(_SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_notice_leaves_time_to_save_and_to_clean_up() -> None:
    text = _SCRIPT.read_text(encoding="utf-8")
    notice = int(re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE).group(1))
    grace = int(re.search(r"^grace_s=\$\{LAUNCHER_GRACE_S:-(\d+)\}$", text, re.MULTILINE).group(1))
    assert notice - grace >= 30
    assert "\n#SBATCH --requeue\n" in text and "\n#SBATCH --open-mode=append\n" in text


# --- what it decides ------------------------------------------------------------------------------------------------

_PRETENDERS = {
    # One task, here.
    "srun": 'echo "srun $*" >> "$LOG"; while case $1 in --*) true ;; *) false ;; esac; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"',
    "squeue": 'echo "${STATE:-RUNNING}"',
    "ray": 'echo "ray $*" >> "$LOG"; eval "${RAY_DOES:-exec sleep 60}"',
    "python": """case $2 in
        *getsockname*) echo 7001 7002 7003 ;;
        *ray.init*) eval "${JOINING_DOES:-true}" ;;
        launcher) echo "python $*" >> "$LOG"; echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE $RAY_ADDRESS" >> "$LOG"
            eval "$LAUNCHER_DOES" ;;
    esac""",
    "apptainer": 'echo "apptainer $*" >> "$LOG"; while [ "$1" != image.sif ]; do shift; done; shift; exec "$@"',
}
_SAVES = "trap 'echo saved >> $LOG; exit 130' TERM; echo training >> $LOG; sleep 30 > /dev/null 2>&1 & wait $!"


@dataclass
class Batch:
    """The script with commands that pretend.

    Args:
        folder: Directory of the job file, the commands and their log.
    """

    folder: Path
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, launcher_does: str, *words: str, **env: str) -> "subprocess.Popen[str]":
        """Start it; `launcher_does` is what `python -m launcher` is to do."""
        bin_ = self.folder / "bin"
        bin_.mkdir(exist_ok=True)
        for name, text in _PRETENDERS.items():
            (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
            (bin_ / name).chmod(0o755)
        (self.folder / "job.yaml").touch()
        settings = {
            "PATH": f"{bin_}:{os.environ['PATH']}", "LOG": str(self.folder / "log"), "LAUNCHER_DOES": launcher_does,
            "SLURM_JOB_ID": f"9{os.getpid()}", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "4", **env,
        }  # fmt: skip
        started = subprocess.Popen(
            ["bash", str(_SCRIPT), *(words or ("train", "job.yaml"))], cwd=self.folder, env=settings, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.started.append(started)
        return started

    def run(self, launcher_does: str, *words: str, **env: str) -> tuple[int, str]:
        """Run it to its end: the exit code and what it said."""
        started = self.start(launcher_does, *words, **env)
        output, _ = started.communicate(timeout=60)
        return started.returncode, output

    def signalled(self, number: signal.Signals, launcher_does: str = _SAVES, **env: str) -> tuple[int, str]:
        """Run it and send it a signal when the launcher trains."""
        started = self.start(launcher_does, **env)
        until = time.monotonic() + 30
        while "training" not in self.log:
            assert time.monotonic() < until and started.poll() is None, self.log
            time.sleep(0.05)
        started.send_signal(number)
        output, _ = started.communicate(timeout=60)
        return started.returncode, output

    @property
    def log(self) -> str:
        """What the commands were asked."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    made = Batch(tmp_path)
    yield made
    for started in made.started:
        if started.poll() is None:
            started.kill()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_its_exit_code_is_the_launchers(batch: Batch, code: int) -> None:
    exit_code, output = batch.run(f"exit {code}", "tune", "job.yaml", "cluster.workers=4")
    assert exit_code == code, output
    assert "python -m launcher tune job.yaml cluster.workers=4" in batch.log
    assert "scontrol" not in batch.log
    assert "rm -rf /tmp/ray-9" in batch.log


def test_rays_directory_is_this_users_alone(batch: Batch, tmp_path: Path) -> None:
    """Whoever made it before could own Ray's sockets: a directory of another user, a link, or one for all."""
    folder = Path(f"/tmp/ray-9{os.getpid()}")
    asks = f"stat -c 'mode %a' {folder} >> $LOG; exec sleep 60"
    folder.mkdir(mode=0o777)  # of an attempt that was killed
    folder.chmod(0o777)
    try:
        code, output = batch.run("sleep 1; exit 0", RAY_DOES=asks)
        assert code == 0 and "mode 700" in batch.log, output
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    try:
        code, output = batch.run("exit 0", RAY_DOES="echo started >> $LOG; exec sleep 60")
        assert f"{folder} on " in output and "is not this user's own" in output and "started" not in batch.log
    finally:
        folder.unlink(missing_ok=True)


def test_ray_is_the_jobs_own(batch: Batch) -> None:
    code, output = batch.run("exit 0", SLURM_GPUS_ON_NODE="8", LAUNCHER_HEAD_IP="10.1.2.3", LAUNCHER_DASHBOARD="1")
    assert code == 0, output
    (ray,) = re.findall("^ray .*", batch.log, re.MULTILINE)
    for word in ("--head", "--node-ip-address=10.1.2.3", "--port=7001", "--dashboard-port=7002", "--num-cpus=4",
                 "--num-gpus=8", "--ray-client-server-port=7003", "--min-worker-port=0", "--block"):  # fmt: skip
        assert word in ray.split()
    assert "token 64 token 10.1.2.3:7001" in batch.log


def test_a_token_of_the_users_own_is_kept(batch: Batch) -> None:
    batch.run("exit 0", RAY_AUTH_TOKEN="x" * 40)
    assert "token 40 token" in batch.log


@pytest.mark.parametrize("words", [("train",), ("evaluate", "job.yaml"), ("train", "other.yaml")])
def test_bad_words_start_nothing(batch: Batch, words: tuple[str, ...]) -> None:
    code, output = batch.run("exit 0", *words)
    assert code == 2
    assert "usage: sbatch" in output or "other.yaml: no such job file" in output
    assert batch.log == ""


def test_term_saves_and_puts_the_job_back(batch: Batch) -> None:
    code, output = batch.signalled(signal.SIGTERM)
    assert code == 130, output
    assert "saved" in batch.log and f"scontrol requeue 9{os.getpid()}" in batch.log
    assert batch.log.index("rm -rf") < batch.log.index("scontrol requeue"), "requeue ends the job's steps"


def test_int_saves_and_ends_the_job(batch: Batch) -> None:
    code, output = batch.signalled(signal.SIGINT)
    assert code == 130, output
    assert "saved" in batch.log and "scontrol" not in batch.log


def test_a_run_that_ends_after_the_signal_is_not_put_back(batch: Batch) -> None:
    code, output = batch.signalled(signal.SIGTERM, _SAVES.replace("130", "0"))
    assert code == 0, output
    assert "scontrol" not in batch.log


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"STATE": "COMPLETING"}, "the job is COMPLETING"),
        ({"SLURM_RESTART_COUNT": "3", "LAUNCHER_MAX_REQUEUES": "3"}, "was put back 3 times"),
    ],
)
def test_some_jobs_stay_ended(batch: Batch, env: dict[str, str], why: str) -> None:
    code, output = batch.signalled(signal.SIGTERM, **env)
    assert code == 1 and why in output
    assert "saved" in batch.log and "scontrol" not in batch.log


def test_a_run_that_does_not_leave_is_killed_and_goes_on(batch: Batch) -> None:
    deaf = "trap '' TERM; echo training >> $LOG; sleep 30 > /dev/null 2>&1 & wait; wait"
    code, output = batch.signalled(signal.SIGTERM, deaf, LAUNCHER_GRACE_S="2")
    assert code == 137 and "did not leave within 2 s" in output
    assert "scontrol requeue" in batch.log


def test_a_signal_before_the_run_puts_the_job_back(batch: Batch) -> None:
    code, output = batch.signalled(signal.SIGTERM, "exit 0", JOINING_DOES="echo training >> $LOG; exec sleep 30")
    assert code == 130, output
    assert "python -m launcher" not in batch.log and "scontrol requeue" in batch.log


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"RAY_DOES": "exit 1", "JOINING_DOES": "exec sleep 30"}, "the head of Ray ended"),
        ({"JOINING_DOES": "exit 1"}, "not all of the 1 nodes joined within 300 s (LAUNCHER_JOIN_S)"),
        ({"SLURM_JOB_NUM_NODES": "2", "LAUNCHER_JOIN_S": "1"}, "the head of Ray did not answer"),
        ({"LAUNCHER_SETUP": "false"}, "LAUNCHER_SETUP failed: false"),
    ],
)
def test_what_fails_before_the_run_is_said(batch: Batch, env: dict[str, str], why: str) -> None:
    code, output = batch.run("exit 0", **env)
    assert code in (1, 2) and why in output, output
    assert "python -m launcher" not in batch.log


def test_ray_that_ends_before_the_run_ends_it(batch: Batch) -> None:
    code, output = batch.run(_SAVES, RAY_DOES="sleep 4; exit 1")
    assert code == 1 and "Ray ended on a node before the run did" in output
    assert "saved" in batch.log and "scontrol" not in batch.log


def test_setup_and_image(batch: Batch) -> None:
    code, output = batch.run(
        "exit 0", LAUNCHER_SETUP="export RAY_AUTH_TOKEN=abc", LAUNCHER_IMAGE="image.sif", SLURM_GPUS_ON_NODE="2",
        LAUNCHER_APPTAINER="--bind /scratch",
    )  # fmt: skip
    assert code == 0, output
    assert "token 3 token" in batch.log
    wrapped = "apptainer exec --bind /scratch --nv image.sif"
    assert f"{wrapped} python -m launcher train job.yaml" in batch.log
    assert re.search(rf"^srun .* {re.escape(wrapped)} bash -c dir=.LAUNCHER_RAY_DIR$", batch.log, re.MULTILINE)


# --- a real Ray -----------------------------------------------------------------------------------------------------

_STEPS = 200
_JOB = """\
name: steady
task: {type: text-classification, max_length: 32}
model: {name: FOLDER/model, dropout: 0.0}
data: {train: FOLDER/data/train.parquet, validation: FOLDER/data/validation.parquet, window_steps: 16}
train: {epochs: 4, batch_size: 8, learning_rate: 1e-3, log_every_steps: 5}
evaluation: {every_steps: 200}
checkpoint: {every_minutes: null}
cluster: {cpus_per_worker: 1.5}
output: {storage: FOLDER/runs}
"""


@pytest.fixture
def allocation() -> Iterator[Allocation]:
    """Start two nodes; a train worker of 1.5 CPUs fits only on the second."""
    folder = Path(tempfile.mkdtemp(prefix="launcher-slurm-", dir="/var/tmp"))
    made = Allocation(folder, f"sl{os.getpid() % 10000}", cpus=(1, 2))
    made.make()
    try:
        yield made
    finally:
        made.take_down()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or "")
@pytest.mark.skipif("LAUNCHER_TEST_SLURM" not in os.environ, reason="two starts of Ray; `make test-slurm` runs it")
def test_a_run_that_is_stopped_goes_on_in_the_next_start(allocation: Allocation) -> None:
    folder = allocation.folder
    make_tiny_bert(folder / "model")
    write_splits(folder / "data", train=400, validation=60)
    (folder / "job.yaml").write_text(_JOB.replace("FOLDER", str(folder)))

    first = _sbatch(allocation)
    _wait_for_step(folder, 20, first)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=180)
    assert first.returncode == 130, output
    saved = int(re.search(r"stopped after step (\d+), which is saved", output).group(1))
    assert 20 <= saved < _STEPS
    assert list((folder / f"runs/steady/checkpoints/step-{saved:08d}").glob("*/manifest.json"))
    assert allocation.called() == ["requeue 4711"]
    assert _left(allocation) == []

    output, _ = (second := _sbatch(allocation, SLURM_RESTART_COUNT="1")).communicate(timeout=300)
    assert second.returncode == 0, output
    assert f"resuming from step {saved}" in output and f"done: {_STEPS} steps" in output
    assert _steps(folder) == [1, *range(5, _STEPS + 1, 5)] or _steps(folder) == list(range(1, _STEPS + 1))
    hosts = {json.loads(path.read_text())["host"] for path in (folder / "runs/steady/workers").glob("rank-*.json")}
    assert hosts == {f"{allocation.name}-1"}
    assert allocation.called() == ["requeue 4711"]
    assert _left(allocation) == []


def _sbatch(allocation: Allocation, **env: str) -> "subprocess.Popen[str]":
    remaining = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    settings = {
        **remaining, "PATH": f"{allocation.folder / 'bin'}:{sys.prefix}/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
        "PYTHONPATH": str(_ROOT), "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2",
        # A node of two CPUs keeps no idle process for the stream's next window, and each new one imports for seconds.
        "RAY_idle_worker_killing_time_threshold_ms": "600000",
        **env,
    }  # fmt: skip
    return subprocess.Popen(
        allocation.on(0, "bash", str(_SCRIPT), "train", "job.yaml"), cwd=allocation.folder, env=settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _steps(folder: Path) -> list[int]:
    path = folder / "runs/steady/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if line["kind"] == "step"]


def _wait_for_step(folder: Path, step: int, started: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 400
    while max(_steps(folder), default=0) < step:
        if started.poll() is not None or time.monotonic() > until:
            started.kill()
            pytest.fail(f"no step {step}: {started.communicate()[0]}")
        time.sleep(0.2)


def _left(allocation: Allocation) -> list[str]:
    """Return the processes and files of Ray on the nodes."""
    until = time.monotonic() + 5  # what was killed takes a moment to be gone
    while allocation.processes() and time.monotonic() < until:
        time.sleep(0.1)
    files = [str(path) for node in range(allocation.nodes) for path in
             (allocation.folder / f"node{node}/tmp").glob("ray-*")]  # fmt: skip
    return [*map(str, allocation.processes()), *files]
