"""Estimates the memory of one train worker: states, DeepSpeed's buffers, activations. Pure; runs on client and head.

`activations.py` measures the sizes of model and activations; `auto.py` chooses with the estimate. The formulas follow
DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), as `train/deepspeed_config.py` configures it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.rundir.plan import WorkerMemory
from launcher.rundir.records import Record
from launcher.train.deepspeed_config import swap_buffer_bytes

_FP32_BYTES = 4
# Elements. DeepSpeed's defaults where its config is silent: stage3_max_reuse_distance, stage3_prefetch_bucket_size.
_MAX_REUSE_DISTANCE, _PREFETCH_BUCKET = 1_000_000_000, 50_000_000


class ParameterCounts(Record):
    """Numbers of elements of a model's tensors."""

    trained: int
    frozen: int
    """Frozen ones in the model's own dtype."""
    persistent: int
    """Elements of parameters so small that ZeRO-3 keeps them whole on every worker."""
    buffer_bytes: int
    quantized_bytes: int = 0
    """Bytes of frozen weights in 4 bits, with their scales."""
    dequantized: int = 0
    """Elements of the largest of them: one at a time is made whole to multiply with."""
    reference: int = 0
    """Elements of a frozen model that losses compare with; no checkpoint holds them."""


class Activations(Record):
    """Largest number of bytes alive besides model, gradients and optimizer, for one micro-batch."""

    forward: int
    """Until the first gradient is complete."""
    backward: int
    """After that."""
    joint: int
    """Activations together with the gradients made so far."""
    evaluation: int
    """While an evaluation batch is scored."""


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of a run that its memory depends on.

    Args:
        workers: Number of workers that share states.
        zero: ZeRO stage.
        element_bytes: Bytes of a weight: 4 in fp32, 2 in half precision.
        has_accumulation: True if a step has more than one micro-batch.
        optimizer_slots: Number of fp32 values that the optimizer keeps for each trained weight; Adam keeps two.
        gradient_sums: Buffers of all gradients, where they are added in the order of the parts; 0 where DeepSpeed does.
        offload_optimizer: True if optimizer states are in CPU memory.
        offload_parameters: True if weights are in CPU memory between uses.
        offload_to_disk: True if offloaded states are in files instead of CPU memory.
        has_ema: True if a moving average of the weights is kept on the same device.
        stages_checkpoints: True if a checkpoint is copied to CPU memory before it is written.
        on_cpu: True if training runs in CPU memory.
    """

    workers: int
    zero: int
    element_bytes: int
    has_accumulation: bool
    optimizer_slots: float = 2.0
    gradient_sums: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_to_disk: bool = False
    has_ema: bool = False
    stages_checkpoints: bool = False
    on_cpu: bool = True


def worker_memory(counts: ParameterCounts, activations: Activations, config: MemoryConfig) -> WorkerMemory:
    """Estimate the memory of one worker.

    Args:
        counts: Sizes of the model.
        activations: Bytes that one micro-batch takes.
        config: Stage, workers and the like.
    """
    trained = counts.trained
    shards = config.workers if config.zero else 1
    weights = (trained + counts.frozen) * config.element_bytes + counts.quantized_bytes
    if config.zero == 3:
        weights = weights // config.workers + counts.persistent * config.element_bytes
    # ZeRO-3 partitions parameters alone.
    weights += counts.buffer_bytes
    # ZeRO, and half precision without it, updates a flat fp32 copy of the weights, even if these are fp32 too.
    has_master = config.zero or config.element_bytes != _FP32_BYTES
    master = trained * _FP32_BYTES // shards if has_master else 0
    states = int(config.optimizer_slots * trained * _FP32_BYTES) // shards
    gradient_shard = trained * _FP32_BYTES // shards  # summed in fp32 (`train/deepspeed_config.py`)
    offloaded = master + states + gradient_shard if config.offload_optimizer else 0
    disk = 0
    if config.offload_to_disk:
        disk = offloaded
        offloaded = gradient_shard + swap_buffer_bytes(trained // shards)
    if config.offload_parameters:
        offloaded += weights
    # The average lies where the weights lie, so it is sharded under ZeRO-3 alone.
    ema = trained * _FP32_BYTES // (config.workers if config.zero == 3 else 1) if config.has_ema else 0
    # A second model, sharded and offloaded like the first.
    reference = counts.reference * config.element_bytes // (config.workers if config.zero == 3 else 1)
    if config.offload_parameters:
        offloaded += reference
    resident = (
        (0 if config.offload_parameters else weights + reference)
        + (0 if config.offload_optimizer else master + states)
        + ema
    )
    # In the forward and in the backward pass, so in both peaks.
    resident += counts.dequantized * config.element_bytes
    step = _step_memory(counts, activations, config, gradient_shard, resident)
    # On a CPU worker, offloading moves states from one part of the same memory to another.
    peak = max(step.peak, resident + activations.evaluation) + (offloaded if config.on_cpu else 0)
    # Copy that rank 0 makes for a checkpoint: it writes the trained weights below ZeRO-3, and all states without ZeRO.
    staged = 0
    saved = trained * config.element_bytes + counts.buffer_bytes
    if config.stages_checkpoints:
        staged = (0 if config.zero == 3 else saved) + (0 if config.offload_to_disk else master + states) + ema
    return WorkerMemory(
        weights=weights + reference,
        gradients=step.gradients,
        optimizer=master + states + ema,
        buffers=step.buffers,
        activations=step.activations,
        peak=peak,
        host=0 if config.on_cpu else offloaded + staged,
        disk=disk,
        copy_bytes=staged if config.on_cpu else 0,
        checkpoint=trained * config.element_bytes
        + (states + master) * shards
        + (trained * _FP32_BYTES if config.has_ema else 0),
    )


class _StepMemory(NamedTuple):
    """Bytes of gradients, DeepSpeed's buffers and activations, and the largest sum during a step."""

    gradients: int
    buffers: int
    activations: int
    peak: int


