"""Memory of one train worker, predicted: states, DeepSpeed's own buffers, activations. Pure; runs on client and head.

`driver/memory/activations.py` finds the sizes of model and activations; `driver/memory/auto.py` decides with them.
The formulas follow DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), as `train/deepspeed_config.py`
configures it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.rundir.plan import WorkerMemory
from launcher.rundir.records import Record
from launcher.train.deepspeed_config import swap_buffers

_FP32 = 4
# Elements, DeepSpeed's own where its configuration is silent: stage3_max_reuse_distance, stage3_prefetch_bucket_size.
_REUSE, _PREFETCH = 1_000_000_000, 50_000_000


class ParameterCounts(Record):
    """Elements of a model's tensors."""

    trained: int
    frozen: int
    persistent: int
    """Of parameters so small that ZeRO-3 keeps them whole."""
    buffer_bytes: int


class Activations(Record):
    """Largest number of bytes alive beside model, gradients and optimizer, with one micro-batch."""

    forward: int
    """Until the first gradient is whole."""
    backward: int
    """From then on."""
    joint: int
    """With the gradients made so far."""
    evaluation: int
    """While an evaluation batch is scored."""


@dataclass(frozen=True)
class MemoryConfig:
    """How a run uses memory.

    Args:
        workers: that share states.
        zero: stage.
        element_bytes: of a weight: 4 in fp32, 2 in half precision.
        accumulates: whether a step has more than one micro-batch.
        states: numbers of 4 bytes that the optimizer keeps of each trained weight; Adam has two moments.
        offload_optimizer: states are in the CPU's memory.
        offload_parameters: weights are in the CPU's memory between uses.
        on_disk: states that are offloaded are in files, not in the CPU's memory.
        averages: whether an average of the weights is kept beside them, where they are.
        copies: whether what a checkpoint holds is copied into the CPU's memory while it is written.
        on_cpu: whether that is where training happens.
    """

    workers: int
    zero: int
    element_bytes: int
    has_accumulation: bool
    optimizer_slots: float = 2.0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_to_disk: bool = False
    has_ema: bool = False
    stages_checkpoints: bool = False
    on_cpu: bool = True


def worker_memory(shapes: ParameterCounts, used: Activations, it: MemoryConfig) -> WorkerMemory:
    """What one worker needs.

    Args:
        shapes: of the model.
        used: by one micro-batch.
        it: stage, workers and the like.
    """
    trained = shapes.trained
    share = it.workers if it.zero else 1
    half = it.element_bytes != _FP32
    weights = (trained + shapes.frozen) * it.element_bytes + shapes.buffer_bytes
    if it.zero == 3:
        weights = weights // it.workers + shapes.persistent * it.element_bytes
    # ZeRO, and half precision without it, update a flat copy of the weights in fp32, even where these are fp32 too.
    master = trained * _FP32 // share if it.zero or half else 0
    states = int(it.optimizer_slots * trained * _FP32) // share
    kept = trained * _FP32 // share  # gradients are summed in fp32 (`train/deepspeed_config.py`)
    away = master + states + kept if it.offload_optimizer else 0
    disk, away = (away, kept + swap_buffers(trained // share)) if it.offload_to_disk else (0, away)
    offloaded = away + (weights if it.offload_parameters else 0)
    average = trained * _FP32 // (it.workers if it.zero == 3 else 1) if it.has_ema else 0
    base = (0 if it.offload_parameters else weights) + (0 if it.offload_optimizer else master + states) + average
    gradients, buffers, active, peak = _peak(shapes, used, it, kept, base)
    peak = max(peak, base + used.evaluation) + (offloaded if it.on_cpu else 0)
    # Of rank 0, which writes the weights below ZeRO-3, and all states without ZeRO.
    copied = (weights + (0 if it.offload_to_disk else master + states) + average) if it.stages_checkpoints else 0
    return WorkerMemory(
        weights=weights,
        gradients=gradients,
        optimizer=master + states + average,
        buffers=buffers,
        activations=active,
        peak=peak,
        host=0 if it.on_cpu else offloaded + copied,
        disk=disk,
        copy_bytes=copied if it.on_cpu else 0,
        checkpoint=(trained + shapes.frozen) * it.element_bytes
        + (states + master) * share
        + (trained * _FP32 if it.has_ema else 0),
    )


def _peak(
    shapes: ParameterCounts, used: Activations, it: MemoryConfig, kept: int, base: int
) -> tuple[int, int, int, int]:
    """Bytes of gradients, of buffers, of activations, and of the largest sum while a step is made.

    Args:
        shapes: of the model.
        used: by one micro-batch.
        it: stage, workers and the like.
        kept: of this worker's gradients.
        base: what is always there.
    """
    whole = shapes.trained * _FP32
    if it.zero == 3:
        # Weights stay gathered where they are used again within max_reuse_distance: in all smaller models. What is
        # fetched ahead, up to the prefetch bucket, arrives in a flat buffer first.
        scattered = shapes.trained + shapes.frozen - shapes.persistent
        gathered = (min(scattered, _REUSE) + min(scattered, _PREFETCH)) * it.element_bytes
        gradients = 0 if it.offload_optimizer else kept
        buffers, active = whole + gathered, max(used.forward, used.backward)
        return gradients, buffers, active, base + gradients + buffers + active
    if it.zero == 2:
        gradients = kept if it.has_accumulation and not it.offload_optimizer else 0
        # The step makes this worker's gradients flat, beside their sums.
        peak = base + max(gradients + used.forward, gradients + whole + used.backward, 2 * kept)
        return gradients, whole, used.backward, peak
    if it.zero == 1:
        sums = (
            it.has_accumulation or it.element_bytes != _FP32
        )  # beside the gradient that a backward pass has just made
        flowing = whole + used.backward if sums else max(used.forward, used.joint)
        return whole, whole, used.backward, base + whole + max(flowing, 2 * whole // it.workers)
    # One buffer that is always there (`train/flat_gradients.py`).
    return whole, 0, used.backward, base + whole + max(used.forward, used.backward)


def lowest_stage(candidates: Sequence[int], peak: Callable[[int], int], limit: int | None) -> int | None:
    """The lowest of some ZeRO stages that fits; None where none does.

    Args:
        candidates: stages, lowest first.
        peak: bytes a worker needs at a stage.
        limit: bytes it has; None is unknown and fits nothing.
    """
    return next((stage for stage in candidates if limit is not None and peak(stage) <= limit), None)


def largest_micro_batch(share: int, peak: Callable[[int], int], limit: int | None) -> int:
    """The largest of share, share / 2, share / 4 ... that fits, 1 where none does; the share where nothing is known.

    Args:
        share: samples of a worker's share of the global batch.
        peak: bytes a worker needs with micro-batches of that many.
        limit: bytes it has.
    """
    size = max(1, share)
    while limit is not None and size > 1 and peak(size) > limit:
        size = -(-size // 2)
    return size
