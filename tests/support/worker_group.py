"""Runs the real loop in plain torch.distributed processes: the equivalences, without the price of a Ray cluster."""

import json
import multiprocessing as mp
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
import torch.distributed as dist

from launcher.data.stream import ShardStream, StreamSource
from launcher.data.windows import train_windows
from launcher.driver.prepare import PreparedJob
from launcher.errors import LauncherError


def run_group(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in `world_size` processes that form a gloo group; rank 0's answer comes back.

    The processes stay for the next call: torch, deepspeed and transformers take seconds to import.
    """
    group = _GROUPS.get(world_size) or _Group(world_size)
    _GROUPS[world_size] = group
    try:
        return group.call(function, args)
    except BaseException:
        _GROUPS.pop(world_size).kill()  # its processes may be anywhere
        raise


_SHARED = [
    "torch.distributed", "deepspeed", "deepspeed.ops.adam", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer", "peft", "torchmetrics",
    "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit", "transformers.models.resnet.modeling_resnet",
    "launcher.train.loop", "launcher.train.checkpoint.reader", "launcher.driver.prepare",
    "tests.support.frozen_imports",
]  # fmt: skip


class _Group:
    """Processes that wait for functions to call together."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context(
            "forkserver"
        )  # one process imports what all groups need, and is forked for each of them
        context.set_forkserver_preload(_SHARED)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            pipe, remote_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self._folder.name, remote_end), daemon=True
            )
            process.start()
            self._pipes.append(pipe)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [self._receive(pipe) for pipe in self._pipes]
        return json.loads(answers[0])

    def _receive(self, pipe: Connection) -> str:
        while not pipe.poll(0.2):
            for other, process in zip(self._pipes, self._processes, strict=True):
                if other is not pipe and other.poll() and not process.is_alive():
                    self._receive(other)  # the others may wait for the one that failed
        answer, trouble = pipe.recv()
        if trouble is not None:
            raise RuntimeError(trouble)
        return answer

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


_GROUPS: dict[int, _Group] = {}


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    while True:
        function, args = pipe.recv()
        torch.use_deterministic_algorithms(False)  # as a fresh process has it
        try:
            answer = json.dumps(function(*args)) if rank == 0 else str(function(*args) and "")
        except BaseException:  # noqa: BLE001  # process border: the test is told
            pipe.send(("", traceback.format_exc()))
            return
        pipe.send((answer, None))


def train_here(
    prepared: PreparedJob,
    stop_after: int | None = None,
    on_engine: Callable[..., None] | None = None,
    leave: Callable[[], bool] | None = None,
    lease: Any = None,
    faults: Any = (),
) -> Any:
    """Train in this process's group from the last checkpoint on; return (step, loss) of each step, and the result."""
    from launcher.tasks import build_task
    from launcher.train.checkpoint import catalog, reader
    from launcher.train.checkpoint.writer import CheckpointWriter
    from launcher.train.engine import Engine
    from launcher.train.fault_injection import FaultInjector
    from launcher.train.loggers.run_log import RunLog
    from launcher.train.loop import INITIAL_STATE, TrainContext, run_to_completion, train
    from launcher.train.preemption import never_stop

    run, plan, task = prepared.run, prepared.plan, build_task(prepared.job)
    engine = Engine(prepared.job, task, plan.micro_batch)
    start = catalog.latest_step(run)
    state = reader.load(run, engine, start) if start else INITIAL_STATE
    lines: list[tuple[int, float]] = []
    log = RunLog(
        run,
        prepared.job,
        lambda line: lines.append((line.step, line.loss)) if line.kind == "step" else None,
        state,
        lease,
    )
    cells = share_cells(prepared, dist.get_world_size(), dist.get_rank(), start)
    if stop_after is not None:  # the stream and the schedule stay those of the whole run; the process just ends
        cells = _until(cells, stop_after)
    if on_engine is not None:
        on_engine(engine)
    chaos = FaultInjector(run, faults, engine.rank)
    saver = CheckpointWriter(run, prepared.job, engine, lease, chaos)
    ctx = TrainContext(run, prepared.job, plan, task, engine, prepared.splits, saver, chaos)
    result = run_to_completion(train(ctx, ShardStream(cells), log, state, leave or never_stop))
    log.close()
    engine.close()
    return {"lines": lines, "result": None if result is None else result.model_dump()}


def weights_at(prepared: PreparedJob, step: int, after: int | None = None) -> Any:
    """Return the weights that would be exported of a checkpoint, on rank 0 by name; None elsewhere.

    Args:
        prepared: Job of the run.
        step: Step of the checkpoint.
        after: Step of a later checkpoint that the engine has read before, whole; None reads none.
    """
    from launcher.tasks import build_task
    from launcher.train.checkpoint import reader
    from launcher.train.engine import Engine

    engine = Engine(prepared.job, build_task(prepared.job), prepared.plan.micro_batch)
    if after is not None:
        reader.load(prepared.run, engine, after)
    reader.load(prepared.run, engine, step, weights_only=True)
    state = engine.full_state_dict()
    engine.close()
    return state


def share_cells(prepared: PreparedJob, world_size: int, rank: int, start: int) -> Iterator[pa.Buffer]:
    """Yield what Ray Data would hand to this rank, without Ray."""
    source = StreamSource(prepared.job, prepared.splits, world_size)
    for window in train_windows(prepared.plan, prepared.job, start):
        yield pa.py_buffer(list(source.read(window))[rank])


def _until(cells: Iterator[pa.Buffer], step: int) -> Iterator[pa.Buffer]:
    from launcher.data.rank_batches import deserialize_shard

    for cell in cells:
        header, _ = deserialize_shard(cell)
        if header.first_step >= step:
            return
        yield cell


def with_job(prepared: PreparedJob, **sections: Any) -> PreparedJob:
    """Return the same job under other memory and cluster settings, replanned."""
    from launcher.driver.prepare import prepare
    from launcher.spec.job import JobSpec

    raw = prepared.job.model_dump()
    for name, values in sections.items():
        raw[name] = {**raw[name], **values} if isinstance(values, dict) else values
    return replace(prepare(JobSpec.model_validate(raw)))


def train_losses(prepared: PreparedJob, stop_after: int | None = None) -> list[tuple[int, float]]:
    """Train as `train_here` does and return (step, loss) of each step of this attempt."""
    lines: list[tuple[int, float]] = train_here(prepared, stop_after)["lines"]
    return lines


def train_curve(prepared: PreparedJob) -> list[float]:
    """Train as `train_here` does and return the loss of each step."""
    return [loss for _, loss in train_losses(prepared)]


def error_of(function: Callable[..., Any], *args: Any) -> str:
    """Return the LauncherError that `function(*args)` raises as `Type: message`; "" if it raises none."""
    try:
        function(*args)
    except LauncherError as error:
        return f"{type(error).__name__}: {error.message}"
    return ""
