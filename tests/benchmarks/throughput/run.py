"""Samples per second of `launcher train`, of transformers' Trainer, and of the same engine on batches ready in memory.

SST-2, MiniLM-L6, global batch 32 over 2 workers, the sides in turn, several rounds; every side is timed from the end of
its step 16 to the end of its last. Prints the medians as one JSON object on its last line. `make bench-throughput`;
figures in ../README.md. Runs on the client; needs no GPU.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DATA = ROOT.parent / "shared" / "data" / "text-classification" / "sst2" / "train.parquet"
MODEL = ROOT / "data" / "quickstart" / "model"
WARM = 16
SIDES = ("ours", "limit", "trainer", "trainer_grouped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "bench-throughput")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=112)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to our job file")
    options = parser.parse_args()
    job = write_job(options.storage.resolve(), options.steps)
    found: dict[str, list[float]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            speed = measure(side, job, options, number)
            found[side].append(speed)
            print(f"round {number + 1}  {side:<16} {speed:7.2f} samples/s", flush=True)
    median = {side: statistics.median(values) for side, values in found.items()}
    names = {"limit": "over_limit", "trainer": "over_trainer", "trainer_grouped": "over_trainer_grouped"}
    print(json.dumps({names[side]: round(median["ours"] / median[side], 3) for side in names if side in median}))
    return 0


def write_job(storage: Path, steps: int) -> Path:
    """Our job file in an empty storage: the defaults, and the numbers that both sides share; gets the model first."""
    subprocess.run([sys.executable, str(ROOT / "jobs" / "quickstart" / "prepare.py")], check=True, stdout=sys.stderr)
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir(parents=True)
    job = {
        "name": "throughput",
        "task": {"type": "text-classification", "labels": ["negative", "positive"], "max_length": 128},
        "model": {"name": str(MODEL)},
        "data": {"train": str(DATA)},
        "train": {"max_steps": steps, "batch_size": 32, "learning_rate": 5e-5, "log_every_steps": WARM},
        "cluster": {"workers": 2},
        "output": {"storage": str(storage)},
    }
    file = storage / "job.yaml"
    file.write_text(yaml.safe_dump(job), encoding="utf-8")
    return file


def measure(side: str, job: Path, options: argparse.Namespace, number: int) -> float:
    """Samples per second of one side in one round."""
    log = job.parent / f"{side}-{number}.log"
    if side == "ours":
        name = f"round-{number}"
        call([sys.executable, "-m", "launcher", "train", str(job), f"name={name}", *options.set], log)
        return speed_of(job.parent / name / "metrics.jsonl")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if side == "limit":
        command = [*torchrun, str(HERE / "limit.py"), str(job), str(WARM), *options.set]
    else:
        command = [
            *torchrun,
            str(HERE / "trainer.py"),
            f"--data={DATA}",
            f"--model={MODEL}",
            f"--steps={options.steps}",
        ]
        command += [f"--scratch={job.parent / 'scratch'}", f"--warm={WARM}"]
        command += ["--sampling=group_by_length"] if side == "trainer_grouped" else []
    return float(json.loads(call(command, log).strip().splitlines()[-1])["samples_per_s"])


def speed_of(metrics: Path) -> float:
    """From the look at the log after step 16 to the last one; their moments are `elapsed_s`."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    begun = next(line["elapsed_s"] for line in steps if line["step"] == WARM)
    return sum(line["samples"] for line in steps[WARM:]) / (steps[-1]["elapsed_s"] - begun)


def environment() -> dict[str, str]:
    """One thread per process, as torchrun and the launcher have it on two cores."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return env | {"TOKENIZERS_PARALLELISM": "false", "RAY_AUTH_MODE": "disabled"}


def call(command: list[str], log: Path) -> str:
    """Run one side."""
    with log.open("w", encoding="utf-8") as messages:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=messages, text=True, check=False
        )
        messages.write(done.stdout)
    if done.returncode != 0:
        sys.exit(f"{log.read_text(encoding='utf-8')[-3000:]}\nerror: exit code {done.returncode}, see {log}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
