"""`cluster.kubernetes:` how the job becomes a RayJob of KubeRay. Nothing here changes the curve. Runs anywhere.

`launcher kube render` turns it into manifests (`launcher/submit/kube/`); `kubernetes_sizes.py` says how large pods are.
"""

import re
from typing import Literal

from pydantic import Field, model_validator

from launcher.spec.base import Section
from launcher.spec.kubernetes_names import (
    Annotations,
    ArchiveUri,
    ImageName,
    JobName,
    Labels,
    Namespace,
    ObjectName,
    RayVersion,
)
from launcher.spec.kubernetes_pods import HeadPod, WorkerGroup
from launcher.spec.kubernetes_services import Fabric, FaultTolerance, Queue, SecretKey
from launcher.spec.kubernetes_volumes import MountPath, Volume

HOME = "/home/launcher"
"""Home directory in the pods: an empty volume, as the image's own files are read-only."""

JOB_DIR = "/etc/launcher"
"""Where the pods see the job file."""

RESERVED_PATHS = ("/tmp", "/dev/shm", JOB_DIR, HOME)
"""Mounted by the launcher in every pod."""

_PART = re.compile(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?")
_SECRET = re.compile(r"(TOKEN|PASSWORD|SECRET|SECRET_ACCESS_KEY|API_KEY|PRIVATE_KEY)$")
# Set by KubeRay or by the launcher from other keys.
_MANAGED = {
    "HOME", "RAY_ADDRESS", "RAY_IP", "FQ_RAY_IP", "RAY_PORT", "RAY_CLUSTER_NAME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN",
    "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_external_storage_namespace", "RAY_gcs_storage",
    "RAY_gcs_storage_path", "RAY_enable_autoscaler_v2", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
    "RAY_JOB_STOP_WAIT_TIME_S", "RAY_USE_TLS", "KUBERAY_GEN_RAY_START_CMD",
}  # fmt: skip

# Kueue's Workload has at most 8 pod sets: the head and these.
_KUEUE_GROUPS = 7
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class KubernetesSpec(Section):
    """The pods, and what KubeRay does with them."""

    image: ImageName
    """Image of all pods: the launcher with its dependencies and the `ray` command (`cluster/Dockerfile`)."""

    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node fetches the image."""

    pull_secrets: tuple[ObjectName, ...] = ()
    """Secrets to fetch the image with."""

    ray_version: RayVersion = "2.60.0"
    """Ray in the image."""

    name: JobName | None = None
    """Name of the RayJob; null makes one of the run's name."""

    namespace: Namespace | None = None
    """Namespace; null leaves it to kubectl's context."""

    service_account: ObjectName | None = None
    """Service account of the pods (a cloud identity for buckets); null takes the default, without a token."""

    pod_labels: Labels = Field(default_factory=dict)
    """Labels of all pods, and of the objects they come from."""

    pod_annotations: Annotations = Field(default_factory=dict)
    """Annotations of all pods."""

    head: HeadPod = HeadPod()
    """The pod that schedules."""

    groups: dict[str, WorkerGroup] = Field(default_factory=lambda: {"workers": WorkerGroup()}, min_length=1)
    """Pods of the train workers, by the group's name."""

    volumes: dict[str, Volume] = Field(default_factory=dict)
    """Volumes of all pods, by name."""

    image_paths: tuple[MountPath, ...] = ()
    """Directories that are in the image itself (a model, small data), so that the job may name paths in them."""

    working_dir: ArchiveUri | None = None
    """Archive with code that Ray unpacks as the working directory of driver and workers; null runs the image's."""

    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all pods; no secrets."""

    env_from_secret: dict[str, SecretKey] = Field(default_factory=dict)
    """Environment variables whose values are in Secrets: `HF_TOKEN: {secret: hub, key: token}`."""

    secrets: tuple[ObjectName, ...] = ()
    """Secrets all of whose keys become environment variables."""

    queue: Queue | None = None
    """Who decides when the pods start, all together; null leaves each pod to the default scheduler."""

    priority_class: ObjectName | None = None
    """PriorityClass of all pods."""

    spread: Literal["required", "preferred", "none"] = "none"
    """Whether worker pods avoid each other's nodes. Not by default: workers on one node talk faster."""

    fabric: Fabric | None = None
    """Network between the workers; null lets NCCL find one."""

    fault_tolerance: FaultTolerance | None = None
    """Where Ray keeps its state when the head restarts; needs `cluster.driver: worker`."""

    auth: Literal["token", "disabled"] = "token"
    """Whether Ray's dashboard and ports ask for a token, which KubeRay makes."""

    submission: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"] = "K8sJobMode"
    """How KubeRay starts the driver: by a pod of its own whose log is the run's, by HTTP, by a container beside the
    head; InteractiveMode waits for `ray job submit`."""

    retries: int | None = Field(default=None, ge=0)
    """New clusters after a failure, on which the run goes on from its last checkpoint; null means 2, and 0 where
    InteractiveMode allows none."""

    submitter_retries: int = Field(default=10, ge=0)
    """How often the submitting pod may lose the log before KubeRay calls the job failed (K8sJobMode)."""

    active_deadline_s: int | None = Field(default=None, ge=1)
    """Seconds after which KubeRay ends the job, waiting included; null never does."""

    pre_running_deadline_s: int | None = Field(default=None, ge=1)
    """Seconds the pods may take to start, waiting in a queue included; null waits for ever."""

    ttl_s: int = Field(default=600, ge=0)
    """Seconds the cluster stays after the end, for its dashboard and logs."""

    run_as_user: int = Field(default=1000, ge=0)
    """User and group of the processes, who own what the volumes take; 0 is root."""

    read_only_root: bool = True
    """Whether the image's own files are read-only; /tmp and the home directory are empty volumes anyway."""

    @property
    def autoscales(self) -> bool:
        """Whether the cluster may be smaller than the job at first."""
        return any(group.autoscales for group in self.groups.values())

    @property
    def is_queued_by_kueue(self) -> bool:
        """Whether Kueue admits the job."""
        return self.queue is not None and self.queue.type == "kueue"

    @property
    def backoff_limit(self) -> int:
        """The retries that `retries` stands for."""
        default = 0 if self.submission == "InteractiveMode" else 2
        return default if self.retries is None else self.retries

    @model_validator(mode="after")
    def _names(self) -> "KubernetesSpec":
        for key, names in {"groups": list(self.groups), "volumes": list(self.volumes)}.items():
            for name in names:
                if not _PART.fullmatch(name):
                    raise ValueError(
                        f"{key} has the name {name!r}; use at most 42 lower-case letters, digits and dashes, with a "
                        "letter or digit at both ends"
                    )
        for name in self.volumes:
            if name.startswith("own-"):
                raise ValueError(f"volumes has the name {name}, of the kind the launcher's own have; choose another")
        if "headgroup" in self.groups:
            raise ValueError("groups has the name headgroup, which is the head's; give the group another")
        return self

    @model_validator(mode="after")
    def _mounts(self) -> "KubernetesSpec":
        seen: dict[str, str] = {}
        for name, volume in self.volumes.items():
            if volume.path in RESERVED_PATHS:
                raise ValueError(
                    f"volumes has {name} at {volume.path}, which the launcher mounts itself; choose another path"
                )
            if volume.path in seen:
                raise ValueError(
                    f"volumes has {seen[volume.path]} and {name} at the same path {volume.path}; move one of them"
                )
            seen[volume.path] = name
        return self

    @model_validator(mode="after")
    def _environment(self) -> "KubernetesSpec":
        for key, names in {"env": list(self.env), "env_from_secret": list(self.env_from_secret)}.items():
            for name in names:
                if not _ENV_NAME.fullmatch(name):
                    raise ValueError(
                        f"{key} has the name {name!r}; use letters, digits, underscores, and no digit first"
                    )
                if name in _MANAGED:
                    raise ValueError(f"{key} sets {name}, which KubeRay and the launcher set; leave it out")
        for name in self.env:
            if _SECRET.search(name):
                raise ValueError(
                    f"env shows the value of {name} to everyone who reads the manifest; put it in a Secret and name "
                    "that in env_from_secret"
                )
            if name in self.env_from_secret:
                raise ValueError(f"env and env_from_secret both set {name}; keep one of them")
        return self

    @model_validator(mode="after")
    def _modes(self) -> "KubernetesSpec":
        if self.submission == "InteractiveMode" and self.retries:
            raise ValueError(
                f"retries is {self.retries}, but InteractiveMode has none; leave it out or choose another submission"
            )
        if self.is_queued_by_kueue and self.autoscales:
            raise ValueError(
                "queue kueue admits a fixed number of pods; give the groups pods instead of min_pods and max_pods"
            )
        if self.is_queued_by_kueue and len(self.groups) > _KUEUE_GROUPS:
            raise ValueError(
                f"groups has {len(self.groups)} names, but kueue admits at most {_KUEUE_GROUPS} of them; join some"
            )
        return self
