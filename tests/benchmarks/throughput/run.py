"""Samples per second of `launcher train`, of transformers' Trainer, and of the same engine on batches ready in memory.

SST-2, MiniLM-L6, global batch 32 over 2 workers, the sides in turn, several rounds; every side is timed from the end of
its step 16 to the end of its last. Prints the medians as one JSON object on its last line. `make bench-throughput`;
figures in ../README.md. Runs on the client; needs no GPU.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from tests.benchmarks.commands import MODEL, ROOT, SST2, call, empty_folder, get_model, last_object, torchrun  # noqa: E402

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
    job = write_job(options.storage, options.steps)
    speeds: dict[str, list[float]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            speed = measure(side, job, options, number)
            speeds[side].append(speed)
            print(f"round {number + 1}  {side:<16} {speed:7.2f} samples/s", flush=True)
    median = {side: statistics.median(values) for side, values in speeds.items()}
    names = {"limit": "over_limit", "trainer": "over_trainer", "trainer_grouped": "over_trainer_grouped"}
    print(json.dumps({names[side]: round(median["ours"] / median[side], 3) for side in names if side in median}))
    return 0


def write_job(storage: Path, steps: int) -> Path:
    """Write our job file into an empty storage: the defaults, and the numbers that both sides share."""
    get_model()
    storage = empty_folder(storage)
    job = {
        "name": "throughput",
        "task": {"type": "text-classification", "labels": ["negative", "positive"], "max_length": 128},
        "model": {"name": str(MODEL)},
        "data": {"train": str(SST2 / "train.parquet")},
        "train": {"max_steps": steps, "batch_size": 32, "learning_rate": 5e-5, "log_every_steps": WARM},
        "cluster": {"workers": 2},
        "output": {"storage": str(storage)},
    }
    file = storage / "job.yaml"
    file.write_text(yaml.safe_dump(job), encoding="utf-8")
    return file


def measure(side: str, job: Path, options: argparse.Namespace, number: int) -> float:
    """Return samples per second of one side in one round."""
    log = job.parent / f"{side}-{number}.log"
    if side == "ours":
        name = f"round-{number}"
        call([sys.executable, "-m", "launcher", "train", str(job), f"name={name}", *options.set], log)
        return speed_of(job.parent / name / "metrics.jsonl")
    if side == "limit":
        command = torchrun(2, HERE / "limit.py", job, WARM, *options.set)
    else:
        command = trainer_command(job.parent / "scratch", options.steps, WARM)
        command += ["--sampling=group_by_length"] if side == "trainer_grouped" else []
    return float(last_object(call(command, log))["samples_per_s"])


def trainer_command(scratch: Path, steps: int, warm: int) -> list[str]:
    """Return the command of the peer, which starts its clock behind step `warm`."""
    numbers = (f"--data={SST2 / 'train.parquet'}", f"--model={MODEL}", f"--steps={steps}", f"--warm={warm}")
    return torchrun(2, HERE / "trainer.py", *numbers, f"--scratch={scratch}")


def speed_of(metrics: Path) -> float:
    """Return samples per second from the record of step 16 to the last one; their moments are `elapsed_s`."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    begun = next(line["elapsed_s"] for line in steps if line["step"] == WARM)
    return sum(line["samples"] for line in steps[WARM:]) / (steps[-1]["elapsed_s"] - begun)


if __name__ == "__main__":
    sys.exit(main())
