"""`cluster.kubernetes:` how KubeRay runs the job. Nothing here changes the loss curve. Runs anywhere.

A short key stands for what takes a user real work in Kubernetes' own words; `pod_template`, `source` of a volume and
`fault_tolerance` take those words as they are. `launcher kube render` makes manifests of it
(`launcher/submit/kubernetes/render.py`); `kubernetes_pods.py` has the pods and their sizes.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from launcher.spec.base import Section
from launcher.spec.kubernetes_pods import (
    ArchiveUri,
    HeadPod,
    ImageName,
    Interfaces,
    JobName,
    Labels,
    LabelValue,
    MountPath,
    Namespace,
    ObjectName,
    PodTemplate,
    RayVersion,
    RelativePath,
    Resource,
    SecretEntry,
    WorkerGroup,
)

HOME = "/home/launcher"
"""Home directory in the pods: an empty volume, because the image itself is read-only."""

JOB_DIR = "/etc/launcher"
"""Directory of the job file in the pods."""

RESERVED_PATHS = ("/tmp", "/dev/shm", JOB_DIR, HOME)
"""Paths that the launcher mounts in every pod."""

_PART = re.compile(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?")
# By the end of the name: HF_TOKEN holds a secret, HF_TOKEN_PATH only names a file.
_SECRET = re.compile(r"(TOKEN|PASSWORD|SECRET|SECRET_ACCESS_KEY|API_KEY|PRIVATE_KEY)$")
# Set by KubeRay, or by the launcher from other keys.
_MANAGED = {
    "HOME", "RAY_ADDRESS", "RAY_IP", "FQ_RAY_IP", "RAY_PORT", "RAY_CLUSTER_NAME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN",
    "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_external_storage_namespace", "RAY_gcs_storage",
    "RAY_gcs_storage_path", "RAY_enable_autoscaler_v2", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
    "RAY_JOB_STOP_WAIT_TIME_S", "RAY_USE_TLS", "KUBERAY_GEN_RAY_START_CMD",
}  # fmt: skip
# A Workload of Kueue has at most 8 pod sets: the head and these.
_KUEUE_GROUPS = 7
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# These CSI drivers have no ephemeral volumes; their PersistentVolume is created once, with a claim.
_ONLY_CLAIMS = ("s3.csi.aws.com", "efs.csi.aws.com", "fsx.csi.aws.com", "filestore.csi.storage.gke.io")
_READ_ONLY_SOURCES = ("secret", "configMap", "projected", "downwardAPI")
_POD_LOCAL_SOURCES = (*_READ_ONLY_SOURCES, "emptyDir", "ephemeral")


class _Volume(Section):
    path: MountPath
    """Mount path in the pods."""

    read_only: bool = False
    """Mount it so that nothing can be written."""

    @property
    def manifest(self) -> dict[str, dict[str, JsonValue]]:
        """Return the kind of volume with its fields, as Kubernetes writes them."""
        raise NotImplementedError

    @property
    def can_write(self) -> bool:
        """Return whether the pods can write to it."""
        return not self.read_only and next(iter(self.manifest)) not in _READ_ONLY_SOURCES

    @property
    def holds_runs(self) -> bool:
        """Return whether each pod can write to it and read what another pod wrote."""
        # The access mode of a claim is written on the cluster, so a ReadWriteOnce claim passes here.
        return self.can_write and next(iter(self.manifest)) not in _POD_LOCAL_SOURCES


class ClaimVolume(_Volume):
    """An existing PersistentVolumeClaim; on several nodes its access mode must be ReadWriteMany."""

    type: Literal["pvc"]
    claim: ObjectName
    """Name of the claim."""
    sub_path: RelativePath | None = None
    """Directory inside the volume to mount instead of all of it."""

    @property
    def manifest(self) -> dict[str, dict[str, JsonValue]]:
        """Return the claim as Kubernetes writes it."""
        read_only: dict[str, JsonValue] = {"readOnly": True} if self.read_only else {}
        return {"persistentVolumeClaim": {"claimName": self.claim, **read_only}}


class SourceVolume(_Volume):
    """A volume as Kubernetes writes it: `nfs`, `csi`, `hostPath`, `secret`, `configMap`, `emptyDir` and so on.

    Runs may lie on a `hostPath` only where all nodes see the same files (Lustre, a mounted NFS).
    """

    type: Literal["source"]
    source: dict[str, dict[str, JsonValue]]
    """One kind of volume with its fields: `{nfs: {server: nas, path: /exports/team}}`."""

    @property
    def manifest(self) -> dict[str, dict[str, JsonValue]]:
        """Return the source, which is in Kubernetes' words."""
        return self.source

    @model_validator(mode="after")
    def _check_source(self) -> "SourceVolume":
        if len(self.source) != 1:
            raise ValueError(f"source has {len(self.source)} kinds of volumes; give exactly one, such as nfs or csi")
        driver = self.source.get("csi", {}).get("driver")
        if driver in _ONLY_CLAIMS:
            raise ValueError(
                f"source: driver {driver} has no ephemeral volumes; create a PersistentVolume with a claim and mount "
                "that with type: pvc"
            )
        return self


