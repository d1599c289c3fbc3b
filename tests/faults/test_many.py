"""Kills at random times, again and again; prints its seed. LAUNCHER_KILLS says how many, LAUNCHER_SEED which."""

import os
import random
from pathlib import Path

import psutil
import pytest

from launcher.errors import LauncherError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.spec.job import JobSpec
from launcher.train.checkpoint import catalog
from tests.support.fault_runs import curve, run_with, same

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("LAUNCHER_KILLS", "50"))
SEED = int(os.environ.get("LAUNCHER_SEED", str(random.randrange(10**6))))


def test_random_kills_leave_no_trace_in_the_curve(job: JobSpec, plain: RunDir) -> None:
    print(f"\n{KILLS} kills, seed {SEED}")
    before = set(psutil.pids())
    chaos, bears = f"random={KILLS},seed={SEED}", {"max_failures": 10 * KILLS, "same_step": 100, "backoff_s": 0}
    run, said = run_with(job, f"random-{SEED}", chaos, fault_tolerance=bears)
    same(run, plain)
    happened = [name for name in run.list("chaos") if "kill" in name]
    print(f"{len(happened)} kills happened, {said.count('going on from step')} starts were made for them")
    assert len(happened) == KILLS
    found = psutil.process_iter(["pid", "cmdline"])  # a zombie has no command line
    left = [" ".join(one.info["cmdline"] or ()) for one in found if one.info["pid"] not in before]
    assert not [line for line in left if "RayTrainWorker" in line], "no orphan"


def test_workers_are_killed_wherever_a_run_is_and_the_storage_fails(job: JobSpec, plain: RunDir) -> None:
    run, _ = run_with(job, "places", "kill=1@evaluation,kill=0@save,flaky@step1")
    same(run, plain)
    assert {name.split("-", 1)[1] for name in run.list("chaos")} == {"kill=1@evaluation", "kill=0@save"}


def test_a_checkpoint_that_is_cut_short_gives_way_to_the_one_before(job: JobSpec, plain: RunDir) -> None:
    with pytest.raises(TrainingError, match="failure 1"):
        run_with(job, "cut-short", "kill=0@step23", fault_tolerance={"max_failures": 0})
    run = RunDir(f"{job.output.storage}/cut-short")
    newest = catalog.latest_step(run)
    shard = max(Path(run.path(catalog.checkpoint_dir(newest))).rglob("*.pt"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    run, said = run_with(job, "cut-short", fault_tolerance={"max_failures": 0})
    same(run, plain)
    assert f"the checkpoint of step {newest} is damaged" in said and "missing or truncated" in said


def test_a_driver_that_is_killed_again_and_again(job: JobSpec, plain: RunDir, tmp_path: Path) -> None:
    import subprocess
    import sys

    from launcher.spec.loader import dump_job

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
    orphans = [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or ())]
    assert not orphans
