"""Which runs have the same bits on any number of workers, and why others only agree to rounding. Runs anywhere."""

from launcher.spec.job import JobSpec


def inexact_reasons(job: JobSpec) -> tuple[str, ...]:
    """Return why another number of workers may change the last bits of the loss curve; () if it does not.

    Args:
        job: Job with its ZeRO stage and virtual ranks.
    """
    reasons = []
    parts, workers, zero = job.virtual_ranks, job.cluster.workers, job.zero_stage
    if not job.adds_in_one_order:
        what = {2: "ZeRO-2 adds", 3: "ZeRO-3 adds"}.get(zero)
        what = what or (
            "DeepSpeed adds offloaded" if job.parallel.offload_optimizer else "the loss scaling of fp16 adds"
        )
        reasons.append(f"{what} gradients in an order of its own")
    if parts % workers:
        reasons.append(f"{workers} workers do not divide the {parts} parts of a batch (train.virtual_ranks)")
    if job.train.optimizer.type == "adamw_8bit" and zero:
        reasons.append("adamw_8bit quantises blocks of each worker's shard; parallel.zero: 0 does not")
    if job.cluster.gpus_per_worker and not job.train.deterministic:
        reasons.append("GPU kernels may differ in the last bits; train.deterministic: true refuses those that do")
    return tuple(reasons)


def exact_workers(virtual_ranks: int) -> tuple[int, ...]:
    """Return the numbers of workers that divide the virtual ranks, which are a power of two."""
    return tuple(1 << power for power in range(virtual_ranks.bit_length()))


def provable_workers(job: JobSpec, cores: int) -> tuple[int, ...]:
    """Return the numbers of workers to prove a run on: the exact ones that this machine has cores for.

    Args:
        job: Resolved job of the run.
        cores: CPU cores of this machine.
    """
    if job.cluster.gpus_per_worker or job.cluster.address:
        # Neither is counted here: what held the run will hold it again.
        most = job.cluster.workers
    else:
        # Two are worth more than one core each: a single worker shows nothing of the communication.
        most = max(2, cores // job.train.threads)
    return tuple(workers for workers in exact_workers(job.virtual_ranks) if workers <= most)
