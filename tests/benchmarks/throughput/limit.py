"""The limit: the same engine on the same batches, collated in memory before the clock starts; no stream and no Ray.

Runs in every process of `torchrun --nproc_per_node 2`; `run.py` starts it with the job file that `launcher train` gets.
The last line of its output is one JSON object with samples per second behind the first steps.
"""

import json
import sys
import time
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launcher.data.rank_batches import collate, deserialize_shard
from launcher.data.stream import StreamSource
from launcher.data.windows import train_windows
from launcher.driver.prepare import prepare
from launcher.spec.loader import load_job
from launcher.tasks import build_task
from launcher.train.engine import Engine
from launcher.train.schedule import learning_rate


def main() -> None:
    file, warm = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    prepared = prepare(load_job(file, sys.argv[3:]))
    job, task, plan = prepared.job, build_task(prepared.job), prepared.plan
    engine = Engine(job, task, plan.micro_batch)
    source = StreamSource(job, prepared.splits, dist.get_world_size())
    steps = []
    for window in train_windows(plan, job, 0):
        (share,) = source.shards(window, [dist.get_rank()])
        for step in deserialize_shard(pa.py_buffer(share))[1]:
            passes = [
                (part.index, number, collate(task, samples, step.global_batch).to(engine.device))
                for part in step.parts
                for number, samples in enumerate(part.micro_batches, 1)
            ]
            steps.append((step.global_batch, passes))
    engine.train_mode()
    samples, begun = 0, 0.0
    dist.barrier()
    for number, (header, passes) in enumerate(steps):
        if number == warm:
            samples, begun = 0, time.perf_counter()
        for part, micro_batch, batch in passes:
            engine.seed(number, part, micro_batch)
            losses_B = task.sample_losses(engine.forward(task, batch, part), batch)
            engine.backward((losses_B * batch.mask).sum(), header.weight, micro_batch == header.micro_batches)
        engine.step(learning_rate(job.train, number, plan.total_steps), number)
        samples += header.samples
    if dist.get_rank() == 0:
        print(json.dumps({"samples_per_s": samples / (time.perf_counter() - begun)}), flush=True)


if __name__ == "__main__":
    main()
