"""`cluster:` in the job file: machines, and how a job gets to them; nothing here changes the curve. Runs anywhere."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.spec.base import PATTERN_WORDS, Section
from launcher.spec.kubernetes import KubernetesSpec
from launcher.spec.kubernetes_pods import Demand, capacity_problem

EnvName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra={PATTERN_WORDS: "not made of letters, digits and underscores, with no digit first"},
    ),
]


_AUTO_DATA_WORKERS = 2


class ClusterSpec(Section):
    """What the run asks of a Ray cluster."""

    address: str | None = None
    """Ray cluster to join (`auto`, `ray://host:10001`); null joins RAY_ADDRESS if set, else starts a local Ray."""

    workers: int = Field(default=1, ge=1)
    """Train workers, one process each; `{min: 2, max: 8}` goes on with fewer of them after a loss, and with more as
    soon as there is room (`min_workers` and `workers`)."""

    min_workers: int | None = Field(default=None, ge=1)
    """Fewest workers to go on with when nodes are lost; null always takes `workers`. The curve does not change."""

    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    """Logical CPUs a train worker reserves."""

    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    """GPUs a train worker reserves; 0 trains on the CPU."""

    data_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that read and encode windows for the train workers; 0 has each train worker do it for itself, which
    starts sooner; `auto` takes 0 for small data (32 MiB, at most 4 workers, no GPUs, no augmentation), else 2."""

    pass_env: tuple[EnvName, ...] = ()
    """Environment variables that travel to the workers beside the launcher's own short list (HF_HOME, NCCL_*, ...)."""

    driver: Literal["head", "worker"] = "head"
    """Node that runs the driver of a submitted job; `worker` lets the run outlive a head that comes back (GCS fault
    tolerance), and keeps its memory off the head."""

    grace_s: int = Field(default=60, ge=5, le=3600)
    """Seconds between a stop or a preemption and the kill, in which the run saves a checkpoint."""

    code: tuple[str, ...] = ()
    """Local files and directories that travel with a submitted job (modules of tasks, data preparation), under the
    same relative paths; they are on PYTHONPATH there."""

    prepare: str | None = Field(default=None, min_length=1)
    """Shell command that the driver of a submitted job runs first, `python prepare.py` with a script of `code`."""

    kubernetes: KubernetesSpec | None = None
    """Pods for `launcher kube`; null where the job does not run on Kubernetes."""

    def logical_cpus(self, at_once: int = 1) -> float:
        """Return the logical CPUs that `at_once` such jobs reserve at the same time."""
        return at_once * self.workers * self.cpus_per_worker + self.most_data_workers

    @property
    def most_data_workers(self) -> int:
        """Return the number of data workers there may be."""
        return _AUTO_DATA_WORKERS if self.data_workers == "auto" else self.data_workers

    @property
    def demand(self) -> Demand:
        """What the job reserves, for the sizes of pods."""
        return Demand(self.workers, self.cpus_per_worker, self.gpus_per_worker, self.driver == "worker")

    @model_validator(mode="before")
    @classmethod
    def _bounds(cls, values: object) -> object:
        """`workers: {min: 2, max: 8}` as the two keys that it stands for."""
        if not isinstance(values, Mapping) or not isinstance(values.get("workers"), Mapping):
            return values
        bounds = values["workers"]
        numbers = [bounds.get("min"), bounds.get("max")]
        if set(bounds) != {"min", "max"} or not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError("workers is neither a number nor of the form {min: 2, max: 8}; write one of them")
        return {**values, "workers": bounds["max"], "min_workers": bounds["min"]}

    @model_validator(mode="after")
    def _fewest_first(self) -> "ClusterSpec":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, and there are at most {self.workers} workers; lower it, or raise "
                "workers"
            )
        return self

    @model_validator(mode="after")
    def _pods_hold_the_job(self) -> "ClusterSpec":
        if self.kubernetes is None:
            return self
        problem = capacity_problem(self.kubernetes.head, self.kubernetes.groups, self.demand)
        if problem is not None:
            raise ValueError(problem)
        if self.kubernetes.fault_tolerance is not None and self.driver == "head":
            raise ValueError(
                "driver is head, which dies with the head kubernetes.fault_tolerance restores; write driver: worker"
            )
        return self
