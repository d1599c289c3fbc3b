"""How long training stands still per checkpoint, beside DeepSpeed's own blocking save to the same disk.

Two workers of a plain gloo group train MiniLM-sized BERTs on the launcher's loop; each round saves in turn by
`CheckpointWriter` in the background, by `CheckpointWriter` in the foreground, and by `engine.save_checkpoint`. Also
measured: how much slower the steps are that a background save runs beside. Prints the medians as one JSON object on its
last line. `make bench-checkpoint-stall`; figures in ../README.md. Runs on the client; needs no GPU.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT)]

STEPS_BETWEEN = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 2, 3])
    options = parser.parse_args()
    from tests.support.jobs import write_splits
    from tests.support.worker_group import run_group

    with tempfile.TemporaryDirectory(dir=ROOT / "runs" if (ROOT / "runs").is_dir() else ROOT) as folder:
        data = write_splits(Path(folder) / "data", train=4000)
        worst = 0.0
        for zero in options.zero:
            seconds = run_group(
                2, _measure, str(ROOT / "data/quickstart/model"), data, f"{folder}/zero-{zero}", (zero, options.rounds)
            )
            print(f"ZeRO-{zero}: " + "  ".join(f"{name} {value:.3f}" for name, value in seconds.items()), flush=True)
            worst = max(worst, seconds["background_s"] / seconds["deepspeed_s"])
    print(json.dumps({"over_blocking": round(worst, 4)}))
    return 0


def _measure(model: str, data: dict[str, str], storage: str, options: tuple[int, int]) -> dict[str, float]:
    import torch.distributed as dist

    from launcher.data.stream import ShardStream
    from launcher.rundir.lease import Lease
    from launcher.tasks import build_task
    from launcher.train.checkpoint.writer import CheckpointWriter
    from launcher.train.engine import Engine
    from launcher.train.loop import INITIAL_STATE, forward_backward
    from tests.support.jobs import prepared_job
    from tests.support.worker_group import share_cells

    zero, rounds = options
    prepared = prepared_job(
        Path(model), data, Path(storage), train={"epochs": 1, "batch_size": 8}, parallel={"zero": zero},
        checkpoint={"keep_last": 1},
    )  # fmt: skip
    run, job, task = prepared.run, prepared.job, build_task(prepared.job)
    engine = Engine(job, task, prepared.plan.micro_batch)
    steps = ShardStream(share_cells(prepared, dist.get_world_size(), dist.get_rank(), 0)).steps()
    lease = Lease(run, 1)
    foreground = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"background": False})})
    savers = {
        "background_s": CheckpointWriter(run, job, engine, lease),
        "foreground_s": CheckpointWriter(run, foreground, engine, lease),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*savers, "deepspeed_s", "step_s", "step_beside_s")}
    count = 0

    def some_steps() -> list[float]:
        nonlocal count
        spent = []
        for _ in range(STEPS_BETWEEN):
            step, _, share = next(steps)
            start = time.monotonic()
            forward_backward(engine, task, share.parts, share.global_batch, step)
            engine.step(1e-5, step)
            dist.barrier()
            spent.append(time.monotonic() - start)
            count += 1
        return spent

    some_steps()
    for number in range(rounds + 1):
        for name, saver in savers.items():
            seconds["step_s"] += some_steps()
            dist.barrier()
            start = time.monotonic()
            saver.save(INITIAL_STATE.model_copy(update={"step": count}))
            dist.barrier()
            stall = time.monotonic() - start
            if name == "background_s":
                wait, waited = engine.before_step, [0.0]

                def timed(wait: object = wait, waited: list[float] = waited) -> None:
                    began = time.monotonic()
                    wait()  # type: ignore[operator]
                    waited[0] += time.monotonic() - began

                engine.before_step = timed
                seconds["step_beside_s"] += some_steps()
                stall += waited[0]
            seconds[name].append(stall)
            start = time.monotonic()
            saver.join()
        some_steps()
        dist.barrier()
        start = time.monotonic()
        engine._engine.save_checkpoint(f"{storage}/deepspeed-{number}", tag="state", save_latest=False)
        dist.barrier()
        seconds["deepspeed_s"].append(time.monotonic() - start)
        if dist.get_rank() == 0:
            shutil.rmtree(f"{storage}/deepspeed-{number}")
        if number == 0:  # the first copies into new pages
            seconds = {name: [] for name in seconds}
    engine.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
