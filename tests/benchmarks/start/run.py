"""Seconds from the command to the end of the first step: `launcher train`, and transformers' Trainer under torchrun.

SST-2, MiniLM-L6, global batch 32 over 2 workers, in turn, several rounds; caches and compiled kernels are warm on both
sides. `cold` starts Ray itself, `warm` runs on the Ray of `launcher up`, which is started before the clock and ended
after it. Prints the medians as one JSON object on its last line. `make bench-start`; figures in ../README.md. Runs on
the client; needs no GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.commands import ENVIRONMENT, call, last_object  # noqa: E402
from tests.benchmarks.throughput.run import trainer_command, write_job  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "bench-start")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    job = write_job(options.storage, 2)
    storage = job.parent
    rounds: dict[str, list[float]] = {"cold": [], "warm": [], "trainer": []}
    for number in range(-1, options.rounds):  # the first fills caches
        seconds = {"cold": launch(job, f"cold-{number + 1}")}
        call([sys.executable, "-m", "launcher", "up"], storage / "up.log")
        try:
            seconds["warm"] = launch(job, f"warm-{number + 1}")
        finally:
            call([sys.executable, "-m", "launcher", "down", "--force"], storage / "down.log")
        trainer = call(trainer_command(storage / "scratch", 2, 2), storage / f"trainer-{number + 1}.log")
        seconds["trainer"] = float(last_object(trainer)["first_step_s"])  # from the start of torchrun on
        print(f"round {number + 1}  " + "  ".join(f"{side} {s:.1f} s" for side, s in seconds.items()), flush=True)
        for side, value in seconds.items():
            rounds[side] += [value] if number >= 0 else []
    median = {side: statistics.median(values) for side, values in rounds.items()}
    over = {"over_trainer": median["cold"], "over_trainer_warm": median["warm"]}
    result = {name: round(seconds / median["trainer"], 3) for name, seconds in over.items()}
    print(json.dumps({**result, **{f"{side}_s": round(seconds, 1) for side, seconds in median.items()}}))
    return 0


def launch(job: Path, name: str) -> float:
    """Return the seconds until the first step is in metrics.jsonl; the command then runs to its end."""
    command = [sys.executable, "-m", "launcher", "train", str(job), f"name={name}", "train.log_every_steps=1"]
    metrics, begun = job.parent / name / "metrics.jsonl", time.monotonic()
    with (job.parent / f"{name}.log").open("wb") as log:
        running = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        while not (metrics.exists() and '"step":1,' in metrics.read_text(encoding="utf-8")):
            if running.poll() is not None:
                sys.exit(f"error: exit code {running.returncode}, see {log.name}")
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        running.wait()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
