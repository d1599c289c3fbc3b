"""Many kills at random times. LAUNCHER_KILLS is their number, LAUNCHER_SEED their seed, which the test prints."""

import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launcher.errors import LauncherError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.train.checkpoint import catalog
from tests.support.fault_runs import assert_same_run, curve, run_with

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("LAUNCHER_KILLS", "50"))
SEED = int(os.environ.get("LAUNCHER_SEED", str(random.randrange(10**6))))


def test_random_kills_leave_the_curve_unchanged(job: JobSpec, plain: RunDir) -> None:
    print(f"\n{KILLS} kills, seed {SEED}")
    pids_before = set(psutil.pids())
    limits = {"max_failures": 10 * KILLS, "same_step": 100, "backoff_s": 0}
    run, output = run_with(job, f"random-{SEED}", f"random={KILLS},seed={SEED}", fault_tolerance=limits)
    assert_same_run(run, plain)
    kills = [name for name in run.list("chaos") if "kill" in name]
    print(f"{len(kills)} kills, {output.count('resuming from step')} restarts")
    assert len(kills) == KILLS
    assert not [line for pid, line in _processes() if pid not in pids_before and "RayTrainWorker" in line], "orphans"


def test_kills_during_evaluation_and_save_and_a_failing_storage_leave_the_curve_unchanged(
    job: JobSpec, plain: RunDir
) -> None:
    run, _ = run_with(job, "places", "kill=1@evaluation,kill=0@save,flaky@step1")
    assert_same_run(run, plain)
    assert {name.split("-", 1)[1] for name in run.list("chaos")} == {"kill=1@evaluation", "kill=0@save"}


def test_a_truncated_checkpoint_is_replaced_by_the_one_before(job: JobSpec, plain: RunDir) -> None:
    with pytest.raises(TrainingError, match="failure 1"):
        run_with(job, "cut-short", "kill=0@step23", fault_tolerance={"max_failures": 0})
    run = RunDir(f"{job.output.storage}/cut-short")
    newest = catalog.latest_step(run)
    shard = max(Path(run.path(catalog.checkpoint_dir(newest))).rglob("*.pt"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    run, output = run_with(job, "cut-short", fault_tolerance={"max_failures": 0})
    assert_same_run(run, plain)
    assert f"the checkpoint of step {newest} is damaged" in output and "missing or truncated" in output


def test_a_killed_driver_resumes_with_the_same_command(job: JobSpec, plain: RunDir, tmp_path: Path) -> None:
    name = "driver-killed"
    changed = job.model_copy(update={"name": name})
    (tmp_path / "job.yaml").write_text(dump_job(changed))
    command = [sys.executable, "-m", "launcher", "train", str(tmp_path / "job.yaml")]
    for chaos in ("kill=driver@step9,kill=driver@step23,term=driver@step31",) * 4:
        done = subprocess.run([*command, "--chaos", chaos], capture_output=True, text=True, timeout=600)
        if done.returncode == 0:
            break
        assert done.returncode in (-9, 130), done.stderr
    else:
        raise LauncherError(done.stderr)
    run = RunDir(f"{job.output.storage}/{name}")
    assert curve(run) == curve(plain)
    assert not [line for _, line in _processes() if str(tmp_path) in line], "orphans"


def _processes() -> list[tuple[int, str]]:
    """Return process id and command line of every process; those of zombies are empty."""
    processes = psutil.process_iter(["pid", "cmdline"])
    return [(process.info["pid"], " ".join(process.info["cmdline"] or ())) for process in processes]
