"""Seconds from the command to the end of the first step: `launcher train`, and transformers' Trainer under torchrun.

SST-2, MiniLM-L6, global batch 32 over 2 workers, in turn, several rounds; caches and compiled kernels are warm on both
sides. `cold` starts Ray itself, `warm` runs on the Ray of `launcher up`, which is started before the clock and ended
after it. Prints the medians as one JSON object on its last line. `make bench-start`; figures in ../README.md. Runs on
the client; needs no GPU.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE.parent / "throughput"))

from run import DATA, MODEL, call, environment, write_job  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "bench-start")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    subprocess.run([sys.executable, str(ROOT / "jobs" / "quickstart" / "prepare.py")], check=True, stdout=sys.stderr)
    storage = options.storage.resolve()
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir(parents=True)
    job = write_job(storage, 2)
    found: dict[str, list[float]] = {"cold": [], "warm": [], "trainer": []}
    for number in range(-1, options.rounds):  # the first fills caches
        seconds = {"cold": launch(job, f"cold-{number + 1}")}
        call([sys.executable, "-m", "launcher", "up"], storage / "up.log")
        try:
            seconds["warm"] = launch(job, f"warm-{number + 1}")
        finally:
            call([sys.executable, "-m", "launcher", "down", "--force"], storage / "down.log")
        seconds["trainer"] = torchrun(storage, number)
        print(f"round {number + 1}  " + "  ".join(f"{side} {s:.1f} s" for side, s in seconds.items()), flush=True)
        for side, value in seconds.items():
            found[side] += [value] if number >= 0 else []
    median = {side: statistics.median(values) for side, values in found.items()}
    over = {"over_trainer": median["cold"], "over_trainer_warm": median["warm"]}
    result = {name: round(seconds / median["trainer"], 3) for name, seconds in over.items()}
    print(json.dumps({**result, **{f"{side}_s": round(seconds, 1) for side, seconds in median.items()}}))
    return 0


def launch(job: Path, name: str) -> float:
    """Until the first step is written into metrics.jsonl; the command then runs to its end."""
    command = [sys.executable, "-m", "launcher", "train", str(job), f"name={name}", "train.log_every_steps=1"]
    metrics, begun = job.parent / name / "metrics.jsonl", time.monotonic()
    with (job.parent / f"{name}.log").open("wb") as log:
        running = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        while not (metrics.exists() and '"step":1,' in metrics.read_text(encoding="utf-8")):
            if running.poll() is not None:
                sys.exit(f"error: exit code {running.returncode}, see {log.name}")
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        running.wait()
    return seconds


def torchrun(storage: Path, number: int) -> float:
    """As the peer's script says, from the start of torchrun on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(HERE.parent / "throughput" / "trainer.py"), f"--data={DATA}", f"--model={MODEL}"]
    command += [f"--scratch={storage / 'scratch'}", "--steps=2", "--warm=2"]
    output = call(command, storage / f"trainer-{number + 1}.log")
    return float(json.loads(output.strip().splitlines()[-1])["first_step_s"])


if __name__ == "__main__":
    sys.exit(main())
