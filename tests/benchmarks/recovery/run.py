"""What the kill of a worker costs: seconds until training is where it was, and samples lost or repeated.

SST-2, MiniLM-L6, 2 workers, global batch 8, one epoch of 320 steps; in its step 150 the process of rank 1 gets SIGKILL.
Ours saves every 20 steps, as that costs it next to nothing. The peer (`vanilla.py`) saves every 50 steps, and in
another run every epoch. Lost time is from the kill to the end of the first step that had not been made before it.
Prints one JSON object on its last line. `make bench-recovery`; figures in ../README.md. Runs on the client.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.commands import MODEL, SST2, empty_folder, get_model  # noqa: E402
from tests.benchmarks.tree import kill_tree, tree  # noqa: E402

DATA = SST2 / "train.parquet"
BATCH, STEPS, KILL, OURS_EVERY, PEERS_EVERY = 8, 320, 150, 20, 50
LIMIT_S = 900


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "bench-recovery")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    get_model()
    storage = empty_folder(options.storage)
    results: dict[str, list[dict[str, float]]] = {"ours": [], "vanilla_50": [], "vanilla_epoch": []}
    for number in range(options.rounds):
        for side in results:
            folder = storage / f"{side}-{number}"
            folder.mkdir()
            facts = _ours(folder) if side == "ours" else _vanilla(folder, PEERS_EVERY if side == "vanilla_50" else 0)
            results[side].append(facts)
            print(f"round {number + 1}  {side:<14} " + "  ".join(f"{k} {v:.1f}" for k, v in facts.items()), flush=True)
    lost = {side: statistics.median(facts["lost_s"] for facts in rounds) for side, rounds in results.items()}
    worst = {key: max(facts[key] for facts in results["ours"]) for key in ("samples_lost", "samples_repeated")}
    print(
        json.dumps(
            {
                "over_vanilla": round(lost["ours"] / lost["vanilla_epoch"], 3),
                "over_vanilla_50": round(lost["ours"] / lost["vanilla_50"], 3),
                "seconds": round(lost["ours"], 1),
                **{key: int(value) for key, value in worst.items()},
            }
        )
    )
    return 0


def _ours(folder: Path) -> dict[str, float]:
    job = {
        "name": "ours",
        "task": {
            "type": "text-classification",
            "labels": ["negative", "positive"],
            "max_length": 128,
        },
        "model": {"name": str(MODEL)},
        "data": {"train": str(DATA), "window_steps": 16},
        "train": {"max_steps": STEPS, "batch_size": BATCH, "learning_rate": 5e-5, "log_every_steps": 1},
        "checkpoint": {"every_steps": OURS_EVERY},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "output": {"storage": str(folder)},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "launcher", "train", str(folder / "job.yaml")]
    log = folder / "ours" / "metrics.jsonl"

    def steps() -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [(line["step"], line["samples"]) for line in lines if line["kind"] == "step"]

    with (folder / "log.txt").open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        _until(process, lambda: max((step for step, _ in steps()), default=0) >= KILL)
        reached = max(step for step, _ in steps())
        began = _kill_a_worker(process)
        _until(process, lambda: max((step for step, _ in steps()), default=0) < reached)  # back to its checkpoint
        _until(process, lambda: max((step for step, _ in steps()), default=0) > reached)
        lost = time.monotonic() - began
        _until(process, lambda: process.poll() is not None)
    made = steps()
    assert process.returncode == 0, (folder / "log.txt").read_text()
    each = Counter(step for step, _ in made)
    return {
        "lost_s": lost,
        "samples_lost": BATCH * STEPS - sum(samples for _, samples in made),
        "samples_repeated": BATCH * sum(count - 1 for count in each.values()),
    }


def _vanilla(folder: Path, every: int) -> dict[str, float]:
    log = folder / "steps.jsonl"
    config = {
        "model": str(MODEL), "data": str(DATA), "rows": BATCH * STEPS, "batch": BATCH, "zero": 0, "epochs": 1,
        "every": every, "log": str(log), "storage": str(folder),
    }  # fmt: skip
    command = [sys.executable, str(HERE / "vanilla.py"), json.dumps(config)]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}

    def lines() -> list[dict]:
        return (
            [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if log.exists()
            else []
        )

    with (
        (folder / "log.txt").open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=env) as process,
    ):
        _until(process, lambda: max((line["step"] for line in lines()), default=0) >= KILL)
        before = lines()
        victim = next(line["pid"] for line in before if line["rank"] == 1)
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        dead = {line["pid"] for line in before}
        reached = max(line["step"] for line in before)
        _until(
            process, lambda: any(line["pid"] not in dead and line["step"] > reached for line in lines()[len(before) :])
        )
        lost = time.monotonic() - began
        _until(process, lambda: process.poll() is not None)
    assert process.returncode == 0, (folder / "log.txt").read_text()
    # What the model has seen twice: steps made after the checkpoint it went back to count in the weights once only, so
    # what is repeated is work, not samples; what is lost would be rows that no surviving step has seen.
    seen = {row for line in lines() for row in line["rows"]}
    made = Counter((line["rank"], line["step"]) for line in lines())
    return {
        "lost_s": lost,
        "samples_lost": float(BATCH * STEPS - len(seen)),
        "samples_repeated": 0.0,
        "steps_made_twice": float(sum(count - 1 for count in made.values()) / 2),
    }


def _kill_a_worker(process: "subprocess.Popen[bytes]") -> float:
    workers = [process for process in tree(process.pid) if _is_train_worker(process)]
    assert len(workers) == 2, [worker.cmdline() for worker in workers]
    began = time.monotonic()
    workers[1].kill()
    return began


def _is_train_worker(process: psutil.Process) -> bool:
    try:
        return any("RayTrainWorker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _until(process: "subprocess.Popen[bytes]", happened: object) -> None:
    until = time.monotonic() + LIMIT_S
    while not happened():  # type: ignore[operator]
        if time.monotonic() > until or (process.poll() not in (None, 0)):
            kill_tree(process)  # type: ignore[arg-type]
            raise SystemExit("it took too long, or failed; see log.txt beside its run")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
