"""What one train worker does from start to end: resume, train, export, score the test set. Train workers.

Every stage leaves a record in the run directory; a stage whose record is there is skipped, so a run that was stopped
anywhere goes on where it was. Read `train/loop.py` next.
"""

import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Thread

import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.data.ray_data import iter_shards
from launcher.data.stream import ShardStream
from launcher.data.windows import TRAIN
from launcher.errors import CorruptCheckpointError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ResultRecord, ScoresRecord, WorkerRecord
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.train.checkpoint import catalog, reader
from launcher.train.checkpoint.writer import CheckpointWriter
from launcher.train.engine import Engine
from launcher.train.export import export, write_card
from launcher.train.fault_injection import FaultInjector
from launcher.train.loggers.run_log import RunLog
from launcher.train.loop import INITIAL_STATE, TrainContext, run_to_completion, train
from launcher.train.peak_memory import PeakMemoryTracker, peak_resident_bytes
from launcher.train.preemption import StopSignal, is_node_draining
from launcher.train.validate import validate
from launcher.train.worker_config import WorkerConfig
from launcher.train.worker_heartbeat import WorkerHeartbeat


def run_worker(config: dict[str, object]) -> None:
    """The function Ray Train runs in every worker; `config["order"]` is a `WorkerConfig`."""
    order = config["order"]
    assert isinstance(order, WorkerConfig)
    prepare_process(order.job)
    task = build_task(order.job)
    result = order.run.find_record("result.json", ResultRecord)
    trained = order.evaluate_only or order.export_to or (result is not None and order.run.exists("model/README.md"))
    stream = None if trained else ShardStream(_ahead(_cells(order, TRAIN)))
    memory = PeakMemoryTracker()
    engine = Engine(order.job, task, order.plan.micro_batch)
    try:
        _carry_out(order, task, engine, memory, stream, result)
    finally:
        engine.remove_swap_dir()


def _carry_out(
    order: WorkerConfig,
    task: Task,
    engine: Engine,
    memory: PeakMemoryTracker,
    stream: ShardStream | None,
    result: ResultRecord | None,
) -> None:
    if order.export_to is not None:
        reader.load(order.run, engine, order.resume_step, weights_only=True)
        export(order.export_to, engine, task, order.job, order.plan)
        return
    if order.evaluate_only:
        step = result.best_step if result is not None else order.plan.total_steps
        scores = _score(order, task, engine, order.evaluate_only, step)
        if engine.rank == 0:
            order.run.write_record(f"scores-{order.evaluate_only}.json", scores)
        return
    if stream is not None:
        result = _train_and_export(order, task, engine, memory, stream)
        if result is None:
            return  # a checkpoint is all that was asked for
    else:
        assert result is not None
        reader.load(order.run, engine, result.best_step, weights_only=True)
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


def _cells(order: WorkerConfig, split: str) -> Iterator[pa.Buffer]:
    return iter_shards(split, order.splits, order.plan, order.job, order.resume_step)


def _ahead(cells: Iterator[pa.Buffer]) -> Iterator[pa.Buffer]:
    """The same cells; the first is fetched from now on: the stream's own processes start while the model is built."""
    first: Future[pa.Buffer | None] = Future()

    def fetch() -> None:
        try:
            first.set_result(next(cells, None))
        except BaseException as error:  # noqa: BLE001  # raised where the cell is waited for
            first.set_exception(error)

    Thread(target=fetch, name="first-window", daemon=True).start()

    def all_of_them() -> Iterator[pa.Buffer]:
        cell = first.result()
        if cell is not None:
            yield cell
            yield from cells

    return all_of_them()


def _train_and_export(
    order: WorkerConfig, task: Task, engine: Engine, memory: PeakMemoryTracker, stream: ShardStream
) -> ResultRecord | None:
    state = reader.load(order.run, engine, order.resume_step) if order.resume_step else INITIAL_STATE
    log = RunLog(order.run, order.job, order.on_metrics, state, order.lease)
    chaos = FaultInjector(order.run, order.faults, engine.rank)
    saver = CheckpointWriter(order.run, order.job, engine, order.lease, chaos)
    it = TrainContext(order.run, order.job, order.plan, task, engine, order.splits, saver, chaos)
    notices = StopSignal(order.control, is_node_draining)
    tell = None if order.control is None else order.control.send_heartbeat
    pulse = WorkerHeartbeat(order.run, engine.rank, lambda: (log.last_step, engine.num_forwards, log.timer.stage), tell)
    result = run_to_completion(train(it, stream, log, state, lambda: chaos.is_node_draining() or notices.should_stop()))
    pulse.close()
    predicted = order.plan.memory
    memory.write(order.run, engine.rank, None if predicted is None else predicted.needed)
    notices.close()
    log.close()
    if result is None:
        return None
    if result.best_step != result.steps:
        _load_best(order.run, engine, result.best_step)
    if engine.rank == 0 and order.lease is not None:
        order.lease.check()
    chaos.at("export")
    export(order.run, engine, task, order.job, order.plan)
    if engine.rank == 0:
        order.run.write_record("result.json", result, durable=True)
    dist.barrier()
    return result


def _load_best(run: RunDir, engine: Engine, step: int) -> None:
    """Read the best weights back (a collective).

    Raises:
        CorruptCheckpointError: they are not there; the training goes back to before they were made, and makes them
        again.
    """
    try:
        if not catalog.is_complete(run, step):
            raise CorruptCheckpointError(f"the best checkpoint, of step {step}, could not be saved and is made again")
        reader.load(run, engine, step, weights_only=True)
    except CorruptCheckpointError:
        dist.barrier()
        if engine.rank == 0:
            catalog.roll_back_to(run, step)
        raise


def _score(order: WorkerConfig, task: Task, engine: Engine, split: str, step: int) -> ScoresRecord:
    stream = ShardStream(_cells(order, split))
    scores = validate(engine, task, stream.evaluation(split, order.plan.total_steps), order.splits[split], step)
    if engine.rank == 0 and order.on_metrics is not None:
        order.on_metrics(scores.line(False))
    return scores.record(task)


def _write_worker(run: RunDir, engine: Engine) -> None:
    record = WorkerRecord(
        rank=engine.rank,
        host=socket.gethostname(),
        device=str(engine.device),
        peak_memory_bytes=peak_resident_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )
    run.write_record(f"workers/rank-{engine.rank}.json", record)