Volume = Annotated[ClaimVolume | SourceVolume, Field(discriminator="type")]


class SecretKey(Section):
    """One value of a Secret; the value itself never enters a manifest."""

    secret: ObjectName
    """Name of the Secret."""
    key: SecretEntry
    """Key in it."""


class Queue(Section):
    """The scheduler that starts all pods of the job together."""

    type: Literal["kueue", "volcano", "yunikorn", "kai", "scheduler-plugins"]
    """Kueue admits the job when its quota has room for all pods; the others gang-schedule the pods."""

    queue: LabelValue | None = None
    """Queue (for kueue the LocalQueue of the namespace); null takes the default of volcano, scheduler-plugins has
    none. Other labels of the scheduler go into `pod_labels`."""

    priority: ObjectName | None = None
    """WorkloadPriorityClass of kueue, which decides about preemption."""

    @model_validator(mode="after")
    def _check_queue(self) -> "Queue":
        if self.queue is None and self.type in ("kueue", "yunikorn", "kai"):
            raise ValueError(f"queue is missing, which {self.type} needs; add the name of the queue")
        if self.queue is not None and self.type == "scheduler-plugins":
            raise ValueError(f"queue is {self.queue}, but scheduler-plugins has no queues; remove it")
        if self.priority is not None and self.type != "kueue":
            raise ValueError(f"priority is {self.priority}, which is for kueue; use priorityClassName in pod_template")
        return self


# Keys that mean something for each type of network.
_FABRIC_KEYS = {
    "ethernet": ("interface",),
    "infiniband": ("per_pod", "resource", "interface"),
    "roce": ("per_pod", "resource", "interface"),
    "efa": ("per_pod",),
    "gcp-rdma": (),
}


class Fabric(Section):
    """The network between the workers: devices of the pods, and the NCCL variables that follow from them.

    Other NCCL variables (NCCL_IB_HCA, NCCL_IB_GID_INDEX, NCCL_IB_TC) go into `env`, which takes precedence.
    """

    type: Literal["ethernet", "infiniband", "roce", "efa", "gcp-rdma"]
    """TCP; InfiniBand or RDMA over Ethernet (with IPC_LOCK, which only helps root: other users need nodes without a
    limit on locked memory); AWS EFA (the image needs libfabric and aws-ofi-nccl); GPUDirect RDMA of GKE nodes with
    eight adapters (A3 Ultra, A4), where a pod must take a whole node."""

    per_pod: int = Field(default=1, ge=1)
    """Devices of a pod; EFA has 4 on p4d, 32 on p5."""

    resource: Resource | None = None
    """Resource of the device plug-in; null takes rdma/ib for infiniband and rdma/roce for roce."""

    interface: Interfaces | None = None
    """Interface of NCCL and gloo (NCCL_SOCKET_IFNAME), `eth0`; null lets them choose."""

    @model_validator(mode="after")
    def _check_keys(self) -> "Fabric":
        for key in ("per_pod", "resource", "interface"):
            value = getattr(self, key)
            # 1 is the default of per_pod: written out it does no harm, and cannot be told from the default.
            if key not in _FABRIC_KEYS[self.type] and value not in (None, 1):
                raise ValueError(f"{key} is {value}, which has no meaning for {self.type}; remove it")
        return self


