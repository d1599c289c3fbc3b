"""Whether a run fits into its workers: decides `parallel.zero` and `parallel.micro_batch` where they are auto.

Runs on the client and the head; the formulas are in `driver/memory/estimate.py`, the measuring in
`driver/memory/activations.py`.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from launcher.data.rank_batches import repeated
from launcher.data.splits import Split
from launcher.driver.memory import estimate as formulas
from launcher.driver.memory.estimate import Activations, MemoryConfig, ParameterCounts
from launcher.errors import LauncherError
from launcher.formatting import format_bytes
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan, WorkerMemory
from launcher.rundir.recovery import effective_micro_batch
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Batch, Task

# Rows looked at for the longest: a few hundred milliseconds, of pictures as well, which are all of one size.
_LOOK_ROWS, _LOOK_PICTURES, _ENCODED = 4096, 8, 64
# Libraries, the CUDA context, the object store and fragmentation want their part.
_USABLE = 0.8
# What the sizes depend on; the trials of a sweep differ in other things, and are measured once.
_MATTERS: Mapping[str, bool | set[str]] = {
    "task": True,
    "model": True,
    "data": {"train"},
    "train": {"precision"},
    "parallel": {"activation_checkpointing"},
    "evaluation": {"batch_size"},
    "cluster": {"workers"},
}
# What a model's own code may say where it looks at values, which tensors without content do not have.
_NO_VALUES = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError)


@dataclass(frozen=True)
class MemoryPlan:
    """What a worker has and needs.

    Args:
        job: with `zero` and `micro_batch` as numbers.
        memory: predicted; None where it was not measured.
        limit: bytes a worker may use; None is unknown.
        notes: what was decided and why.
    """

    job: JobSpec
    memory: WorkerMemory | None
    limit: int | None
    notes: tuple[str, ...]


def resolve_auto_parallel(job: JobSpec, run: RunDir, train: Split, measure: bool) -> MemoryPlan:
    """Decide what is auto, and predict.

    Args:
        job: resolved but for these.
        run: whose checkpoints bound the stages, and which may know that a micro-batch does not fit.
        train: whose longest rows make the largest batch.
        measure: whether to predict even where nothing is to be decided.
    """
    share, stages = largest_local_batch(job, train), _stages(run)
    job = _with_oom_cap(job, run, share)
    parallel = job.parallel
    if not (measure or parallel.zero == "auto" or parallel.micro_batch == "auto"):
        return MemoryPlan(job, None, None, ())
    limit = worker_memory_limit(job)
    try:
        return _decide(job, _needs(job, train, share), share, (limit, stages))
    except LauncherError:
        raise
    except _NO_VALUES as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        zero = 3 if stages[0] == 3 and parallel.zero == "auto" else job.zero_stage
        settled = _settled(job, zero, None if parallel.micro_batch == "auto" else parallel.micro_batch)
        return MemoryPlan(settled, None, limit, (f"the memory of activations is not known beforehand ({reason})",))


def largest_local_batch(job: JobSpec, train: Split) -> int:
    """Samples of the largest share of a global batch."""
    return -(-min(job.train.batch_size, train.rows) // job.cluster.workers)


def _stages(run: RunDir) -> tuple[int, ...]:
    """ZeRO stages that `auto` may take: a checkpoint of stage 3 is read by stage 3 alone, the others by each other."""
    old = run.find_record("plan.json", Plan)
    if old is None:
        return (0, 1, 2, 3)
    return (3,) if old.zero == 3 else (0, 1, 2)


def _with_oom_cap(job: JobSpec, run: RunDir, share: int) -> JobSpec:
    """With the smaller micro-batch that the run found when memory ran out."""
    given = job.parallel.micro_batch
    size = given if isinstance(given, int) else share
    known = effective_micro_batch(run, size)
    if known == size:
        return job
    return job.model_copy(update={"parallel": job.parallel.model_copy(update={"micro_batch": known})})


def _decide(
    job: JobSpec, needs: Callable[[int, int], WorkerMemory], share: int, has: tuple[int | None, Sequence[int]]
) -> MemoryPlan:
    (limit, stages), parallel = has, job.parallel
    notes = []
    micro = parallel.micro_batch
    size = share if not isinstance(micro, int) else min(micro, share)
    zero = job.zero_stage
    if parallel.zero == "auto":
        smallest = 1 if micro == "auto" else size
        zero, why = _stage(job, lambda stage: needs(stage, smallest).needed, limit, stages)
        notes.append(f"parallel.zero: auto takes {zero}: {why}")
    if micro == "auto":
        size, why = _size(job, share, lambda count: needs(zero, count).needed, limit)
        notes.append(f"parallel.micro_batch: auto takes {size}: {why}")
    memory = needs(zero, size)
    if limit is not None and memory.needed > limit:
        notes.append(
            f"a worker needs about {format_bytes(memory.needed)} of memory and has {format_bytes(limit)}: lower "
            "parallel.micro_batch or task.max_length, raise parallel.zero, or set parallel.activation_checkpointing: "
            "true"
        )
    notes += _disk(job, memory)
    return MemoryPlan(_settled(job, zero, size if micro == "auto" else micro), memory, limit, tuple(notes))


def _disk(job: JobSpec, memory: WorkerMemory) -> list[str]:
    """Whether a local storage has room for the checkpoints: the last ones, the best, and the one being written."""
    folder = RunDir(job.output.storage).local
    if folder is None:
        return []
    while not folder.exists():
        folder = folder.parent
    wanted, free = memory.checkpoint * (job.checkpoint.keep_last + 2), shutil.disk_usage(folder).free
    if wanted <= free:
        return []
    return [
        f"output.storage: checkpoints take up to {format_bytes(wanted)}, {folder} has {format_bytes(free)} left; lower "
        "checkpoint.keep_last, or give another storage"
    ]


def _settled(job: JobSpec, zero: int, micro: int | str | None) -> JobSpec:
    return job.model_copy(update={"parallel": job.parallel.model_copy(update={"zero": zero, "micro_batch": micro})})


def _stage(job: JobSpec, peak: Callable[[int], int], limit: int | None, stages: Sequence[int]) -> tuple[int, str]:
    """The stage, and why."""
    parallel = job.parallel
    if job.train.optimizer.type == "adafactor":
        return 0, "Adafactor factors whole matrices, which the other stages cut"
    if stages[0] == 3:
        return 3, "the run's checkpoints are of it"
    if parallel.offload_parameters or parallel.offload_path:
        return 3, "only ZeRO-3 offloads weights, or states to a disk"
    if limit is None:
        return job.zero_stage, "the workers' memory is not known here"
    if job.cluster.workers == 1:
        return job.zero_stage, "a single worker has nobody to shard with"
    # Half precision needs ZeRO for its fp32 masters, offloading for the states.
    first = 1 if job.train.precision != "fp32" or parallel.offload_optimizer else 0
    last = min(stages[-1], 2 if job.train.compile else 3)
    found = formulas.lowest_stage([stage for stage in stages if first <= stage <= last], peak, limit)
    if found is None:
        return last, f"even so about {format_bytes(peak(last))} are needed where {format_bytes(limit)} are there"
    return found, f"the lowest stage that fits, {format_bytes(peak(found))} of {format_bytes(limit)}"


def _size(job: JobSpec, share: int, peak: Callable[[int], int], limit: int | None) -> tuple[int, str]:
    """The micro-batch, and why."""
    if job.model.syncs_batch_norm:
        return share, "the whole share, as BatchNorm sees micro-batches"
    size = formulas.largest_micro_batch(share, peak, limit)
    if limit is None:
        return size, "the whole share, as the workers' memory is not known here; it is halved where it does not fit"
    if size == share:
        return size, f"the whole share fits, {format_bytes(peak(size))} of {format_bytes(limit)}"
    return size, f"the largest part of the share that fits, {format_bytes(peak(size))} of {format_bytes(limit)}"


def worker_memory_limit(job: JobSpec) -> int | None:
    """Bytes one worker may use; None where they cannot be known from here."""
    cluster = job.cluster
    if cluster.gpus_per_worker > 0:
        import torch

        if cluster.address or not torch.cuda.is_available():
            return None
        return int(torch.cuda.get_device_properties(0).total_memory * min(1.0, cluster.gpus_per_worker) * _USABLE)
    if cluster.address or cluster.kubernetes is not None or os.environ.get("RAY_ADDRESS"):
        return None
    return int(host_memory() * _USABLE / cluster.workers)


def host_memory() -> int:
    """Bytes this machine, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def _needs(job: JobSpec, train: Split, share: int) -> Callable[[int, int], WorkerMemory]:
    """(stage, micro-batch) -> what a worker needs.

    Raises:
        RuntimeError: the model's code cannot be run on shapes alone.
    """
    key = job.model_dump_json(include=_MATTERS)
    task = build_task(job)
    samples, lengths = _longest(task, train)
    longest = int(lengths.argmax())
    fill = 1 if task.pack_length is None else max(1, task.pack_length // max(1, int(lengths[longest])))
    evaluated = -(-job.evaluation.batch_size // job.cluster.workers)

    def needs(zero: int, size: int) -> WorkerMemory:
        count = size if task.pack_length is None else max(1, -(-size // fill))
        train_batch = repeated(task, samples, longest, count, fill)
        evaluation = repeated(task, samples, longest, evaluated, 1)
        found = _measured(key, count, lambda: _measure(job, task, train_batch, evaluation))
        return formulas.worker_memory(*found, memory_config(job, zero, share > size))

    return needs


def memory_config(job: JobSpec, zero: int, accumulates: bool) -> MemoryConfig:
    """How a job uses memory at a stage."""
    parallel = job.parallel
    return MemoryConfig(
        workers=job.cluster.workers,
        zero=zero,
        element_bytes=4 if job.train.precision == "fp32" else 2,
        has_accumulation=accumulates,
        optimizer_slots=_states(job),
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        offload_to_disk=parallel.offload_path is not None,
        has_ema=job.train.ema is not None,
        stages_checkpoints=job.checkpoint.background,
        on_cpu=job.cluster.gpus_per_worker == 0,
    )


def _states(job: JobSpec) -> float:
    """Numbers of 4 bytes an optimizer keeps of each trained weight."""
    optimizer = job.train.optimizer
    if optimizer.type == "sgd":
        return 1.0 if optimizer.momentum else 0.0
    # Adafactor keeps a row and a column of each matrix; 8 bits are a quarter of Adam's two.
    return {"adafactor": 0.0, "adamw_8bit": 0.5}.get(optimizer.type, 2.0)


_MEASURED: dict[tuple[str, int], tuple[ParameterCounts, Activations]] = {}


def _measured(
    key: str, count: int, measure: Callable[[], tuple[ParameterCounts, Activations]]
) -> tuple[ParameterCounts, Activations]:
    if (key, count) not in _MEASURED:
        _MEASURED[key, count] = measure()
    return _MEASURED[key, count]


def _measure(job: JobSpec, task: Task, train: Batch, evaluation: Batch) -> tuple[ParameterCounts, Activations]:
    # It takes torch and transformers, which a plan without decisions does without.
    from launcher.driver.memory import activations

    model = activations.meta_model(job, task)
    return activations.count_parameters(model), activations.measure_activations(model, task, train, evaluation)


def _longest(task: Task, train: Split) -> tuple[pa.Table, np.ndarray]:
    """Encoded samples, the longest of the rows looked at among them, and their lengths.

    Raises:
        RuntimeError: none of the rows can be used.
    """
    looked = _LOOK_PICTURES if task.from_scratch == "image" else _LOOK_ROWS
    rows = train.read(np.arange(min(looked, train.rows)), task.input_columns + task.target_columns)
    sizes = np.zeros(len(rows), np.int64)
    for name in task.input_columns:
        if pa.types.is_string(rows.schema.field(name).type) or pa.types.is_nested(rows.schema.field(name).type):
            sizes += np.array([len(str(cell)) for cell in rows.column(name).to_pylist()], np.int64)
    chosen = np.sort(np.argsort(-sizes, kind="stable")[:_ENCODED])
    encoded = task.encode(rows.take(pa.array(chosen)), True)
    if not len(encoded.valid_rows):
        raise RuntimeError("none of the first rows can be used")
    return encoded.samples, encoded.lengths
