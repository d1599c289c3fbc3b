"""Pods of `cluster.kubernetes:` and their sizes; names that Kubernetes allows. Pure; runs anywhere.

Read `kubernetes.py` next.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue, model_validator

from launcher.spec.base import PATTERN_WORDS, Section

# As the clouds' general-purpose machines have it.
_GIB_PER_CPU = 4.0
# What a CUDA process with its model in transit takes on the host, with a margin.
_GIB_PER_GPU = 12.0
# 25 workers of 2.2 CPUs are 55.00000000000001 in floats, which must not become 56.
_ROUNDING = 1e-9
# KubeRay turns limits of these names into Ray's GPUs (IsGPUResourceKey); Ray would not see any other resource.
_COUNTED_GPU = re.compile(r".*gpu|nvidia\.com/mig-.+")

# Kubernetes' limits for labels: 253 characters for the prefix, 63 for the name and for the value.
_KEY_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_KEY_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def is_label_key(key: str) -> bool:
    """Return whether Kubernetes takes a key of labels and annotations: `name` or `prefix/name`."""
    prefix, slash, name = key.rpartition("/")
    return bool(_KEY_NAME.fullmatch(name) and (not slash or _KEY_PREFIX.fullmatch(prefix)))


def is_label_value(value: str) -> bool:
    """Return whether Kubernetes takes a value of a label."""
    return bool(_VALUE.fullmatch(value))


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not is_label_key(key):
            raise ValueError(f"{key!r} is not a label key; write name or prefix/name, at most 63 letters")
        if not is_label_value(value):
            raise ValueError(
                f"{key} has the value {value!r}, which is not a label value; use at most 63 letters, digits, dashes, "
                "dots and underscores, with a letter or digit at both ends"
            )
    return labels


def _pattern(pattern: str, words: str) -> Any:  # what pydantic's Field returns
    # pydantic matches with Rust's engine, which knows no look-around, and searches: each pattern needs its anchors.
    return Field(pattern=pattern, json_schema_extra={PATTERN_WORDS: words})


Labels = Annotated[dict[str, str], AfterValidator(_check_labels)]
ObjectName = Annotated[
    str,
    _pattern(
        r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$",
        "not the name of a Kubernetes object: lower-case letters, digits, dashes and dots, with a letter or digit at "
        "both ends",
    ),
]
JobName = Annotated[
    str,
    _pattern(
        r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$",
        "not a name KubeRay takes: at most 47 lower-case letters, digits and dashes, with a letter first and no dash "
        "last",
    ),
]
Namespace = Annotated[
    str,
    _pattern(
        r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", "not a namespace: at most 63 lower-case letters, digits and dashes"
    ),
]
Resource = Annotated[
    str,
    _pattern(
        r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$",
        "not a resource of a device plug-in, such as nvidia.com/gpu or rdma/ib",
    ),
]
ImageName = Annotated[
    str,
    _pattern(r"^[a-z0-9][A-Za-z0-9._:/@-]*$", "not the name of an image, such as registry.example.com/launcher:0.1.0"),
]
RayVersion = Annotated[str, _pattern(r"^2\.[0-9]+\.[0-9]+$", "not a release of Ray 2, such as 2.60.0")]
ArchiveUri = Annotated[
    str,
    # No character that a shell acts on: the submitter's shell reads it.
    _pattern(
        r"^(https|s3|gs|azure|abfss)://[A-Za-z0-9._~:/?@=%+-]+\.(zip|tar\.gz|tgz)$",
        "not the URI of a .zip, .tar.gz or .tgz (https, s3, gs, azure, abfss)",
    ),
]
SecretEntry = Annotated[
    str, _pattern(r"^[-._a-zA-Z0-9]+$", "not a key of a Secret: letters, digits, dashes, dots and underscores")
]
LabelValue = Annotated[
    str,
    _pattern(
        r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$",
        "not a label value: at most 63 letters, digits, dashes, dots, underscores",
    ),
]
Interfaces = Annotated[
    str,
    _pattern(
        r"^[\^=]?[A-Za-z0-9_.,:-]+$", "not a list of interfaces as NCCL reads it, such as eth0, eth0,eth1 or ^docker"
    ),
]
RelativePath = Annotated[
    str, _pattern(r"^[A-Za-z0-9_@+-][A-Za-z0-9._@+/-]*$", "not a path inside a volume, such as runs/team-a")
]
MountPath = Annotated[
    str,
    _pattern(
        r"^(/[A-Za-z0-9._@+-]+)+$", "not an absolute path of plain letters, digits and ._@+- without a slash at its end"
    ),
]


# Its fields are not checked here: `submit/kubernetes/rules/pods.py` knows those of Kubernetes.
class PodTemplate(Section):
    """A patch of a pod template, as Kubernetes writes it, merged over what the launcher renders."""

    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    """Labels and annotations."""

    spec: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the pod: `tolerations`, `affinity`, `priorityClassName`, `imagePullSecrets`, `securityContext`,
    `volumes`, `containers` (by name: ray-head, ray-worker). Mappings merge; named list items merge by name, other
    items are added; null removes a key."""