class KubernetesSpec(Section):
    """The pods, and what KubeRay does with them."""

    image: ImageName
    """Image of all pods: the launcher with its dependencies and the `ray` command (`cluster/Dockerfile`)."""

    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node pulls the image."""

    ray_version: RayVersion = "2.60.0"
    """Ray in the image."""

    name: JobName | None = None
    """Name of the RayJob; null derives it from the run's name."""

    namespace: Namespace | None = None
    """Namespace; null takes that of the kubeconfig's context."""

    service_account: ObjectName | None = None
    """Service account of the pods (a cloud identity for buckets); null takes the default, without a token."""

    pod_labels: Labels = Field(default_factory=dict)
    """Labels of all pods, and of the objects that create them."""

    pod_template: PodTemplate = PodTemplate()
    """Patch of all pods, the submitting one included, in Kubernetes' own words."""

    head: HeadPod = HeadPod()
    """The pod that schedules."""

    groups: dict[str, WorkerGroup] = Field(default_factory=lambda: {"workers": WorkerGroup()}, min_length=1)
    """Pods of the train workers, by the group's name."""

    volumes: dict[str, Volume] = Field(default_factory=dict)
    """Volumes of all Ray pods, by name."""

    image_paths: tuple[MountPath, ...] = ()
    """Directories in the image itself (a model, small data), so that the job may name paths in them."""

    working_dir: ArchiveUri | None = None
    """Archive with code that Ray unpacks as the working directory of driver and workers; null uses the image's."""

    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all Ray pods; no secrets."""

    env_from_secret: dict[str, SecretKey] = Field(default_factory=dict)
    """Environment variables whose values are in Secrets: `HF_TOKEN: {secret: hub, key: token}`."""

    secrets: tuple[ObjectName, ...] = ()
    """Secrets all of whose keys become environment variables."""

    queue: Queue | None = None
    """Scheduler that starts the pods together; null leaves each pod to the default scheduler."""

    spread: Literal["required", "preferred", "none"] = "none"
    """Whether worker pods avoid each other's nodes. Not by default: workers on one node communicate faster."""

    fabric: Fabric | None = None
    """Network between the workers; null lets NCCL choose."""

    fault_tolerance: dict[str, JsonValue] | None = None
    """State of Ray that outlives the head, as KubeRay's `gcsFaultToleranceOptions`: `{redisAddress: redis:6379}`. Needs
    `cluster.driver: worker`."""

    feature_gates: tuple[str, ...] = ()
    """Alpha feature gates that the KubeRay operator runs with, such as GCSFaultToleranceEmbeddedStorage for `{backend:
    rocksdb, storage: {size: 1Gi}}`; a manifest that needs another one is refused."""

    auth: Literal["token", "disabled"] = "token"
    """Whether Ray's dashboard and ports require a token, which KubeRay creates."""

    submission: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"] = "K8sJobMode"
    """How KubeRay starts the driver: from a pod of its own whose log is the run's, by HTTP, from a container in the
    head's pod; InteractiveMode waits for `ray job submit`."""

    retries: int | None = Field(default=None, ge=0)
    """New clusters after a failure, on which the run resumes from its last checkpoint; null means 2, and 0 in
    InteractiveMode, which allows none."""

    # KubeRay's default is 2. A log that breaks off three times would fail the job while training continues.
    submitter_retries: int = Field(default=10, ge=0)
    """How often the submitting pod may lose the log before KubeRay calls the job failed (K8sJobMode)."""

    active_deadline_s: int | None = Field(default=None, ge=1)
    """Seconds after which KubeRay ends the job, queueing included; null never does."""

    pre_running_deadline_s: int | None = Field(default=None, ge=1)
    """Seconds the pods may take to start, queueing included; null waits for ever."""

    ttl_s: int = Field(default=600, ge=0)
    """Seconds the cluster stays after the end, for its dashboard and logs."""

    run_as_user: int = Field(default=1000, ge=0)
    """User and group of the processes, who own what the volumes hold; 0 is root."""

    read_only_root: bool = True
    """Whether the image's own files are read-only; /tmp and the home directory are empty volumes anyway."""

    @property
    def autoscales(self) -> bool:
        """Return whether the cluster may start smaller than the job."""
        return any(group.autoscales for group in self.groups.values())

    @property
    def backoff_limit(self) -> int:
        """Return the number of retries, with the default of the submission mode."""
        # Each retry is a new cluster with a new job id: the run is found again by its name and storage alone.
        default = 0 if self.submission == "InteractiveMode" else 2
        return default if self.retries is None else self.retries

    @model_validator(mode="after")
    def _check_names(self) -> "KubernetesSpec":
        for key, names in {"groups": [*self.groups], "volumes": [*self.volumes]}.items():
            for name in names:
                if not _PART.fullmatch(name):
                    raise ValueError(
                        f"{key} has the name {name!r}; use at most 42 lower-case letters, digits and dashes, with a "
                        "letter or digit at both ends"
                    )
        for name in self.volumes:
            if name.startswith("own-"):
                raise ValueError(f"volumes has the name {name}, a prefix of the launcher's own volumes; rename it")
        # KubeRay labels the head's pod with this group.
        if "headgroup" in self.groups:
            raise ValueError("groups has the name headgroup, which is the head's; rename the group")
        return self

    @model_validator(mode="after")
    def _check_mounts(self) -> "KubernetesSpec":
        names: dict[str, str] = {}
        for name, volume in self.volumes.items():
            if volume.path in RESERVED_PATHS:
                raise ValueError(
                    f"volumes has {name} at {volume.path}, which the launcher mounts itself; choose another path"
                )
            # Only equal paths are wrong: Kubernetes does mount a volume inside another one's path.
            if volume.path in names:
                raise ValueError(
                    f"volumes has {names[volume.path]} and {name} at the same path {volume.path}; move one of them"
                )
            names[volume.path] = name
        return self

    @model_validator(mode="after")
    def _check_environment(self) -> "KubernetesSpec":
        for key, names in {"env": [*self.env], "env_from_secret": [*self.env_from_secret]}.items():
            for name in names:
                if not _ENV_NAME.fullmatch(name):
                    raise ValueError(
                        f"{key} has the name {name!r}; use letters, digits, underscores, and no digit first"
                    )
                if name in _MANAGED:
                    raise ValueError(f"{key} sets {name}, which KubeRay and the launcher set; remove it")
        for name in self.env:
            if _SECRET.search(name):
                raise ValueError(
                    f"env shows the value of {name} to everyone who reads the manifest; put it in a Secret and name "
                    "that in env_from_secret"
                )
            if name in self.env_from_secret:
                raise ValueError(f"env and env_from_secret both set {name}; remove one of them")
        return self

    @model_validator(mode="after")
    def _check_modes(self) -> "KubernetesSpec":
        is_kueue = self.queue is not None and self.queue.type == "kueue"
        if self.submission == "InteractiveMode" and self.retries:
            raise ValueError(
                f"retries is {self.retries}, but InteractiveMode has none; remove it or choose another submission"
            )
        if is_kueue and self.autoscales:
            raise ValueError(
                "queue kueue admits a fixed number of pods; give the groups pods instead of min_pods and max_pods"
            )
        if is_kueue and len(self.groups) > _KUEUE_GROUPS:
            raise ValueError(
                f"groups has {len(self.groups)} names, but kueue admits at most {_KUEUE_GROUPS} of them; join some"
            )
        return self
