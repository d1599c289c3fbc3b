"""Chooses `parallel.zero` and `parallel.micro_batch` where the job says `auto`, and estimates a worker's memory.

Runs on the client and the head. The formulas are in `estimate.py`, the measurement of activations in `activations.py`.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from launcher.data.rank_batches import repeat_sample
from launcher.data.splits import Split
from launcher.driver.memory.estimate import (
    Activations,
    MemoryConfig,
    ParameterCounts,
    largest_micro_batch,
    lowest_stage,
    worker_memory,
)
from launcher.errors import LauncherError
from launcher.formatting import format_bytes
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan, WorkerMemory
from launcher.rundir.recovery import effective_micro_batch
from launcher.spec.job import JobSpec
from launcher.submit.doctor.actors import host_memory
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.tasks.samples import Batch

# Rows among which the longest are sought: a few hundred milliseconds, for images too, which all have one size.
_SEARCHED_ROWS, _SEARCHED_IMAGES, _ENCODED_ROWS = 4096, 8, 64
# The rest is for libraries, the CUDA context, the object store and fragmentation.
_USABLE_FRACTION = 0.8
_MODEST_BYTES = 8 << 30
"""Memory that a worker is taken to have where nobody knows."""
# Keys that sizes depend on. The trials of a sweep differ in other keys, so they are measured once.
_SIZE_KEYS: Mapping[str, bool | set[str]] = {
    "task": True,
    "model": True,
    "data": {"train"},
    "train": {"precision", "virtual_ranks"},
    "parallel": {"activation_checkpointing"},
}
# Errors of a model's own code that reads values, which fake tensors do not have.
_NEEDS_VALUES_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError)

Estimate = Callable[[int, int], WorkerMemory]
"""Returns a worker's memory for a ZeRO stage and a micro-batch size."""


@dataclass(frozen=True)
class MemoryPlan:
    """Resolved `parallel:` section, and the memory it takes.

    Args:
        job: Job with `zero` and `micro_batch` as numbers.
        memory: Estimate for one worker; None if it was not made.
        limit_bytes: Memory that one worker may use; None if unknown.
        notes: Sentences on what was chosen and why.
    """

    job: JobSpec
    memory: WorkerMemory | None
    limit_bytes: int | None
    notes: tuple[str, ...]


def resolve_auto_parallel(job: JobSpec, run: RunDir, train: Split, always_estimate: bool = False) -> MemoryPlan:
    """Choose the ZeRO stage and micro-batch size where the job says `auto`, and estimate memory per worker.

    Args:
        job: Job with absolute paths and inferred labels.
        run: Run directory. Its checkpoints restrict the stages; an earlier OOM caps the micro-batch.
        train: Training split. Its longest rows form the worst-case batch.
        always_estimate: True to estimate memory even if nothing is `auto` (takes 1-2 s).
    """
    part = largest_part(job, train)
    stages = _allowed_stages(run)
    # Before anything is chosen: a size that once ran out of memory is never chosen again, whatever the estimate says.
    job = _with_oom_cap(job, run, part)
    parallel = job.parallel
    if not (always_estimate or parallel.zero == "auto" or parallel.micro_batch == "auto"):
        return MemoryPlan(job, None, None, ())
    limit = worker_memory_limit(job)
    try:
        return _choose(job, _make_estimate(job, train, part), part, limit, stages)
    # First: UserError is a ValueError and TrainingError a RuntimeError, which the next clause would take for the
    # model's.
    except LauncherError:
        raise
    except _NEEDS_VALUES_ERRORS as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        # Without an estimate: the stage of the existing checkpoints, and the whole part (None), which is halved if
        # memory runs out.
        zero = 3 if stages[0] == 3 and parallel.zero == "auto" else job.zero_stage
        micro_batch = None if parallel.micro_batch == "auto" else parallel.micro_batch
        note = f"the memory of activations cannot be estimated ({reason})"
        return MemoryPlan(_with_parallel(job, zero, micro_batch), None, limit, (note,))


