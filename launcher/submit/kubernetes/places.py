"""Which paths of a job file mean something in the pods. Pure; runs on the client."""

import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from launcher.spec.base import KeyPath
from launcher.spec.hub import HUB_PREFIX, is_local_path, parse_hub
from launcher.spec.job import JobSpec
from launcher.spec.kubernetes import HOME, KubernetesSpec
from launcher.spec.messages import dotted
from launcher.spec.permissions import find_secrets

_KEYS = (
    "which everyone may read who may read the manifest; take it out, and give the pods a role (service_account), or "
    "the keys as variables from a Secret (env_from_secret)"
)


class Misplaced(NamedTuple):
    """A path that the pods would not find, or lose."""

    key: KeyPath
    sentence: str


def misplaced(job: JobSpec, spec: KubernetesSpec) -> list[Misplaced]:
    """What of a job file cannot be used in pods as it is written; [] when everything can."""
    found = [Misplaced(key, f"{dotted(key)}: {shown} holds {what}, {_KEYS}") for key, shown, what in find_secrets(job)]
    found += [*_storage(job, spec), *_code(job, spec), *_offloaded(job, spec)]
    for split in ("train", "validation", "test"):
        for index, location in enumerate(getattr(job.data, split) or ()):
            path = parse_hub(location).source if location.startswith(HUB_PREFIX) else location
            if not location.startswith(HUB_PREFIX) or path.startswith(("/", ".", "~")):
                found += _readable(("data", split, index), path, spec)
    for index, location in enumerate(job.data.files_below):
        found += _readable(("data", "files_below", index), location, spec)
    if _is_directory(job.model.name):
        found += _readable(("model", "name"), job.model.name, spec)
    return found


def _storage(job: JobSpec, spec: KubernetesSpec) -> Iterator[Misplaced]:
    storage = job.output.storage
    if "://" in storage and not storage.startswith("file://"):
        return
    path = storage.removeprefix("file://")
    if not any(volume.holds_runs and _within(path, volume.path) for volume in spec.volumes.values()):
        roots = [volume.path for volume in spec.volumes.values() if volume.holds_runs]
        remedy = f"put it below {' or '.join(roots)}" if roots else "mount a shared volume (cluster.kubernetes.volumes)"
        yield Misplaced(
            ("output", "storage"),
            f"output.storage is {storage}, which each pod would have for itself and lose with its end; {remedy}, or "
            "give a URI",
        )


def _offloaded(job: JobSpec, spec: KubernetesSpec) -> Iterator[Misplaced]:
    path = job.parallel.offload_path
    if path is None:
        return
    written = [volume.path for volume in spec.volumes.values() if volume.holds_runs]
    if not any(_within(path, root) for root in (*written, "/tmp", HOME)):
        yield Misplaced(
            ("parallel", "offload_path"),
            f"parallel.offload_path is {path}, which the pods cannot write to; mount a disk of the nodes there "
            "(cluster.kubernetes.volumes, type: host_path), or give /tmp, which is on the nodes' disks too",
        )


def _code(job: JobSpec, spec: KubernetesSpec) -> Iterator[Misplaced]:
    if job.cluster.code and spec.working_dir is None and spec.submission != "InteractiveMode":
        yield Misplaced(
            ("cluster", "code"),
            f"cluster.code names {job.cluster.code[0]}, which a manifest cannot carry; build it into the image, or put "
            "it in an archive and name that in cluster.kubernetes.working_dir",
        )


def _readable(key: KeyPath, path: str, spec: KubernetesSpec) -> Iterator[Misplaced]:
    if "://" in path and not path.startswith("file://"):
        return
    path = path.removeprefix("file://")
    if not path.startswith(("/", "~")) and spec.working_dir is not None:
        return  # in the archive, perhaps; the driver will look
    roots = [*(volume.path for volume in spec.volumes.values()), *spec.image_paths]
    if not any(_within(path, root) for root in roots):
        remedy = f"put it below {' or '.join(roots)}" if roots else "mount a volume (cluster.kubernetes.volumes)"
        yield Misplaced(
            key,
            f"{dotted(key)} is {path}, which is not in the pods; {remedy}, give a URI, or name the directory in "
            "cluster.kubernetes.image_paths if it is in the image",
        )


def _within(path: str, root: str) -> bool:
    return path.startswith("/") and PurePosixPath(os.path.normpath(path)).is_relative_to(root)


def _is_directory(name: str) -> bool:
    """Whether a model's name is that of a directory: it can be none on the hub, or there is one here."""
    return is_local_path(name) or (bool(name) and os.path.isdir(name))