class _Pod(Section):
    shm_gib: float | None = Field(default=None, gt=0.0)
    """Size of /dev/shm (Ray's objects, NCCL); it counts as memory. Null takes half of the memory."""

    node_selector: Labels = Field(default_factory=dict)
    """Labels that a node must have; also selects the GPU model (`nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3`,
    `cloud.google.com/gke-accelerator: nvidia-l4`)."""

    pod_template: PodTemplate = PodTemplate()
    """Whatever else these pods need, in Kubernetes' own words; merged after the template of all pods."""


class HeadPod(_Pod):
    """The pod that schedules. No train worker runs in it, and the driver only with `cluster.driver: head`."""

    cpus: int = Field(default=2, ge=1)
    """CPUs, requested and limited."""

    memory_gib: float = Field(default=8.0, ge=2.0)
    """Memory, requested and limited. Ray needs about 2 GiB, the driver about as much."""


class WorkerGroup(_Pod):
    """Identical pods. Without `pods`, there are as many as `cluster.workers` need."""

    workers_per_pod: int = Field(default=1, ge=1)
    """Train workers in a pod. As many as a node has GPUs lets them use NVLink and shared memory."""

    pods: int | None = Field(default=None, ge=1)
    """Fixed number of pods; null derives it from `cluster.workers` (only where there is one group). More pods than the
    workers need let a sweep run several trials at once."""

    min_pods: int | None = Field(default=None, ge=0)
    """Number of pods that stay when idle: Ray's autoscaler adds and removes the others."""

    max_pods: int | None = Field(default=None, ge=1)
    """Largest number of pods for the autoscaler; null derives it from `cluster.workers`."""

    cpus: int | None = Field(default=None, ge=1)
    """CPUs of a pod; null takes those of its workers, one for the data stream, and one for a driver on a worker."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs of a pod; null takes those of its workers."""

    gpu_resource: Resource = "nvidia.com/gpu"
    """Resource that gives a pod GPUs; `amd.com/gpu`, `nvidia.com/mig-1g.10gb`."""

    memory_gib: float | None = Field(default=None, ge=1.0)
    """Memory of a pod; null takes 4 GiB per CPU and 12 more per GPU. Offloading to the CPU needs more."""

    idle_timeout_s: int | None = Field(default=None, ge=0)
    """Idle seconds after which the autoscaler removes a pod; null takes Ray's 60."""

    @property
    def autoscales(self) -> bool:
        """Return whether the number of pods changes."""
        return self.min_pods is not None or self.max_pods is not None

    @model_validator(mode="after")
    def _check_counts(self) -> "WorkerGroup":
        if self.pods is not None and self.autoscales:
            raise ValueError("pods fixes the number that min_pods and max_pods let change; give only one of the two")
        if self.min_pods is not None and self.max_pods is not None and self.min_pods > self.max_pods:
            raise ValueError(f"min_pods is {self.min_pods}, above max_pods {self.max_pods}; swap them")
        if self.idle_timeout_s is not None and not self.autoscales:
            raise ValueError("idle_timeout_s is for pods that the autoscaler removes; add min_pods and max_pods")
        if not _COUNTED_GPU.fullmatch(self.gpu_resource):
            raise ValueError(
                f"gpu_resource is {self.gpu_resource}, which Ray would not count as GPUs; it must end with gpu, or "
                "begin with nvidia.com/mig-"
            )
        return self


