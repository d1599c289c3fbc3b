"""Kills at random times, again and again; prints its seed. LAUNCHER_KILLS says how many, LAUNCHER_SEED which."""

import os
import random
from pathlib import Path

import psutil
import pytest
from chaos_runs import curve, run_with, same

from launcher.errors import LauncherError
from launcher.rundir import RunDir
from launcher.spec.job import JobSpec

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


def test_a_driver_that_is_killed_again_and_again(job: JobSpec, plain: RunDir, tmp_path: Path) -> None:
    import subprocess
    import sys

    from launcher.spec.load import dump_job

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
