"""What a train worker does from start to end: train and export, or only score, or only export. Read `loop.py` next.

Every stage writes a record to the run directory and is skipped if its record exists, so a run that was stopped anywhere
continues there. Runs in train workers.
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
from launcher.rundir.records import ResultRecord, WorkerRecord
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.train.checkpoint import catalog, reader
from launcher.train.checkpoint.writer import CheckpointWriter
from launcher.train.engine import Engine
from launcher.train.export import export_model, write_model_card
from launcher.train.fault_injection import FaultInjector
from launcher.train.hardware import describe_hardware
from launcher.train.loggers.run_log import RunLog
from launcher.train.loop import INITIAL_STATE, TrainContext, run_to_completion, train
from launcher.train.peak_memory import PeakMemoryTracker, peak_resident_bytes
from launcher.train.preemption import StopSignal, is_node_draining
from launcher.train.validate import validate
from launcher.train.worker_config import WorkerConfig
from launcher.train.worker_heartbeat import WorkerHeartbeat


def train_worker(config: WorkerConfig) -> None:
    """Train, export the best checkpoint, and score the test split, as far as earlier attempts have not done it.

    Returns early, with a checkpoint saved, if the workers are asked to stop.
    """
    prepare_process(config.job)
    task, run, plan = build_task(config.job), config.run, config.plan
    result = run.find_record("result.json", ResultRecord)
    if result is not None and not run.exists("model/README.md"):
        result = None  # stopped between the end of training and the end of the export
    # Trap: its modules are loaded on first use. A thread that begins to import them while this one does may see half of
    # them (`ImportError: cannot import name 'AutoTokenizer'`), so they are imported before there is a second thread.
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    # Before the engine is built: the first window is encoded meanwhile.
    stream = ShardStream(_prefetch_first(_shards(config, TRAIN))) if result is None else None
    # After the imports and before the engine: the plan's estimate covers the model, its states and a step.
    memory = PeakMemoryTracker()
    engine = Engine(config.job, task, plan.micro_batch)
    try:
        if stream is not None:
            state = reader.load(run, engine, config.resume_step) if config.resume_step else INITIAL_STATE
            log = RunLog(run, config.job, config.on_metrics, state, config.lease)
            faults = FaultInjector(run, config.faults, engine.rank)
            writer = CheckpointWriter(run, config.job, engine, config.lease, faults)
            ctx = TrainContext(run, config.job, plan, task, engine, config.splits, writer, faults)
            signal = StopSignal(config.control, is_node_draining)
            heartbeat = _start_heartbeat(config, engine, log)
            result = run_to_completion(
                # `should_stop` is collective, and `or` may skip it. An injected drain is the same on all ranks after
                # the same step, so all of them skip it or none.
                train(ctx, stream, log, state, lambda: faults.is_node_draining() or signal.should_stop())
            )
            heartbeat.close()
            memory.write(run, engine.rank, None if plan.memory is None else plan.memory.needed)
            # Collective. It tells the driver that no step will handle a stop request by saving a checkpoint.
            signal.close()
            log.close()
            if result is None:
                return
            _export_best(config, ctx, result)
        else:
            assert result is not None
            # An earlier attempt has trained and exported; only scores or the model card are missing. Collective.
            reader.load(run, engine, result.best_step, weights_only=True)
        # Each rank looks for itself and all find the same: rank 0 writes the record only after the collectives of the
        # evaluation, which every rank enters after this line.
        if "test" in config.splits and not run.exists("scores-test.json"):
            _write_scores(config, task, engine, "test", result.best_step)
        if engine.rank == 0:
            write_model_card(run, config.job, plan, result)
        _write_worker_record(run, engine)
    finally:
        engine.remove_swap_dir()


def evaluate_worker(config: WorkerConfig, split: str) -> None:
    """Score a split with the job's model, and write the scores to the run directory."""
    prepare_process(config.job)
    task = build_task(config.job)
    result = config.run.find_record("result.json", ResultRecord)
    engine = Engine(config.job, task, config.plan.micro_batch)
    try:
        _write_scores(config, task, engine, split, result.best_step if result is not None else config.plan.total_steps)
    finally:
        engine.remove_swap_dir()


def export_worker(config: WorkerConfig, destination: RunDir) -> None:
    """Export the weights of checkpoint `resume_step` to another run directory."""
    prepare_process(config.job)
    task = build_task(config.job)
    engine = Engine(config.job, task, config.plan.micro_batch)
    try:
        reader.load(config.run, engine, config.resume_step, weights_only=True)
        export_model(destination, engine, task, config.job, config.plan)
    finally:
        engine.remove_swap_dir()


