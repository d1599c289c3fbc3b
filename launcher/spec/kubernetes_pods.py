"""The pods of `cluster.kubernetes:`: the head and the groups of workers. Runs anywhere; read `kubernetes.py` next."""

import re
from typing import Literal

from pydantic import Field, model_validator

from launcher.spec.base import Section
from launcher.spec.kubernetes_names import Labels, ObjectName, Resource

# KubeRay turns these limits into Ray's GPUs (IsGPUResourceKey); Ray would not see any other.
_COUNTED_GPU = re.compile(r".*gpu|nvidia\.com/mig-.+")


class Toleration(Section):
    """A taint of nodes that the pods put up with."""

    key: str | None = Field(default=None, min_length=1)
    """Key of the taint; null tolerates every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint's value matters."""
    value: str | None = None
    """Value of the taint, for `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; null means all."""

    @model_validator(mode="after")
    def _value_for_equal(self) -> "Toleration":
        if self.operator == "Equal" and (self.key is None or self.value is None):
            raise ValueError("operator is Equal, which needs a key and a value; give both, or leave the operator out")
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"value is {self.value}, which Exists does not look at; write operator: Equal")
        return self


class _Pod(Section):
    shm_gib: float | None = Field(default=None, gt=0.0)
    """Size of /dev/shm (Ray's objects, NCCL); it counts as memory. Null takes half of the memory."""

    node_selector: Labels = Field(default_factory=dict)
    """Labels that a node must have; also how a kind of GPU is chosen (`nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3`,
    `cloud.google.com/gke-accelerator: nvidia-l4`)."""

    tolerations: tuple[Toleration, ...] = ()
    """Taints to put up with; that of GPU nodes is tolerated anyway by pods with GPUs."""

    priority_class: ObjectName | None = None
    """PriorityClass of these pods; null takes that of all pods."""


class HeadPod(_Pod):
    """The pod that schedules; no worker runs in it, and the driver only with `cluster.driver: head`."""

    cpus: int = Field(default=2, ge=1)
    """CPUs, requested and limited."""

    memory_gib: float = Field(default=8.0, ge=2.0)
    """Memory, requested and limited. Ray needs about 2 GiB, the driver about as much."""


class WorkerGroup(_Pod):
    """Pods that are all alike. Without `pods`, there are as many as `cluster.workers` need."""

    workers_per_pod: int = Field(default=1, ge=1)
    """Train workers in a pod. As many as a node has GPUs lets them talk over NVLink and shared memory."""

    pods: int | None = Field(default=None, ge=1)
    """Pods, always; null derives them from `cluster.workers` (only where there is one group). More than the workers
    need let a sweep run several trials at once."""

    min_pods: int | None = Field(default=None, ge=0)
    """Pods that stay when idle: Ray's autoscaler adds and removes the others."""

    max_pods: int | None = Field(default=None, ge=1)
    """Pods that the autoscaler may have; null derives them from `cluster.workers`."""

    cpus: int | None = Field(default=None, ge=1)
    """CPUs of a pod; null takes those of its workers, one for the data stream, and one for a driver on a worker."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs of a pod; null takes those of its workers."""

    gpu_resource: Resource = "nvidia.com/gpu"
    """Resource that gives a pod GPUs; `amd.com/gpu`, `nvidia.com/mig-1g.10gb`."""

    memory_gib: float | None = Field(default=None, ge=1.0)
    """Memory of a pod; null takes 4 GiB per CPU and 12 more per GPU. Offloading to the CPU needs more."""

    idle_timeout_s: int | None = Field(default=None, ge=0)
    """Seconds without work after which the autoscaler removes a pod; null takes Ray's 60."""

    @property
    def autoscales(self) -> bool:
        """Whether the number of pods changes."""
        return self.min_pods is not None or self.max_pods is not None

    @model_validator(mode="after")
    def _one_way_to_count(self) -> "WorkerGroup":
        if self.pods is not None and self.autoscales:
            raise ValueError("pods fixes the number that min_pods and max_pods let change; keep one or the other")
        if self.min_pods is not None and self.max_pods is not None and self.min_pods > self.max_pods:
            raise ValueError(f"min_pods is {self.min_pods}, above max_pods {self.max_pods}; swap them")
        if self.idle_timeout_s is not None and not self.autoscales:
            raise ValueError("idle_timeout_s is for pods that the autoscaler removes; give min_pods and max_pods too")
        if not _COUNTED_GPU.fullmatch(self.gpu_resource):
            raise ValueError(
                f"gpu_resource is {self.gpu_resource}, which Ray would not count as GPUs; it must end with gpu, or "
                "begin with nvidia.com/mig-"
            )
        return self
