"""What this machine lacks for a job that would run on a local Ray, told before Ray starts. Client and head."""

import os

from launcher.errors import ClusterError
from launcher.spec.job import JobSpec
from launcher.train.offload.swap_dir import check_offload_path


def missing_local_resources(job: JobSpec) -> str | None:
    """Why a local Ray could not run the job; None where it can, or where a cluster will."""
    cluster = job.cluster
    if cluster.address or cluster.kubernetes or os.environ.get("RAY_ADDRESS"):
        return None
    return _gpus(job) or _disk(job)


def _gpus(job: JobSpec) -> str | None:
    cluster = job.cluster
    wanted = cluster.workers * cluster.gpus_per_worker
    if not wanted:
        return None
    import torch

    have = torch.cuda.device_count()
    if wanted <= have:
        return None
    return (
        f"cluster.gpus_per_worker: {cluster.workers} workers with {cluster.gpus_per_worker:g} GPUs each need "
        f"{wanted:g} GPUs, this machine has {have}; set cluster.address to a cluster that has them, or ask for fewer"
    )


def _disk(job: JobSpec) -> str | None:
    if job.parallel.offload_path is None:
        return None
    try:
        check_offload_path(job.parallel.offload_path)
    except ClusterError as error:
        return error.message
    return None


def check_machine(job: JobSpec) -> None:
    """Refuse a job whose GPUs, or disk, a local Ray would look for in vain.

    Raises:
        ClusterError: they are not here, and no cluster is named.
    """
    import ray

    if ray.is_initialized():
        return  # it knows what it has
    lacks = missing_local_resources(job)
    if lacks is not None:
        raise ClusterError(lacks)