def prepare_process(job: JobSpec) -> None:
    """Set the threads of this process, and deterministic kernels where the job asks for them."""
    if not torch.cuda.is_available():
        # Whatever OMP_NUM_THREADS says, or the number of cores: it changes the last bits of sums.
        torch.set_num_threads(job.train.threads)
    if job.parallel.offload_optimizer:
        # DeepSpeed compiles its CPU optimizer, with the ninja that is installed beside this Python.
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    if job.train.deterministic:
        # cuBLAS reads this when it creates a handle, so it must be set before the first kernel. Without it torch raises
        # in deterministic mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _shards(config: WorkerConfig, split: str) -> Iterator[pa.Buffer]:
    return iter_shards(split, config.splits, config.plan, config.job, config.resume_step)


def _prefetch_first(shards: Iterator[pa.Buffer]) -> Iterator[pa.Buffer]:
    """Return the same shards; a thread fetches the first one from now on, which starts the stream's processes."""
    first: Future[pa.Buffer | None] = Future()

    def fetch() -> None:
        try:
            first.set_result(next(shards, None))
        except BaseException as error:  # noqa: BLE001  # raised where the shard is used
            first.set_exception(error)

    Thread(target=fetch, name="first-window", daemon=True).start()

    # A generator must not run in two threads at once: this one waits for the thread before it continues `shards`.
    def iterate() -> Iterator[pa.Buffer]:
        shard = first.result()
        if shard is not None:
            yield shard
            yield from shards

    return iterate()


def _start_heartbeat(config: WorkerConfig, engine: Engine, log: RunLog) -> WorkerHeartbeat:
    send = None if config.control is None else config.control.send_heartbeat
    return WorkerHeartbeat(config.run, engine.rank, lambda: (log.last_step, engine.num_forwards, log.timer.stage), send)


def _export_best(config: WorkerConfig, ctx: TrainContext, result: ResultRecord) -> None:
    """Export the weights of the best step, then record that the training is complete. Collective."""
    engine = ctx.engine
    # Otherwise the best weights are those of the last step, which the engine still holds.
    if result.best_step != result.steps:
        _load_best(config.run, engine, result.best_step)
    if engine.rank == 0 and config.lease is not None:
        # The model is replaced, not versioned: a stale attempt must not overwrite a newer one's.
        config.lease.check()
    ctx.faults.inject_at_place("export")
    export_model(config.run, engine, ctx.task, config.job, config.plan)
    # After the export: an attempt that finds this record does not train again.
    if engine.rank == 0:
        config.run.write_record("result.json", result, durable=True)
    # No rank goes on, and may fail, before the record exists: the next attempt would export once more.
    dist.barrier()


def _load_best(run: RunDir, engine: Engine, step: int) -> None:
    """Load the weights of the best checkpoint. Collective.

    Raises:
        CorruptCheckpointError: It is missing or corrupt; the training resumes from before it and makes it again.
    """
    try:
        if not catalog.is_complete(run, step):
            raise CorruptCheckpointError(f"the best checkpoint, of step {step}, could not be saved and is made again")
        reader.load(run, engine, step, weights_only=True)
    except CorruptCheckpointError:
        # All ranks have read what they need before rank 0 removes checkpoints.
        dist.barrier()
        if engine.rank == 0:
            catalog.roll_back_to(run, step)
        raise


def _write_scores(config: WorkerConfig, task: Task, engine: Engine, split: str, step: int) -> None:
    """Score a split and write its record on rank 0. Collective."""
    stream = ShardStream(_shards(config, split))
    # A stream of one evaluation is labelled with the last step, whichever weights are scored (data/windows.py).
    batches = stream.evaluation(split, config.plan.total_steps)
    scores = validate(engine, task, batches, config.splits[split], step)
    if engine.rank == 0 and config.on_metrics is not None:
        config.on_metrics(scores.line(False))
    record = scores.record(task)
    if engine.rank == 0:
        config.run.write_record(f"scores-{split}.json", record)


def _write_worker_record(run: RunDir, engine: Engine) -> None:
    record = WorkerRecord(
        rank=engine.rank,
        host=socket.gethostname(),
        device=str(engine.device),
        peak_memory_bytes=peak_resident_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        hardware=describe_hardware(engine.device),
    )
    run.write_record(f"workers/rank-{engine.rank}.json", record)
