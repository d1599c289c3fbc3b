"""What this machine lacks for a job that would run on a local Ray, told before Ray starts. Client and head."""

import os

from launcher.errors import ClusterError
from launcher.spec.job import JobSpec


def missing_gpus(job: JobSpec) -> str | None:
    """Why a local Ray could not run the job; None where it can, or where a cluster will."""
    cluster = job.cluster
    wanted = cluster.workers * cluster.gpus_per_worker
    if not wanted or cluster.address or cluster.kubernetes or os.environ.get("RAY_ADDRESS"):
        return None
    import torch

    have = torch.cuda.device_count()
    if wanted <= have:
        return None
    return (
        f"cluster.gpus_per_worker: {cluster.workers} workers with {cluster.gpus_per_worker:g} GPUs each need "
        f"{wanted:g} GPUs, this machine has {have}; set cluster.address to a cluster that has them, or ask for fewer"
    )


def check_machine(job: JobSpec) -> None:
    """Refuse a job whose GPUs a local Ray would look for in vain.

    Raises:
        ClusterError: they are not here, and no cluster is named.
    """
    import ray

    missing = missing_gpus(job)
    if missing is not None and not ray.is_initialized():  # a Ray that runs already knows what it has
        raise ClusterError(missing)
