"""How many pods a job has and how large they are: pure arithmetic on `cluster:`. Runs anywhere."""

import math
from dataclasses import dataclass

from launcher.spec.kubernetes import KubernetesSpec
from launcher.spec.kubernetes_pods import WorkerGroup

_GIB_PER_CPU = 4.0  # of the general-purpose machines of the clouds
_GIB_PER_GPU = 12.0  # what a CUDA process with a model in flight takes on the host, with room
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Demand:
    """What `cluster:` asks for, wherever it runs."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    driver_on_worker: bool


@dataclass(frozen=True)
class GroupSize:
    """One group of pods, with every default filled in."""

    min_pods: int
    max_pods: int
    cpus: int
    gpus: int
    memory_mib: int
    shm_mib: int


def group_sizes(spec: KubernetesSpec, demand: Demand) -> dict[str, GroupSize]:
    """The size of each group of pods, by name."""
    return {name: _size(group, demand) for name, group in spec.groups.items()}


def _size(group: WorkerGroup, demand: Demand) -> GroupSize:
    workers = min(group.workers_per_pod, demand.workers)
    own = math.ceil(workers * demand.cpus_per_worker - _ROUNDING)
    cpus = group.cpus or own + 1 + (1 if demand.driver_on_worker else 0)
    gpus = math.ceil(workers * demand.gpus_per_worker - _ROUNDING) if group.gpus is None else group.gpus
    memory_gib = group.memory_gib or cpus * _GIB_PER_CPU + gpus * _GIB_PER_GPU
    needed = group.pods or math.ceil(demand.workers / workers)
    most = group.max_pods or max(needed, group.min_pods or 0)
    least = (group.min_pods or 0) if group.autoscales else most
    memory_mib = round(memory_gib * 1024)
    shm_mib = memory_mib // 2 if group.shm_gib is None else round(group.shm_gib * 1024)
    return GroupSize(least, most, cpus, gpus, memory_mib, shm_mib)


def room_problem(spec: KubernetesSpec, demand: Demand) -> str | None:
    """Why the pods cannot hold the job, as a sentence about a key of `cluster:`; None when they can."""
    return (
        _uncounted(spec) or _too_much_shm(spec, demand) or _too_small(spec, demand) or _no_room_to_drive(spec, demand)
    )


def _uncounted(spec: KubernetesSpec) -> str | None:
    if len(spec.groups) < 2:
        return None
    for name, group in spec.groups.items():
        if group.pods is None and group.max_pods is None:
            return (
                f"kubernetes.groups.{name} does not say how many pods it has; with several groups each needs pods, or "
                "min_pods and max_pods"
            )
    return None


def _too_much_shm(spec: KubernetesSpec, demand: Demand) -> str | None:
    sizes = {f"groups.{name}": size for name, size in group_sizes(spec, demand).items()}
    pairs = {where: (size.shm_mib / 1024, size.memory_mib / 1024) for where, size in sizes.items()}
    pairs["head"] = (spec.head.shm_gib or 0.0, spec.head.memory_gib)
    for where, (shm, memory) in pairs.items():
        if shm >= memory:
            return (
                f"kubernetes.{where}.shm_gib is {shm:g}, which is all of the {memory:g} GiB of memory it counts "
                "against; give less of it or more memory_gib"
            )
    return None


def _too_small(spec: KubernetesSpec, demand: Demand) -> str | None:
    sizes = group_sizes(spec, demand)
    places = {name: size.max_pods * _workers_in_a_pod(spec.groups[name], size, demand) for name, size in sizes.items()}
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


def _workers_in_a_pod(group: WorkerGroup, size: GroupSize, demand: Demand) -> int:
    if group.cpus is None and group.gpus is None:
        return group.workers_per_pod
    by_cpu = size.cpus / demand.cpus_per_worker
    by_gpu = size.gpus / demand.gpus_per_worker if demand.gpus_per_worker else math.inf
    return math.floor(min(by_cpu, by_gpu) + _ROUNDING)


def _no_room_to_drive(spec: KubernetesSpec, demand: Demand) -> str | None:
    cpus = sum(size.max_pods * size.cpus for size in group_sizes(spec, demand).values())
    wanted = demand.workers * demand.cpus_per_worker + 1  # what the driver asks for; see objects.py
    if not demand.driver_on_worker or wanted <= cpus:
        return None
    return (
        f"workers and a driver among them need {wanted:g} CPUs, but the pods of kubernetes.groups have {cpus}; give "
        "the pods more cpus, or write driver: head"
    )