def _step_memory(
    counts: ParameterCounts, used: Activations, config: MemoryConfig, gradient_shard: int, resident: int
) -> _StepMemory:
    """Estimate what a training step takes.

    Args:
        counts: Sizes of the model.
        used: Bytes that one micro-batch takes.
        config: Stage, workers and the like.
        gradient_shard: Bytes of this worker's shard of the gradients.
        resident: Bytes that are allocated all the time.
    """
    all_gradients = counts.trained * _FP32_BYTES
    if config.gradient_sums:
        # Buffers that are always allocated (`train/flat_gradients.py`); the step of ZeRO 1 copies its shard twice.
        gradients = all_gradients * config.gradient_sums
        shards = 2 * gradient_shard if config.zero else 0
        peak = resident + gradients + max(used.forward, used.backward, shards)
        return _StepMemory(gradients, 0, used.backward, peak)
    if config.zero == 3:
        # Weights stay gathered if they are used again within max_reuse_distance, so in all smaller models. Prefetched
        # ones, up to the bucket size, arrive in a flat buffer first.
        sharded = counts.trained + counts.frozen - counts.persistent
        gathered = (min(sharded, _MAX_REUSE_DISTANCE) + min(sharded, _PREFETCH_BUCKET)) * config.element_bytes
        gradients = 0 if config.offload_optimizer else gradient_shard
        buffers = all_gradients + gathered
        activations = max(used.forward, used.backward)
        return _StepMemory(gradients, buffers, activations, resident + gradients + buffers + activations)
    if config.zero == 2:
        gradients = gradient_shard if config.has_accumulation and not config.offload_optimizer else 0
        # The optimizer step makes this worker's gradients flat, in addition to their sums.
        peak = resident + max(gradients + used.forward, gradients + all_gradients + used.backward, 2 * gradient_shard)
        return _StepMemory(gradients, all_gradients, used.backward, peak)
    # Stage 1 with offloading or fp16. Sums exist in addition to the gradient that a backward pass has just made.
    has_sums = config.has_accumulation or config.element_bytes != _FP32_BYTES
    backward = all_gradients + used.backward if has_sums else max(used.forward, used.joint)
    peak = resident + all_gradients + max(backward, 2 * all_gradients // config.workers)
    return _StepMemory(all_gradients, all_gradients, used.backward, peak)


def lowest_stage(candidates: Sequence[int], peak: Callable[[int], int], limit: int | None) -> int | None:
    """Return the lowest ZeRO stage that fits; None if none does.

    Args:
        candidates: Stages, lowest first.
        peak: Function from a stage to the bytes a worker needs.
        limit: Bytes a worker has; None is unknown and fits nothing.
    """
    return next((stage for stage in candidates if limit is not None and peak(stage) <= limit), None)


def largest_micro_batch(local_batch: int, peak: Callable[[int], int], limit: int | None) -> int:
    """Return the largest of local batch, 1/2, 1/4 ... of it that fits, or 1 if none does.

    Args:
        local_batch: Samples of one worker in a global batch.
        peak: Function from a micro-batch size to the bytes a worker needs.
        limit: Bytes a worker has; None is unknown, and the whole local batch is returned.
    """
    size = max(1, local_batch)
    while limit is not None and size > 1 and peak(size) > limit:
        # Rounded up like the halving of `train/oom.py`, so that both reach the same sizes.
        size = -(-size // 2)
    return size