@dataclass(frozen=True)
class Demand:
    """Resources that `cluster:` asks for, wherever it runs."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    driver_on_worker: bool


@dataclass(frozen=True)
class GroupSize:
    """The size of one group of pods, with every default filled in."""

    min_pods: int
    max_pods: int
    cpus: int
    gpus: int
    memory_mib: int
    shm_mib: int


def group_sizes(groups: Mapping[str, WorkerGroup], demand: Demand) -> dict[str, GroupSize]:
    """Return the size of each group of pods, by name."""
    return {name: _group_size(group, demand) for name, group in groups.items()}


def _group_size(group: WorkerGroup, demand: Demand) -> GroupSize:
    # A pod never needs room for more workers than the job has.
    workers = min(group.workers_per_pod, demand.workers)
    worker_cpus = math.ceil(workers * demand.cpus_per_worker - _ROUNDING)
    cpus = group.cpus or worker_cpus + 1 + (1 if demand.driver_on_worker else 0)
    gpus = math.ceil(workers * demand.gpus_per_worker - _ROUNDING) if group.gpus is None else group.gpus
    memory_gib = group.memory_gib or cpus * _GIB_PER_CPU + gpus * _GIB_PER_GPU
    memory_mib = round(memory_gib * 1024)
    needed = group.pods or math.ceil(demand.workers / workers)
    max_pods = group.max_pods or max(needed, group.min_pods or 0)
    return GroupSize(
        min_pods=(group.min_pods or 0) if group.autoscales else max_pods,
        max_pods=max_pods,
        cpus=cpus,
        gpus=gpus,
        memory_mib=memory_mib,
        shm_mib=memory_mib // 2 if group.shm_gib is None else round(group.shm_gib * 1024),
    )


def capacity_problem(head: HeadPod, groups: Mapping[str, WorkerGroup], demand: Demand) -> str | None:
    """Return why the pods cannot hold the job, as a sentence about a key of `cluster:`; None when they can."""
    return (
        # The order matters: without the number of pods, the sizes that the later checks read are wrong.
        _missing_count(groups)
        or _oversized_shm(head, groups, demand)
        or _missing_places(groups, demand)
        or _missing_driver_cpu(groups, demand)
    )


def _missing_count(groups: Mapping[str, WorkerGroup]) -> str | None:
    if len(groups) < 2:
        return None
    for name, group in groups.items():
        if group.pods is None and group.max_pods is None:
            return (
                f"kubernetes.groups.{name} has no number of pods; with several groups each needs pods, or min_pods "
                "and max_pods"
            )
    return None


def _oversized_shm(head: HeadPod, groups: Mapping[str, WorkerGroup], demand: Demand) -> str | None:
    sizes_gib = {
        f"groups.{name}": (size.shm_mib / 1024, size.memory_mib / 1024)
        for name, size in group_sizes(groups, demand).items()
    }
    # Null takes half of the memory, which always fits.
    sizes_gib["head"] = (head.shm_gib or 0.0, head.memory_gib)
    for where, (shm, memory) in sizes_gib.items():
        if shm >= memory:
            return (
                f"kubernetes.{where}.shm_gib is {shm:g}, which is all of the {memory:g} GiB of memory it counts "
                "against; lower it, or raise memory_gib"
            )
    return None


def _missing_places(groups: Mapping[str, WorkerGroup], demand: Demand) -> str | None:
    sizes = group_sizes(groups, demand)
    places = {name: size.max_pods * _workers_in_pod(groups[name], size, demand) for name, size in sizes.items()}
    if sum(places.values()) >= demand.workers:
        return None
    name, size = max(sizes.items(), key=lambda entry: places[entry[0]])
    if places[name] == 0:
        return (
            f"workers need {demand.cpus_per_worker:g} CPUs and {demand.gpus_per_worker:g} GPUs each, but a pod of "
            f"kubernetes.groups.{name} has {size.cpus} and {size.gpus}; give its pods more, or the workers fewer"
        )
    return (
        f"workers is {demand.workers}, but the pods of kubernetes.groups hold {sum(places.values())}; raise pods, "
        "max_pods, cpus or gpus of a group, or ask for fewer workers"
    )


def _workers_in_pod(group: WorkerGroup, size: GroupSize, demand: Demand) -> int:
    # Derived sizes fit by construction. Only the user's own figures have to be divided.
    if group.cpus is None and group.gpus is None:
        return group.workers_per_pod
    by_cpu = size.cpus / demand.cpus_per_worker
    by_gpu = size.gpus / demand.gpus_per_worker if demand.gpus_per_worker else math.inf
    return math.floor(min(by_cpu, by_gpu) + _ROUNDING)


def _missing_driver_cpu(groups: Mapping[str, WorkerGroup], demand: Demand) -> str | None:
    cpus = sum(size.max_pods * size.cpus for size in group_sizes(groups, demand).values())
    # The driver's CPU is entrypointNumCpus; see submit/kubernetes/render.py.
    needed = demand.workers * demand.cpus_per_worker + 1
    if not demand.driver_on_worker or needed <= cpus:
        return None
    return (
        f"workers and a driver among them need {needed:g} CPUs, but the pods of kubernetes.groups have {cpus}; give "
        "the pods more cpus, or write driver: head"
    )
