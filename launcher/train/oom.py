"""Recovery from running out of memory in a step. Runs in train workers.

Under ZeRO 0 and 1 the ranks exchange nothing before the last gradient of a step, so they agree at that point, halve
the micro-batch and repeat the step in place. Under ZeRO 2 and 3 the other ranks already wait inside a collective that
the failed rank can no longer reach: it records the smaller micro-batch, and the workers restart from the last
checkpoint.
"""

import gc
import logging
from collections.abc import Sequence
from functools import lru_cache

import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.data.rank_batches import Part
from launcher.errors import MicroBatchOOMError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.recovery import MicroBatchReduction, record_reduction
from launcher.train.engine import Engine

_LOG = logging.getLogger(__name__)
# Messages of torch's CPU allocator and of CUDA's libraries; CUDA's own allocator raises torch.OutOfMemoryError.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OOMRecovery:
    """Halves the micro-batch of a run when memory runs out.

    Args:
        run: Run directory, where reductions are recorded.
        engine: Engine of this rank.
    """

    def __init__(self, run: RunDir, engine: Engine) -> None:
        self._run, self._engine = run, engine
        self._max_samples: int | None = None
        # Samples of the largest micro-batch of the current attempt.
        self._largest = 0

    def split(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts of a step with micro-batches of the size that fits since memory last ran out."""
        # Ranks may then run different numbers of passes. The size is only ever set where a pass is no collective.
        cut = [Part(part.index, tuple(split_micro_batches(part.micro_batches, self._max_samples))) for part in parts]
        self._largest = max(len(piece) for part in cut for piece in part.micro_batches)
        return cut

    def must_retry(self, part_losses: torch.Tensor | None, step: int) -> bool:
        """Return True if the step must be repeated in smaller micro-batches. Collective under ZeRO 0 and 1.

        Args:
            part_losses: Result of the attempt; None if memory ran out on this rank.
            step: Number of optimizer steps completed before this one.

        Raises:
            MicroBatchOOMError: The workers must restart with the smaller micro-batch that was recorded.
            TrainingError: A single sample does not fit.
        """
        if part_losses is None:
            self._check_can_retry(step)
        largest_failed = self._largest_failed(self._largest if part_losses is None else 0)
        if not largest_failed:
            return False
        # On the ranks whose attempt was complete as well: all repeat the whole step.
        self._engine.reset_gradients()
        release_cached_memory()
        self._max_samples = -(-largest_failed // 2)
        if self._engine.rank == 0:
            reduction = MicroBatchReduction(
                step=step + 1, micro_batch=largest_failed, reduced=self._max_samples, restarted=False
            )
            _LOG.warning("%s", record_reduction(self._run, reduction).sentence())
        return True

    def _check_can_retry(self, step: int) -> None:
        if self._largest <= 1:
            raise TrainingError(out_of_memory_message(f"step {step + 1} on rank {self._engine.rank}"))
        if self._engine.can_retry_step:
            return
        half = -(-self._largest // 2)
        reduction = MicroBatchReduction(step=step + 1, micro_batch=self._largest, reduced=half, restarted=True)
        # By the failed rank itself, whatever its number: rank 0 may wait inside a collective. Before the error, as
        # the next attempt starts from the record.
        record_reduction(self._run, reduction)
        raise MicroBatchOOMError(
            f"out of memory in step {step + 1}: micro-batches of {self._largest} do not fit; the next "
            f"start takes {half}"
        )

    def _largest_failed(self, failed: int) -> int:
        """Return the size of the largest micro-batch that did not fit on any rank, 0 if all did. Collective."""
        if self._engine.world_size == 1 or not self._engine.can_retry_step:
            return failed
        # A CPU tensor in a gloo group: the device goes on with its queue, and the host does not wait for it.
        sizes = torch.tensor([failed])
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group=_cpu_group())
        return int(sizes)


def out_of_memory_message(place: str, samples: int = 1) -> str:
    """Return the error sentence for memory that cannot be saved by a smaller micro-batch.

    Args:
        place: Place that ran out of memory, such as "step 3 on rank 1".
        samples: Size of the micro-batch.
    """
    if samples > 1:
        return f"{place}: {samples} samples do not fit into memory; lower evaluation.batch_size"
    return (
        f"{place}: a single sample does not fit into memory; set parallel.activation_checkpointing: true, "
        "parallel.zero: 3, parallel.offload_optimizer: true, or a shorter task.max_length"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def release_cached_memory() -> None:
    """Free unreachable tensors and the allocator's cached blocks, so that a smaller attempt finds room."""
    # The aborted graph may be part of reference cycles, which keep its tensors until the collector runs.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def split_micro_batches(micro_batches: Sequence[pa.Table], max_samples: int | None) -> list[pa.Table]:
    """Return micro-batches of at most `max_samples` rows each; unchanged if it is None."""
    if max_samples is None:
        return list(micro_batches)
    return [
        table.slice(begin, max_samples)
        for table in micro_batches
        for begin in range(0, max(1, len(table)), max_samples)
    ]


@lru_cache(maxsize=1)
def _cpu_group() -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks. Collective at its first call; one per process, as a sweep trains many times."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
