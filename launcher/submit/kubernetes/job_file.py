"""What a command is about: a job file checked for the pods, manifests, or the name of an object. Runs on the client.

Paths of a job file must exist in the pods, and runs must lie where all pods see them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from launcher.errors import ClusterError, SpecError
from launcher.spec.base import KeyPath
from launcher.spec.hub import HUB_PREFIX, is_local_path, parse_hub
from launcher.spec.job import JobSpec
from launcher.spec.kubernetes import HOME, KubernetesSpec
from launcher.spec.loader import TaskParamsLookup, apply_override, load_job, read_document
from launcher.spec.messages import Problem, dotted
from launcher.spec.permissions import find_secrets
from launcher.submit.kubernetes.manifest import config_name, is_manifest, job_name, name_of, read_manifests
from launcher.submit.kubernetes.render import Kind

_KINDS: dict[Kind, str] = {"job": "RayJob", "cluster": "RayCluster"}
_MISSING = (
    "cluster.kubernetes is missing; add it with at least an image: `kubernetes: {image: registry/launcher:0.1.0}`"
)
_KEYS = (
    "which everyone who can read the manifest can read; remove it, and give the pods a role (service_account), or the "
    "keys as variables from a Secret (env_from_secret)"
)


@dataclass(frozen=True)
class Target:
    """A RayJob or RayCluster that a command works on.

    Args:
        kind: RayJob or RayCluster.
        name: Name in its metadata.
        namespace: Namespace that the job file or manifest names; None leaves it to the context.
    """

    kind: str
    name: str
    namespace: str | None

    @property
    def config_map(self) -> str:
        """Return the name of the ConfigMap with its job file."""
        return config_name(self.name)


class Misplaced(NamedTuple):
    """A path that the pods would not find, or whose content they would lose."""

    key: KeyPath
    sentence: str


def find_target(source: str, overrides: Sequence[str], kind: Kind) -> Target:
    """Return the object that a command-line argument names.

    Args:
        source: Job file, manifests, or the name of an object.
        overrides: Overrides of a job file.
        kind: Kind of object, where the argument does not say it.

    Raises:
        ClusterError: The manifests hold none or several such objects.
        SpecError: The job file is wrong.
    """
    path = Path(source)
    if path.exists() and is_manifest(path):
        manifests = [manifest for manifest in read_manifests(path) if manifest["kind"] in _KINDS.values()]
        if len(manifests) != 1:
            raise ClusterError(f"{source}: holds {len(manifests)} RayJobs and RayClusters; name one of them instead")
        manifest = manifests[0]
        return Target(manifest["kind"], name_of(manifest), manifest.get("metadata", {}).get("namespace"))
    # An object's name has neither slash nor dot here: a text with one is a path, and a mistyped one is reported as
    # such.
    if path.exists() or re.search(r"[/.]", source):
        job = load_job(path, overrides)
        spec = job.cluster.kubernetes
        return Target(_KINDS[kind], job_name(job), spec.namespace if spec is not None else None)
    return Target(_KINDS[kind], source, None)


def load_for_pods(path: Path, overrides: Sequence[str], params_of: TaskParamsLookup | None) -> JobSpec:
    """Load a job file and check that pods can run it.

    Args:
        path: Path of the job file.
        overrides: Overrides of the form `key.path=value`.
        params_of: Check of the task's parameters; None skips it.

    Raises:
        SpecError: The job file is wrong, or names paths that pods do not have.
    """
    job = load_job(path, overrides, params_of)
    spec = job.cluster.kubernetes
    problems = [Misplaced(("cluster", "kubernetes"), _MISSING)] if spec is None else misplaced(job, spec)
    if problems:
        # The file is read a second time, because a JobSpec does not know on which line a value was.
        document = read_document(path)
        for position, override in enumerate(overrides):
            apply_override(document, override, position)
        raise SpecError(tuple(str(Problem(document.place(key), sentence)) for key, sentence in problems))
    return job


def misplaced(job: JobSpec, spec: KubernetesSpec) -> list[Misplaced]:
    """Return what of a job file cannot be used in pods as it is written; [] when everything can."""
    problems = [
        Misplaced(key, f"{dotted(key)}: {shown} holds {what}, {_KEYS}")
        for key, shown, what in find_secrets(job.model_dump(mode="json"))
    ]
    problems += [*_storage(job, spec), *_code(job, spec), *_scratch(job, spec)]
    for key, location in job.data.places():
        path = parse_hub(location).source if location.startswith(HUB_PREFIX) else location
        if not location.startswith(HUB_PREFIX) or path.startswith(("/", ".", "~")):
            problems += _readable(("data", *key), path, spec)
    for index, location in enumerate(job.data.files_below):
        problems += _readable(("data", "files_below", index), location, spec)
    # A name such as org/model is tried on this machine only to tell a directory from a model of the hub. That directory
    # would not be in the pods.
    if is_local_path(job.model.name) or os.path.isdir(job.model.name):
        problems += _readable(("model", "name"), job.model.name, spec)
    return problems


def _storage(job: JobSpec, spec: KubernetesSpec) -> Iterator[Misplaced]:
    storage = job.output.storage
    if _is_remote(storage):
        return
    roots = [volume.path for volume in spec.volumes.values() if volume.holds_runs]
    if not _is_below(storage.removeprefix("file://"), roots):
        remedy = f"put it below {' or '.join(roots)}" if roots else "mount a shared volume (cluster.kubernetes.volumes)"
        yield Misplaced(
            ("output", "storage"),
            f"output.storage is {storage}, which is local to each pod and lost when the pod ends; {remedy}, or give a "
            "URI",
        )


def _scratch(job: JobSpec, spec: KubernetesSpec) -> Iterator[Misplaced]:
    roots = [*(volume.path for volume in spec.volumes.values() if volume.can_write), "/tmp", HOME]
    places: dict[KeyPath, str | None] = {
        ("parallel", "offload_path"): job.parallel.offload_path,
        # With a writable image the cache may lie in any directory of its user.
        ("data", "cache", "path"): job.data.cache.path if job.data.cache is not None and spec.read_only_root else None,
    }
    for key, path in places.items():
        # A relative path is one of the working directory, in which Ray's jobs can write.
        if path is not None and path.startswith("/") and not _is_below(path, roots):
            yield Misplaced(
                key,
                f"{dotted(key)} is {path}, which the pods cannot write to; mount a disk of the nodes there "
                "(cluster.kubernetes.volumes with a hostPath), or give /tmp, which is on the nodes' disks too",
            )


def _code(job: JobSpec, spec: KubernetesSpec) -> Iterator[Misplaced]:
    if job.cluster.code and spec.working_dir is None and spec.submission != "InteractiveMode":
        yield Misplaced(
            ("cluster", "code"),
            f"cluster.code names {job.cluster.code[0]}, which a manifest cannot carry; build it into the image, or put "
            "it in an archive and name that in cluster.kubernetes.working_dir",
        )


def _readable(key: KeyPath, path: str, spec: KubernetesSpec) -> Iterator[Misplaced]:
    if _is_remote(path):
        return
    path = path.removeprefix("file://")
    if not path.startswith(("/", "~")) and spec.working_dir is not None:
        return  # perhaps in the archive; the driver checks that
    roots = [*(volume.path for volume in spec.volumes.values()), *spec.image_paths]
    if not _is_below(path, roots):
        remedy = f"put it below {' or '.join(roots)}" if roots else "mount a volume (cluster.kubernetes.volumes)"
        yield Misplaced(
            key,
            f"{dotted(key)} is {path}, which is not in the pods; {remedy}, give a URI, or name the directory in "
            "cluster.kubernetes.image_paths if it is in the image",
        )


def _is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def _is_below(path: str, roots: Sequence[str]) -> bool:
    # As text only: the path exists in the pods, not here. normpath, because /runs/../etc is not below /runs.
    resolved = PurePosixPath(os.path.normpath(path))
    return path.startswith("/") and any(resolved.is_relative_to(root) for root in roots)
