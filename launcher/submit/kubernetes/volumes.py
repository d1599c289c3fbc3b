"""What the pods mount. Pure; runs on the client."""

from launcher.spec.kubernetes import HOME, JOB_DIR, KubernetesSpec
from launcher.spec.kubernetes_services import GcpRdma
from launcher.spec.kubernetes_volumes import (
    ClaimVolume,
    ConfigMapVolume,
    CsiVolume,
    HostPathVolume,
    NfsVolume,
    SecretVolume,
    Volume,
)
from launcher.submit.kubernetes.manifest import Manifest

# Where GKE's installer puts the driver's libraries and NCCL's plug-in on the node, and where images look for them.
_GIB_PATHS = {
    "own-nvidia": ("/home/kubernetes/bin/nvidia", "/usr/local/nvidia"),
    "own-gib": ("/home/kubernetes/bin/gib", "/usr/local/gib"),
}


def pod_volumes(spec: KubernetesSpec, config_map: str, shm_mib: int, worker: bool) -> list[Manifest]:
    """The volumes of a Ray pod: the job file, room to write, and the job's own."""
    return [
        {"name": "own-job", "configMap": {"name": config_map}},
        *scratch_volumes(),
        {"name": "own-shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(shm_mib)}},
        *(_gib_volumes(spec) if worker else []),
        *({"name": name, **_source(volume)} for name, volume in spec.volumes.items()),
    ]


def pod_mounts(spec: KubernetesSpec, worker: bool) -> list[Manifest]:
    """Where `pod_volumes` lie in the Ray container."""
    return [
        {"name": "own-job", "mountPath": JOB_DIR, "readOnly": True},
        *scratch_mounts(),
        {"name": "own-shm", "mountPath": "/dev/shm"},
        *(_gib_mounts(spec) if worker else []),
        *(_mount(name, volume) for name, volume in spec.volumes.items()),
    ]


def scratch_volumes() -> list[Manifest]:
    """Room to write beside a read-only image."""
    return [{"name": "own-tmp", "emptyDir": {}}, {"name": "own-home", "emptyDir": {}}]


def scratch_mounts() -> list[Manifest]:
    """Where `scratch_volumes` lie."""
    return [{"name": "own-tmp", "mountPath": "/tmp"}, {"name": "own-home", "mountPath": HOME}]


def quantity(mib: int) -> str:
    """An amount of memory as Kubernetes writes it."""
    return f"{mib}Mi" if mib % 1024 else f"{mib // 1024}Gi"


def _source(volume: Volume) -> Manifest:
    if isinstance(volume, ClaimVolume):
        return {"persistentVolumeClaim": {"claimName": volume.claim} | _read_only(volume.read_only)}
    if isinstance(volume, CsiVolume):
        source: Manifest = {"driver": volume.driver} | _read_only(volume.read_only)
        if volume.attributes:
            source["volumeAttributes"] = dict(volume.attributes)
        if volume.secret is not None:
            source["nodePublishSecretRef"] = {"name": volume.secret}
        return {"csi": source}
    if isinstance(volume, NfsVolume):
        return {"nfs": {"server": volume.server, "path": volume.share} | _read_only(volume.read_only)}
    if isinstance(volume, SecretVolume):
        return {"secret": {"secretName": volume.secret}}
    if isinstance(volume, ConfigMapVolume):
        return {"configMap": {"name": volume.config_map}}
    assert isinstance(volume, HostPathVolume)
    return {"hostPath": {"path": volume.host_path, "type": "Directory"}}


def _read_only(is_so: bool) -> Manifest:
    return {"readOnly": True} if is_so else {}


def _mount(name: str, volume: Volume) -> Manifest:
    mount: Manifest = {"name": name, "mountPath": volume.path} | _read_only(not volume.holds_runs)
    if isinstance(volume, ClaimVolume) and volume.sub_path is not None:
        mount["subPath"] = volume.sub_path
    return mount


def _gib_volumes(spec: KubernetesSpec) -> list[Manifest]:
    if not isinstance(spec.fabric, GcpRdma):
        return []
    return [{"name": name, "hostPath": {"path": node}} for name, (node, _) in _GIB_PATHS.items()]


def _gib_mounts(spec: KubernetesSpec) -> list[Manifest]:
    if not isinstance(spec.fabric, GcpRdma):
        return []
    return [{"name": name, "mountPath": path, "readOnly": True} for name, (_, path) in _GIB_PATHS.items()]
