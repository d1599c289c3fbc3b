"""Names of the objects of a run. Pure; runs on the client."""

import hashlib
import re

from launcher.spec.job import JobSpec

_LONGEST = 47  # KubeRay's limit for a RayJob: its own suffixes must fit a label
_HASH = 6


def job_name(job: JobSpec) -> str:
    """The RayJob's name: that of the run where KubeRay takes it, else one made of it that no other run has.

    Returns:
        An RFC 1035 label of at most 47 characters; where something was changed it ends with a hash of the run's name.
    """
    given = job.cluster.kubernetes.name if job.cluster.kubernetes is not None else None
    if given is not None:
        return given
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if not name or not name[0].isalpha():
        name = f"run-{name}".rstrip("-")
    if name == job.name and len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(job.name.encode()).hexdigest()[:_HASH]
    return f"{name[: _LONGEST - _HASH - 1].rstrip('-')}-{digest}"


def config_name(name: str) -> str:
    """Name of the ConfigMap with the job file."""
    return f"{name}-job"
