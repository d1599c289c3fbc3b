"""What a job may ask of its Kubernetes cluster beside pods: a queue, a network, a memory for the head, secrets.

Runs anywhere; read `kubernetes.py` next.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.spec.base import Section
from launcher.spec.kubernetes_names import HostPort, Interfaces, LabelValue, ObjectName, Resource, SecretEntry


class SecretKey(Section):
    """One value of a Secret; the value itself never enters a manifest."""

    secret: ObjectName
    """Name of the Secret."""
    key: SecretEntry
    """Key in it."""


class Kueue(Section):
    """Kueue admits the job as a whole when its quota has room for all pods."""

    type: Literal["kueue"]
    queue: ObjectName
    """LocalQueue of the namespace."""
    priority: ObjectName | None = None
    """WorkloadPriorityClass: whose workload may preempt whose."""


class Volcano(Section):
    """Volcano starts all pods together (a PodGroup)."""

    type: Literal["volcano"]
    queue: ObjectName | None = None
    """Queue; null takes Volcano's default."""
    topology_tier: int | None = Field(default=None, ge=1)
    """All pods within a network tier of at most this height; null lets them be anywhere."""


class YuniKorn(Section):
    """YuniKorn starts all pods together."""

    type: Literal["yunikorn"]
    queue: LabelValue
    """Queue, `root.team-a`."""


class Kai(Section):
    """The KAI scheduler starts all pods together."""

    type: Literal["kai"]
    queue: ObjectName
    """Queue."""


class SchedulerPlugins(Section):
    """The coscheduling plug-in of scheduler-plugins starts all pods together."""

    type: Literal["scheduler-plugins"]


Queue = Annotated[Kueue | Volcano | YuniKorn | Kai | SchedulerPlugins, Field(discriminator="type")]


class Ethernet(Section):
    """TCP between the pods."""

    type: Literal["ethernet"]
    interface: Interfaces | None = None
    """Interface NCCL and gloo talk over (NCCL_SOCKET_IFNAME), `eth0`; null lets them choose."""


class _Rdma(Section):
    per_pod: int = Field(default=1, ge=1)
    """Devices of a pod."""
    hca: Interfaces | None = None
    """Adapters NCCL may use (NCCL_IB_HCA), `mlx5`; null takes all."""
    interface: Interfaces | None = None
    """Interface for NCCL's first contact (NCCL_SOCKET_IFNAME); null lets it choose."""


class InfiniBand(_Rdma):
    """InfiniBand. The pods get IPC_LOCK, which helps root alone; others need nodes without a limit on locked memory."""

    type: Literal["infiniband"]
    resource: Resource = "rdma/ib"
    """Resource of the device plug-in."""


class Roce(_Rdma):
    """RDMA over Ethernet. The pods get IPC_LOCK, which helps root alone; others need nodes without that limit."""

    type: Literal["roce"]
    resource: Resource = "rdma/roce"
    """Resource of the device plug-in."""
    gid_index: int | None = Field(default=None, ge=0)
    """Entry of the GID table (NCCL_IB_GID_INDEX); null lets NCCL choose."""
    traffic_class: int | None = Field(default=None, ge=0, le=255)
    """Traffic class that the switches know (NCCL_IB_TC); null takes NCCL's."""


class Efa(Section):
    """AWS Elastic Fabric Adapter; the image must hold libfabric and the aws-ofi-nccl plug-in."""

    type: Literal["efa"]
    per_pod: int = Field(default=1, ge=1)
    """Adapters of a pod (vpc.amazonaws.com/efa): 4 on p4d, 32 on p5."""


class GcpRdma(Section):
    """GPUDirect RDMA of GKE nodes with eight adapters (A3 Ultra, A4); pods must take whole nodes."""

    type: Literal["gcp-rdma"]
    networks: tuple[ObjectName, ...] = tuple(f"rdma-{n}" for n in range(8))
    """Network objects of the adapters, in order; the pods see them as eth2, eth3 ..."""


Fabric = Annotated[Ethernet | InfiniBand | Roce | Efa | GcpRdma, Field(discriminator="type")]


class Redis(Section):
    """Ray's state in a Redis outside the cluster."""

    type: Literal["redis"]
    address: HostPort
    """`redis:6379`, or `rediss://...` for TLS."""
    password: SecretKey | None = None
    """Where the password is."""
    username: SecretKey | None = None
    """Where the user name is; null means none."""


class RocksDb(Section):
    """Ray's state on a volume of the head. Alpha in KubeRay 1.7: its operator refuses it without a feature gate."""

    type: Literal["rocksdb"]
    alpha: bool = False
    """Confirms that the operator runs with `--feature-gates=GCSFaultToleranceEmbeddedStorage=true`."""
    size_gib: float = Field(default=1.0, gt=0.0)
    """Size of the volume."""
    storage_class: ObjectName | None = None
    """StorageClass of the volume; null takes the cluster's default."""

    @model_validator(mode="after")
    def _on_purpose(self) -> "RocksDb":
        if not self.alpha:
            raise ValueError(
                "type rocksdb is alpha and refused by a KubeRay operator without the feature gate "
                "GCSFaultToleranceEmbeddedStorage; use redis, or set alpha: true where the gate is on"
            )
        return self


FaultTolerance = Annotated[Redis | RocksDb, Field(discriminator="type")]
