"""What a command is about: a job file, manifests, or the name of an object. Runs on the client."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ClusterError
from launcher.spec.loader import load_job
from launcher.submit.kubernetes.manifest import is_manifest, name_of, read_manifests
from launcher.submit.kubernetes.names import config_name, job_name
from launcher.submit.kubernetes.objects import Kind

_KINDS: dict[Kind, str] = {"job": "RayJob", "cluster": "RayCluster"}


@dataclass(frozen=True)
class Target:
    """A RayJob or RayCluster.

    Args:
        kind: one of them.
        name: in its metadata.
        namespace: that the job file or manifest names; None leaves it to the context.
    """

    kind: str
    name: str
    namespace: str | None

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap with its job file."""
        return config_name(self.name)


def find_target(source: str, overrides: Sequence[str], kind: Kind) -> Target:
    """The object that a command-line argument means.

    Args:
        source: a job file, manifests, or a name.
        overrides: of a job file.
        kind: what to look for where that is not said.

    Raises:
        ClusterError: it means none.
        SpecError: the job file is wrong.
    """
    path = Path(source)
    if path.exists() and is_manifest(path):
        found = [one for one in read_manifests(path) if one["kind"] in _KINDS.values()]
        if len(found) != 1:
            raise ClusterError(f"{source}: holds {len(found)} RayJobs and RayClusters; name one of them instead")
        return Target(found[0]["kind"], name_of(found[0]), found[0].get("metadata", {}).get("namespace"))
    if path.exists() or re.search(r"[/.]", source):
        job = load_job(path, overrides)
        spec = job.cluster.kubernetes
        return Target(_KINDS[kind], job_name(job), spec.namespace if spec is not None else None)
    return Target(_KINDS[kind], source, None)