def largest_part(job: JobSpec, train: Split) -> int:
    """Return the largest number of samples of one part of a global batch."""
    return -(-min(job.train.batch_size, train.rows) // job.virtual_ranks)


def _allowed_stages(run: RunDir) -> tuple[int, ...]:
    """Return the stages that `auto` may choose: only ZeRO-3 reads a ZeRO-3 checkpoint; the others read each other's."""
    old = run.find_record("plan.json", Plan)
    if old is None:
        return (0, 1, 2, 3)
    return (3,) if old.zero == 3 else (0, 1, 2)


def _with_oom_cap(job: JobSpec, run: RunDir, part: int) -> JobSpec:
    """Return the job with the smaller micro-batch that the run recorded when it was out of memory."""
    requested = job.parallel.micro_batch
    size = requested if isinstance(requested, int) else part
    capped = effective_micro_batch(run, size)
    return job if capped == size else _with_parallel(job, job.parallel.zero, capped)


def _choose(job: JobSpec, estimate: Estimate, part: int, limit: int | None, stages: Sequence[int]) -> MemoryPlan:
    notes = []
    requested = job.parallel.micro_batch
    micro_batch = min(requested, part) if isinstance(requested, int) else part
    zero = job.zero_stage
    if job.parallel.zero == "auto":
        # The stage first, for the smallest micro-batch; then the largest micro-batch that fits that stage.
        smallest = 1 if requested == "auto" else micro_batch
        zero, reason = _choose_stage(job, lambda stage: estimate(stage, smallest).needed, limit, stages)
        notes.append(f"parallel.zero: auto takes {zero}: {reason}")
    if requested == "auto":
        micro_batch, reason = _choose_micro_batch(job, part, lambda size: estimate(zero, size).needed, limit)
        notes.append(f"parallel.micro_batch: auto takes {micro_batch}: {reason}")
    memory = estimate(zero, micro_batch)
    if limit is not None and memory.needed > limit:
        notes.append(
            f"a worker needs about {format_bytes(memory.needed)} of memory and has {format_bytes(limit)}: lower "
            "parallel.micro_batch or task.max_length, raise parallel.zero, or set parallel.activation_checkpointing: "
            "true"
        )
    notes += _storage_notes(job, memory)
    job = _with_parallel(job, zero, micro_batch if requested == "auto" else requested)
    return MemoryPlan(job, memory, limit, tuple(notes))


def _choose_stage(
    job: JobSpec, peak: Callable[[int], int], limit: int | None, stages: Sequence[int]
) -> tuple[int, str]:
    """Return the lowest ZeRO stage that fits, and the reason; lower stages communicate less."""
    parallel = job.parallel
    if job.train.optimizer.type == "adafactor":
        return 0, "Adafactor factors whole matrices, which the other stages cut"
    if stages[0] == 3:
        return 3, "the run's checkpoints are of stage 3"
    if parallel.offload_parameters or parallel.offload_path:
        return 3, "only ZeRO-3 offloads weights, or states to a disk"
    if job.cluster.workers == 1 and job.zero_stage == 0:
        return 0, "a single worker has no other to shard with"
    # Half precision needs ZeRO for its fp32 master weights, offloading for the optimizer states.
    first = 1 if job.train.precision != "fp32" or parallel.offload_optimizer else 0
    # Compiled code cannot gather the weights of ZeRO-3, nor can it cut 4-bit ones (`spec/job.py` refuses both).
    cannot_gather = job.train.compile or job.model.quantization
    last = min(stages[-1], 2 if cannot_gather or limit is None or job.cluster.workers == 1 else 3)
    candidates = [stage for stage in stages if first <= stage <= last]
    fitting = lowest_stage(candidates, peak, _MODEST_BYTES if limit is None else limit)
    if limit is None:
        unknown = "the workers' memory is not known here"
        if fitting is None:
            return job.zero_stage, unknown
        return fitting, f"the lowest stage that fits into {format_bytes(_MODEST_BYTES)}; {unknown}"
    if fitting is None:
        return last, f"the smallest, and still about {format_bytes(peak(last))} of {format_bytes(limit)}"
    return fitting, f"the lowest stage that fits, {format_bytes(peak(fitting))} of {format_bytes(limit)}"


def _choose_micro_batch(job: JobSpec, part: int, peak: Callable[[int], int], limit: int | None) -> tuple[int, str]:
    """Return the largest micro-batch that fits, and the reason."""
    if job.model.trains_batch_norm:
        return part, "a whole part of the batch, as BatchNorm sees micro-batches"
    size = largest_micro_batch(part, peak, limit)
    if limit is None:
        return (
            size,
            "a whole part of the batch, as the workers' memory is not known here; it is halved if it does not fit",
        )
    what = "a whole part of the batch fits" if size == part else "the largest piece of a part that fits"
    return size, f"{what}, {format_bytes(peak(size))} of {format_bytes(limit)}"


def _storage_notes(job: JobSpec, memory: WorkerMemory) -> list[str]:
    """Return a note if a local storage cannot hold the last checkpoints, the best, and the one being written."""
    folder = RunDir(job.output.storage).local
    if folder is None:
        return []
    # The storage may not exist yet, and `disk_usage` needs a directory that does.
    while not folder.exists():
        folder = folder.parent
    required = memory.checkpoint * (job.checkpoint.keep_last + 2)
    free = shutil.disk_usage(folder).free
    if required <= free:
        return []
    return [
        f"output.storage: checkpoints take up to {format_bytes(required)}, {folder} has {format_bytes(free)} left; "
        "lower checkpoint.keep_last, or choose another storage"
    ]


def _with_parallel(job: JobSpec, zero: int | str, micro_batch: int | str | None) -> JobSpec:
    parallel = job.parallel.model_copy(update={"zero": zero, "micro_batch": micro_batch})
    return job.model_copy(update={"parallel": parallel})


def worker_memory_limit(job: JobSpec) -> int | None:
    """Return the bytes that one worker may use; None if this machine cannot know them."""
    cluster = job.cluster
    if cluster.gpus_per_worker > 0:
        import torch

        if cluster.address or not torch.cuda.is_available():
            return None
        # Assumes that all GPUs are equal. A second GPU gives a worker no more memory: it trains on one.
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
        return int(gpu_bytes * min(1.0, cluster.gpus_per_worker) * _USABLE_FRACTION)
    if cluster.address or cluster.kubernetes is not None or os.environ.get("RAY_ADDRESS"):
        return None
    return int(host_memory()[0] * _USABLE_FRACTION / cluster.workers)


def _make_estimate(job: JobSpec, train: Split, part: int) -> Estimate:
    """Return a function from stage and micro-batch size to a worker's memory, for the longest training rows.

    Raises:
        RuntimeError: The model's code cannot run on fake tensors.
    """
    key = job.model_dump_json(include=_SIZE_KEYS)
    task = build_task(job)
    samples, lengths = _longest_samples(task, train)
    longest = int(lengths.argmax())
    rows_per_sample = 1 if task.pack_length is None else max(1, task.pack_length // max(1, int(lengths[longest])))

    def estimate(zero: int, micro_batch: int) -> WorkerMemory:
        count = micro_batch if task.pack_length is None else max(1, -(-micro_batch // rows_per_sample))
        evaluation_rows = _evaluation_rows(job, micro_batch)
        size = key, count, evaluation_rows
        if size not in _MEASURED:
            train_batch = repeat_sample(task, samples, longest, count, rows_per_sample)
            evaluation_batch = repeat_sample(task, samples, longest, evaluation_rows, 1)
            _MEASURED[size] = _measure(job, task, train_batch, evaluation_batch)
        parameters, activations = _MEASURED[size]
        return worker_memory(parameters, activations, _memory_config(job, zero, part > micro_batch))

    return estimate


_MEASURED: dict[tuple[str, int, int], tuple[ParameterCounts, Activations]] = {}


def _evaluation_rows(job: JobSpec, micro_batch: int) -> int:
    """Return the rows of the largest forward pass of an evaluation, whose parts are cut like those of training.

    Args:
        job: Job with its virtual ranks.
        micro_batch: Size that the estimate is for, where the job says `auto`.
    """
    part = -(-job.evaluation_batch_size // job.virtual_ranks)
    requested = job.parallel.micro_batch
    if requested is None:
        return part
    return min(part, micro_batch if requested == "auto" else requested)


def _measure(job: JobSpec, task: Task, train: Batch, evaluation: Batch) -> tuple[ParameterCounts, Activations]:
    # Imports torch and transformers, which a plan without an estimate does not need.
    from launcher.driver.memory import activations

    model = activations.meta_model(job, task)
    task.reference = activations.meta_reference(job, task)
    counts = activations.count_parameters(model, job.model.quantization is not None, task.reference)
    return counts, activations.measure_activations(model, task, train, evaluation)


def _memory_config(job: JobSpec, zero: int, cuts_parts: bool) -> MemoryConfig:
    """Return the settings that memory depends on.

    Args:
        job: Job with its virtual ranks.
        zero: ZeRO stage.
        cuts_parts: True if a part has more than one micro-batch.
    """
    parallel = job.parallel
    parts = -(-job.virtual_ranks // job.cluster.workers)
    at_stage = job.model_copy(update={"parallel": parallel.model_copy(update={"zero": zero})})
    # As many as `train/flat_gradients.py` allocates.
    sums = max(1, (parts - 1).bit_length()) + (cuts_parts and parts > 1)
    return MemoryConfig(
        workers=job.cluster.workers,
        zero=zero,
        element_bytes=4 if job.train.precision == "fp32" else 2,
        has_accumulation=cuts_parts or parts > 1,
        gradient_sums=sums if at_stage.adds_in_one_order else 0,
        optimizer_slots=_optimizer_slots(job),
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        offload_to_disk=parallel.offload_path is not None,
        has_ema=job.train.ema is not None,
        stages_checkpoints=job.checkpoint.background,
        on_cpu=job.cluster.gpus_per_worker == 0,
    )


def _optimizer_slots(job: JobSpec) -> float:
    """Return the number of fp32 values that the optimizer keeps for each trained weight."""
    optimizer = job.train.optimizer
    if optimizer.type == "sgd":
        return 1.0 if optimizer.momentum else 0.0
    # Adafactor keeps a row and a column of each matrix; 8 bits are a quarter of Adam's two values.
    return {"adafactor": 0.0, "adamw_8bit": 0.5}.get(optimizer.type, 2.0)


def _longest_samples(task: Task, train: Split) -> tuple[pa.Table, np.ndarray]:
    """Return encoded samples, the longest of the first rows among them, and their lengths.

    Raises:
        RuntimeError: None of the rows can be used.
    """
    searched = _SEARCHED_IMAGES if task.from_scratch == "image" else _SEARCHED_ROWS
    # Targets too: they may be texts that the model reads, such as answers and positive documents.
    columns = task.input_columns + task.target_columns
    rows = train.read(np.arange(min(searched, train.rows)), columns)
    text_lengths = np.zeros(len(rows), np.int64)
    for name in columns:
        kind = rows.schema.field(name).type
        if pa.types.is_string(kind) or pa.types.is_nested(kind):
            text_lengths += np.array([len(str(cell)) for cell in rows.column(name).to_pylist()], np.int64)
    # By characters: tokenizing all rows that are searched would take too long. Only these candidates are tokenized.
    chosen = np.sort(np.argsort(-text_lengths, kind="stable")[:_ENCODED_ROWS])
    encoded = task.encode(rows.take(pa.array(chosen)), True)
    if not len(encoded.valid_rows):
        raise RuntimeError("none of the first rows can be used")
    return encoded.samples, encoded.lengths
