"""The environment of the pods: how they stop, who they are, and which network NCCL takes. Pure; runs on the client."""

from launcher.spec.cluster import ClusterSpec
from launcher.spec.kubernetes import HOME, KubernetesSpec
from launcher.spec.kubernetes_services import Efa, Ethernet, Fabric, GcpRdma, InfiniBand, Roce
from launcher.submit.kubernetes.manifest import Manifest

# Ray tells its workers about a drained node within some 5 s; the rest is for the last step before the checkpoint.
_NOTICE_S = 30
_TEARDOWN_S = 30
_START_TIMEOUT_S = 3600


def drain_s(cluster: ClusterSpec) -> int:
    """Seconds that Ray keeps a node which was told to stop: longer than the run needs for its checkpoint."""
    return cluster.grace_s + _NOTICE_S


def termination_s(cluster: ClusterSpec) -> int:
    """Seconds that Kubernetes waits before it kills a pod: longer than Ray needs to drain and stop."""
    return drain_s(cluster) + _TEARDOWN_S


def pod_env(cluster: ClusterSpec, spec: KubernetesSpec, gpus: int, fabric: Fabric | None) -> list[Manifest]:
    """Environment variables of a Ray container; the job file's own come last and win."""
    values = {
        "HOME": HOME,
        # Some libraries ask for a name, and the image need not know that of the user it runs as.
        "USER": "launcher",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_s(cluster)),
    }
    if spec.auth == "disabled":
        values["RAY_AUTH_MODE"] = "disabled"
    if gpus == 0:
        # Without it the NVIDIA runtime shows all GPUs of the node to a pod that asked for none.
        values["NVIDIA_VISIBLE_DEVICES"] = "void"
    if fabric is not None:
        values |= fabric_env(fabric)
    values |= spec.env
    return _named(values) + _from_secrets(spec)


def head_env(cluster: ClusterSpec, spec: KubernetesSpec) -> list[Manifest]:
    """As `pod_env`, with what the head alone must know."""
    env = pod_env(cluster, spec, 0, None)
    if "RAY_JOB_START_TIMEOUT_SECONDS" in spec.env or not (spec.autoscales or cluster.driver == "worker"):
        return env
    # Ray fails a job whose driver found no room within 15 minutes; nodes may take longer to come.
    timeout = str(spec.pre_running_deadline_s or _START_TIMEOUT_S)
    return [*env, {"name": "RAY_JOB_START_TIMEOUT_SECONDS", "value": timeout}]


def submitter_env(spec: KubernetesSpec) -> list[Manifest]:
    """Of the pod that submits the job and follows its log."""
    values = {"HOME": HOME, "USER": "launcher"}
    if spec.auth == "disabled":
        values["RAY_AUTH_MODE"] = "disabled"
    return _named(values)


def _named(values: dict[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _from_secrets(spec: KubernetesSpec) -> list[Manifest]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": source.secret, "key": source.key}}}
        for name, source in spec.env_from_secret.items()
    ]


def fabric_env(fabric: Fabric) -> dict[str, str]:
    """NCCL's variables for a network; see docs.nvidia.com/deeplearning/nccl/user-guide, and the clouds' own pages."""
    if isinstance(fabric, Ethernet):
        values = {"NCCL_IB_DISABLE": "1"}
        if fabric.interface is not None:
            values["NCCL_SOCKET_IFNAME"] = fabric.interface
            if fabric.interface[0] not in "^=":  # NCCL's signs for "all but" and "exactly", which gloo does not know
                values["GLOO_SOCKET_IFNAME"] = fabric.interface
        return values
    if isinstance(fabric, Efa):
        return {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"}
    if isinstance(fabric, GcpRdma):
        return _gib_env()
    return _rdma_env(fabric)


def _rdma_env(fabric: InfiniBand | Roce) -> dict[str, str]:
    values = {"NCCL_IB_DISABLE": "0"}
    if fabric.hca is not None:
        values["NCCL_IB_HCA"] = fabric.hca
    if fabric.interface is not None:
        values["NCCL_SOCKET_IFNAME"] = fabric.interface
    if isinstance(fabric, Roce) and fabric.gid_index is not None:
        values["NCCL_IB_GID_INDEX"] = str(fabric.gid_index)
    if isinstance(fabric, Roce) and fabric.traffic_class is not None:
        values["NCCL_IB_TC"] = str(fabric.traffic_class)
    return values


def _gib_env() -> dict[str, str]:
    # cloud.google.com/ai-hypercomputer/docs: what GKE's manifests for Ray on RDMA nodes set.
    return {
        "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
        "NCCL_NET": "gIB",
        "NCCL_CROSS_NIC": "0",
        "NCCL_IB_QPS_PER_CONNECTION": "4",
        "NCCL_IB_TC": "52",
        "NCCL_IB_FIFO_TC": "84",
        "NCCL_IB_ADAPTIVE_ROUTING": "1",
    }
