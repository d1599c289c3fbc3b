"""What the same bits cost: a step with eight parts beside one with a part per worker, and the bytes that it sends.

`over_plain` compares with a part per worker in one forward pass, `over_micro` with one in the same passes.

SST-2, MiniLM-L6, global batch 32 over two workers without ZeRO: the engine on batches ready in memory, the sides in
turn, several rounds. Prints the medians as one JSON object on its last line. `make bench-bits`; figures: ../README.md.
Runs on the client; needs no GPU.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.commands import call, last_object, torchrun  # noqa: E402
from tests.benchmarks.throughput.run import WARM, write_job  # noqa: E402

SIDES = {
    "bits": ["train.virtual_ranks=8"],
    # The same forward passes, added by autograd as they come.
    "micro": ["train.virtual_ranks=2", "parallel.micro_batch=4"],
    "plain": ["train.virtual_ranks=2"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "bench-bits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the job file")
    options = parser.parse_args()
    if options.steps <= WARM:
        parser.error(f"--steps: the first {WARM} are not measured; give more")
    job = write_job(options.storage, options.steps)
    storage = job.parent
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side, own in SIDES.items():
            script = HERE.parent / "throughput" / "limit.py"
            command = torchrun(2, script, job, WARM, "parallel.zero=0", *own, *options.set)
            speed = float(last_object(call(command, storage / f"{side}-{number}.log"))["samples_per_s"])
            speeds[side].append(speed)
            print(f"round {number + 1}  {side:<6} {speed:7.2f} samples/s", flush=True)
    median = {side: statistics.median(values) for side, values in speeds.items()}
    report = {f"over_{side}": round(median[side] / median["bits"], 3) for side in ("plain", "micro")}
    for workers in (2, 4):
        traffic = last_object(call(torchrun(workers, HERE / "traffic.py"), storage / f"traffic-{workers}.log"))
        report[f"bytes_over_all_reduce_{workers}"] = round(float(traffic["over_all_reduce"]), 3)
        report[f"bytes_over_least_{workers}"] = round(float(traffic["over_least"]), 3)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
