"""Out of memory in a step: the micro-batch is halved on all workers and the step made again. Train workers.

Under ZeRO 0 and 1 nothing is exchanged before a step's last gradient is there, so the workers agree at that point and
repeat the step in place. Under ZeRO 2 and 3 the others wait inside a collective that the failed worker cannot reach any
more: it writes the smaller micro-batch down, and the workers are started again from the last checkpoint.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.errors import MicroBatchOOMError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.recovery import MicroBatchReduction, record_reduction
from launcher.train.engine import Engine

_LOG = logging.getLogger(__name__)
# What torch's CPU allocator and CUDA's libraries say; CUDA's own allocator raises torch.OutOfMemoryError.
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

Gradients = Callable[[Sequence[pa.Table]], torch.Tensor]
"""Forward and backward of some micro-batches; the sum of their losses."""


class OOMRecovery:
    """Repeats steps that did not fit into memory.

    Args:
        run: where halvings are written down.
        engine: this worker's.
    """

    def __init__(self, run: RunDir, engine: Engine) -> None:
        self._run, self._engine = run, engine
        self._size: int | None = None

    def gradients(self, step: int, micro_batches: Sequence[pa.Table], compute: Gradients) -> torch.Tensor:
        """The loss sum of a step, once all workers have its gradients (a collective under ZeRO 0 and 1).

        Args:
            step: steps done before it.
            micro_batches: as the stream cut them.
            compute: forward and backward; called again with smaller ones after it failed.

        Raises:
            MicroBatchOOMError: the workers must start again with the smaller micro-batch that was written down.
            TrainingError: not even a single sample fits.
        """
        while True:
            pieces = list(split_micro_batches(micro_batches, self._size))
            total = attempt(compute, pieces)
            largest = max(len(piece) for piece in pieces)
            if total is None:
                self._check(step, largest)
            failed = self._largest_failed(0 if total is not None else largest)
            if not failed:
                assert total is not None
                return total
            del total
            self._engine.reset_gradients()
            release_cached_memory()
            self._size = -(-failed // 2)
            if self._engine.rank == 0:
                halving = MicroBatchReduction(step=step + 1, micro_batch=failed, reduced=self._size, restarted=False)
                _LOG.warning("%s", record_reduction(self._run, halving).sentence())

    def _check(self, step: int, largest: int) -> None:
        if largest <= 1:
            raise TrainingError(out_of_memory_message(f"step {step + 1} on rank {self._engine.rank}"))
        if self._engine.can_retry_step:
            return
        half = -(-largest // 2)
        record_reduction(
            self._run, MicroBatchReduction(step=step + 1, micro_batch=largest, reduced=half, restarted=True)
        )
        raise MicroBatchOOMError(
            f"out of memory in step {step + 1}: micro-batches of {largest} do not fit; the next start takes {half}"
        )

    def _largest_failed(self, mine: int) -> int:
        """The largest micro-batch that did not fit on some worker; 0 where all did."""
        if self._engine.world_size == 1 or not self._engine.can_retry_step:
            return mine
        # A host tensor in a host group: the device works on meanwhile, and nobody waits for it.
        told = torch.tensor([mine])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=_host_group())
        return int(told)


def out_of_memory_message(where: str, samples: int = 1) -> str:
    """What to do when there is nothing left to halve."""
    if samples > 1:
        return f"{where}: {samples} samples do not fit into memory; lower evaluation.batch_size"
    return (
        f"{where}: a single sample does not fit into memory; set parallel.activation_checkpointing: true, "
        "parallel.zero: 3, parallel.offload_optimizer: true, or a shorter task.max_length"
    )


def attempt(compute: Gradients, pieces: Sequence[pa.Table]) -> torch.Tensor | None:
    """What `compute` says; None when memory ran out, with all that it had made already let go."""
    try:
        return compute(pieces)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The traceback's frames hold the graph.
        error.__traceback__ = None
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def release_cached_memory() -> None:
    """Give caches back, so that a smaller attempt finds the room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def split_micro_batches(micro_batches: Sequence[pa.Table], size: int | None) -> Iterator[pa.Table]:
    """Micro-batches of at most `size` sequences each; as they are where there is no size."""
    for table in micro_batches:
        if size is None or len(table) <= size:
            yield table
        else:
            yield from (table.slice(begin, size) for begin in range(0, len(table), size))


@lru_cache(maxsize=1)
def _host_group() -> dist.ProcessGroup | None:
    """All workers, on the CPU; one for the process, as a sweep trains many times in it."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
