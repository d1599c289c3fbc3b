"""What one train worker does from start to end: resume, train, export, score the test set. Train workers.

Every stage leaves a record in the run directory; a stage whose record is there is skipped, so a run that was stopped
anywhere goes on where it was. Read `train/loop.py` next.
"""

import os
import platform
import resource
import socket
import sys
from dataclasses import dataclass

import ray
import ray.train
import torch
import torch.distributed as dist

from launcher.data.sources import Split
from launcher.data.stream import ShareStream, share_cells
from launcher.data.windows import TRAIN
from launcher.export import export, write_card
from launcher.plan import Plan
from launcher.records import ResultRecord, ScoresRecord, WorkerRecord
from launcher.rundir import RunDir
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.train import checkpoint
from launcher.train.engine import Engine
from launcher.train.log import Listener, RunLog
from launcher.train.loop import FRESH, TrainRun, to_the_end, train
from launcher.train.notice import Caller, Notices, node_goes_away
from launcher.train.used import PeakMemory
from launcher.train.validate import validate


@dataclass(frozen=True)
class WorkOrder:
    """What a worker is told; pickled to it."""

    run: RunDir
    job: JobSpec
    plan: Plan
    splits: dict[str, Split]
    listener: Listener | None = None
    caller: Caller | None = None
    """Asked whether the training should stop."""
    evaluate_only: str | None = None
    """Score this split with the job's model and do nothing else."""


def work(config: dict[str, object]) -> None:
    """The function Ray Train runs in every worker; `config["order"]` is a `WorkOrder`."""
    order = config["order"]
    assert isinstance(order, WorkOrder)
    prepare_process(order.job)
    task = build_task(order.job)
    memory = PeakMemory()
    engine = Engine(order.job, task, order.plan.micro_batch)
    result = order.run.find_record("result.json", ResultRecord)
    if order.evaluate_only:
        step = result.best_step if result is not None else order.plan.total_steps
        scores = _score(order, task, engine, order.evaluate_only, step)
        if engine.rank == 0:
            order.run.write_record(f"scores-{order.evaluate_only}.json", scores)
        return
    if result is None or not order.run.exists("model/README.md"):
        result = _train_and_export(order, task, engine, memory)
        if result is None:
            return  # a checkpoint is all that was asked for
    else:
        checkpoint.load(order.run, engine, result.best_step, weights_only=True)
    if "test" in order.splits and not order.run.exists("scores-test.json"):
        scores = _score(order, task, engine, "test", result.best_step)
        if engine.rank == 0:
            order.run.write_record("scores-test.json", scores)
    if engine.rank == 0:
        write_card(order.run, order.job, order.plan, result)
    _write_worker(order.run, engine)


def prepare_process(job: JobSpec) -> None:
    """Threads and determinism of this process."""
    if not torch.cuda.is_available():
        # Ray sets OMP_NUM_THREADS to 1 for fractional CPUs; share the cores among the workers of this host instead.
        workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if job.parallel.offload_optimizer:
        # DeepSpeed compiles its CPU optimizer with the ninja that was installed beside this Python.
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    if job.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _train_and_export(order: WorkOrder, task: Task, engine: Engine, memory: PeakMemory) -> ResultRecord | None:
    start = checkpoint.latest_step(order.run)
    state = checkpoint.load(order.run, engine, start) if start else FRESH
    log = RunLog(order.run, order.job, order.listener, state.step, state.elapsed_s)
    stream = ShareStream(share_cells(ray.train.get_dataset_shard(TRAIN)))
    it = TrainRun(order.run, order.job, order.plan, task, engine, order.splits)
    notices = Notices(order.caller, node_goes_away)
    result = to_the_end(train(it, stream, log, state, notices.leave))
    predicted = order.plan.memory
    memory.write(order.run, engine.rank, None if predicted is None else predicted.peak)
    notices.close()
    log.close()
    if result is None:
        return None
    if result.best_step != result.steps:
        checkpoint.load(order.run, engine, result.best_step, weights_only=True)
    export(order.run, engine, task, order.job, order.plan)
    if engine.rank == 0:
        order.run.write_record("result.json", result)
    dist.barrier()
    return result


def _score(order: WorkOrder, task: Task, engine: Engine, split: str, step: int) -> ScoresRecord:
    stream = ShareStream(share_cells(ray.train.get_dataset_shard(split)))
    scores = validate(engine, task, stream.evaluation(split, order.plan.total_steps), order.splits[split], step)
    if engine.rank == 0 and order.listener is not None:
        order.listener(scores.line(False))
    return scores.record(task)


def _write_worker(run: RunDir, engine: Engine) -> None:
    kib = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB elsewhere
    record = WorkerRecord(
        rank=engine.rank,
        host=socket.gethostname(),
        device=str(engine.device),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib,
        peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )
    run.write_record(f"workers/rank-{engine.rank}.json", record)
