"""`cluster:` in the job file: resources of a run, and how its job reaches them. Runs anywhere.

Nothing here changes the loss curve.
"""

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


# An upper bound: whether `auto` becomes 0 depends on the size of the data, which is known only later.
_MAX_AUTO_DATA_WORKERS = 2


class ClusterSpec(Section):
    """`cluster:` Resources that a run requests from a Ray cluster."""

    address: str | None = None
    """Ray cluster to connect to (`auto`, `ray://host:10001`); null uses RAY_ADDRESS if set, else starts a local Ray."""

    workers: int = Field(default=1, ge=1)
    """Train workers, one process each. `{min: 2, max: 8}` sets `min_workers` and `workers`: the run shrinks after a
    node is lost and grows again when resources are free."""

    min_workers: int | None = Field(default=None, ge=1)
    """Smallest number of workers to continue with after nodes are lost; null always uses `workers`. The loss curve does
    not change."""

    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    """Logical CPUs reserved for each train worker."""

    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each train worker; 0 trains on the CPU."""

    data_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that read and encode data for the train workers. With 0 each train worker does so itself, which starts
    faster. `auto` is 0 for small data (up to 32 MiB, at most 4 workers, no GPUs, no augmentation), else 2."""

    pass_env: tuple[EnvName, ...] = ()
    """Environment variables passed to the workers, in addition to the launcher's own list (HF_HOME, NCCL_*, ...).
    They are part of Ray's runtime environment, which its dashboard shows to everyone who reaches it."""

    driver: Literal["head", "worker"] = "head"
    """Node that runs the driver of a submitted job. With `worker` the run survives a restart of the head (GCS fault
    tolerance), and its memory is not taken from the head."""

    grace_s: int = Field(default=60, ge=5, le=3600)
    """Seconds between a stop or preemption signal and the kill. The run saves a checkpoint in this time."""

    code: tuple[str, ...] = ()
    """Local files and directories sent with a submitted job, such as task modules or data preparation. They keep their
    relative paths and are on PYTHONPATH."""

    prepare: str | None = Field(default=None, min_length=1)
    """Shell command that a submitted job runs before the driver, such as `python prepare.py` with a script from
    `code`."""

    kubernetes: KubernetesSpec | None = None
    """Pods for `launcher kube`; null if the job does not run on Kubernetes."""

    def logical_cpus(self, at_once: int = 1) -> float:
        """Return the logical CPUs that `at_once` of these jobs reserve when they run at the same time."""
        return at_once * self.workers * self.cpus_per_worker + self.most_data_workers

    @property
    def most_data_workers(self) -> int:
        """Return the largest number of data workers."""
        return _MAX_AUTO_DATA_WORKERS if self.data_workers == "auto" else self.data_workers

    @property
    def demand(self) -> Demand:
        """Resources that the job reserves, for the sizes of pods."""
        return Demand(self.workers, self.cpus_per_worker, self.gpus_per_worker, self.driver == "worker")

    @model_validator(mode="before")
    @classmethod
    def _expand_bounds(cls, values: object) -> object:
        """Expand `workers: {min: 2, max: 8}` to `min_workers` and `workers`."""
        if not isinstance(values, Mapping) or not isinstance(values.get("workers"), Mapping):
            return values
        bounds = values["workers"]
        numbers = [bounds.get("min"), bounds.get("max")]
        # `type` and not isinstance: in Python true is an int.
        if set(bounds) != {"min", "max"} or not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError("workers is neither a number nor of the form {min: 2, max: 8}; write one of them")
        return {**values, "workers": bounds["max"], "min_workers": bounds["min"]}

    @model_validator(mode="after")
    def _check_min_workers(self) -> "ClusterSpec":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, which is more than workers ({self.workers}); lower it, or raise "
                "workers"
            )
        return self

    @model_validator(mode="after")
    def _check_pods(self) -> "ClusterSpec":
        if self.kubernetes is None:
            return self
        # Here and not in KubernetesSpec, because only this section knows both the pods and what they must hold.
        problem = capacity_problem(self.kubernetes.head, self.kubernetes.groups, self.demand)
        if problem is not None:
            raise ValueError(problem)
        # Fault tolerance restores Ray's tables, not the processes that ran on the head.
        if self.kubernetes.fault_tolerance is not None and self.driver == "head":
            raise ValueError(
                "driver is head, so a head restart (kubernetes.fault_tolerance) ends it; write driver: worker"
            )
        return self
