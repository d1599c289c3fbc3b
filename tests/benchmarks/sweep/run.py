"""How much faster is a sweep on warm workers than Ray's own recipe? Runs on the client; needs no GPU.

The same trials, from the same list of values, by `launcher tune` and by vanilla Ray Tune with a `TorchTrainer` per
trial, in turn: single-worker trials two at a time, then two-worker trials one at a time. The last line of the output is
one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.commands import MODEL, SST2, call, empty_folder, get_model, last_object  # noqa: E402

STEPS = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "bench-sweep")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--trials-of-two", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    get_model()
    storage = empty_folder(options.storage)
    pq.write_table(pq.read_table(SST2 / "validation.parquet").slice(0, 128), storage / "validation.parquet")
    build_kernels()
    report: dict[str, float] = {}
    for name, workers, concurrent, trials in (("", 1, 2, options.trials), ("_of_two", 2, 1, options.trials_of_two)):
        pairs = [compare(storage, i, workers, concurrent, trials) for i in range(options.rounds)]
        report[f"over_vanilla{name}"] = statistics.median(ours["seconds"] / peer["seconds"] for ours, peer in pairs)
        report[f"overhead_s{name}"] = statistics.median(ours["overhead"] for ours, _ in pairs)
    print(json.dumps({key: round(value, 3) for key, value in report.items()}))
    return 0


def compare(storage: Path, number: int, workers: int, concurrent: int, trials: int) -> tuple[dict, dict]:
    """Run one round: ours, then the peer on the same list of trials."""
    name = f"sweep-{workers}-{number}"
    job = {
        "name": name,
        "task": {"type": "text-classification", "labels": ["negative", "positive"], "max_length": 64},
        "model": {"name": str(MODEL)},
        "data": {"train": str(SST2 / "train.parquet"), "validation": str(storage / "validation.parquet")},
        "train": {"max_steps": STEPS, "learning_rate": 5e-5},
        "cluster": {"workers": workers},
        "output": {"storage": str(storage)},
        "tune": {
            "space": {
                "train.learning_rate": {"loguniform": [1e-5, 1e-3]},
                "train.batch_size": {"choice": [8, 16, 32]},
            },
            "trials": trials, "max_concurrent": concurrent, "scheduler": "none",
        },
    }  # fmt: skip
    file = storage / f"{name}.yaml"
    file.write_text(yaml.safe_dump(job), encoding="utf-8")
    ours = run_side("ours.py", file, storage / f"{name}-ours.log")
    records = [
        json.loads((storage / name / "sweep" / "trials" / f"trial-{i:04d}" / "trial.json").read_text())
        for i in range(trials)
    ]
    values = [{key.removeprefix("train."): v for key, v in record["params"].items()} for record in records]
    settings = {
        "model": str(MODEL), "train": job["data"]["train"], "validation": job["data"]["validation"], "steps": STEPS,
        "workers": workers, "concurrent": concurrent, "storage": str(storage / f"{name}-vanilla"), "trials": values,
    }  # fmt: skip
    file = storage / f"{name}.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    peer = run_side("vanilla.py", file, storage / f"{name}-vanilla.log")
    print(f"{trials} trials of {workers}: ours {ours}, vanilla {peer}", flush=True)
    return ours, peer


def build_kernels() -> None:
    """Compile DeepSpeed's kernel for shared memory, which takes half a minute once per machine: no part of a sweep."""
    build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", build], env=env, stdout=sys.stderr, check=True)


def run_side(script: str, settings: Path, log: Path) -> dict:
    """Run one side; its last line is its result."""
    env = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    return last_object(call([sys.executable, str(HERE / script), str(settings)], log, env))


if __name__ == "__main__":
    sys.exit(main())
