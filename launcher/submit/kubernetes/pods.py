"""The pod templates of head, workers and submitter: environment, volumes, devices, security. Pure; on the client.

`render.py` puts them into the objects. A `pod_template` of the job file is merged over each of them at the end.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.spec.cluster import ClusterSpec
from launcher.spec.kubernetes import HOME, JOB_DIR, ClaimVolume, Fabric, KubernetesSpec, Volume
from launcher.spec.kubernetes_pods import GroupSize, HeadPod, PodTemplate, WorkerGroup
from launcher.submit.kubernetes.manifest import Manifest, config_name, quantity

METRICS_PORT = 8080
"""Port at which KubeRay exposes the metrics of each Ray node."""

_GCSFUSE = "gcsfuse.csi.storage.gke.io"
# The head's ports, by the names that KubeRay's service looks up.
_HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
# Ray notifies workers of a draining node within about 5 s; the rest is for the last step before the checkpoint.
_NOTICE_S = 30
_TEARDOWN_S = 30
_START_TIMEOUT_S = 3600
_RDMA_RESOURCES = {"infiniband": "rdma/ib", "roce": "rdma/roce"}
# Variables that GKE's manifests for Ray on RDMA nodes set (cloud.google.com/ai-hypercomputer/docs).
_GIB_ENV = {
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
    "NCCL_NET": "gIB",
    "NCCL_CROSS_NIC": "0",
    "NCCL_IB_QPS_PER_CONNECTION": "4",
    "NCCL_IB_TC": "52",
    "NCCL_IB_FIFO_TC": "84",
    "NCCL_IB_ADAPTIVE_ROUTING": "1",
}
# Where GKE's installer puts the driver's libraries and NCCL's plug-in on the node, and where images expect them.
_GIB_PATHS = {
    "own-nvidia": ("/home/kubernetes/bin/nvidia", "/usr/local/nvidia"),
    "own-gib": ("/home/kubernetes/bin/gib", "/usr/local/gib"),
}
_GIB_NETWORKS = tuple(f"rdma-{number}" for number in range(8))
# Empty volumes make a read-only image usable.
_SCRATCH = {"own-tmp": "/tmp", "own-home": HOME}
# The field that identifies an item of a list, as in Kubernetes' own strategic merge patch.
_MERGE_KEYS = {"volumeMounts": "mountPath", "ports": "containerPort"}


@dataclass(frozen=True)
class PodTemplates:
    """The pod templates of a run.

    Args:
        name: Name of the RayJob or RayCluster.
        cluster: Section `cluster` of the job.
        spec: Section `cluster.kubernetes` of the job.
    """

    name: str
    cluster: ClusterSpec
    spec: KubernetesSpec

    def head(self) -> Manifest:
        """Return the head's template."""
        spec, head = self.spec, self.spec.head
        memory_mib = round(head.memory_gib * 1024)
        shm_mib = memory_mib // 2 if head.shm_gib is None else round(head.shm_gib * 1024)
        container = {
            "name": "ray-head",
            **self._image(),
            "ports": [{"name": name, "containerPort": port} for name, port in _HEAD_PORTS.items()],
            "env": self._head_env(),
            **self._env_from(),
            "resources": _resources(head.cpus, memory_mib, {}),
            "securityContext": self._container_security(),
            "volumeMounts": self._mounts(is_worker=False),
        }
        # The autoscaler runs in the head's pod and talks to the API server.
        pod = self._pod(head, needs_token=spec.autoscales)
        pod |= {"containers": [container], "volumes": self._volumes(shm_mib, is_worker=False)}
        if spec.submission == "SidecarMode":
            pod["restartPolicy"] = "Never"
        return self._template(pod, {}, head.pod_template)

    def worker(self, group: WorkerGroup, size: GroupSize) -> Manifest:
        """Return the template of one group's workers."""
        fabric = self.spec.fabric
        container = {
            "name": "ray-worker",
            **self._image(),
            "env": self._env(size.gpus, fabric),
            **self._env_from(),
            "resources": _resources(size.cpus, size.memory_mib, _devices(group, size, fabric)),
            "securityContext": self._container_security(
                ("IPC_LOCK",) if fabric is not None and fabric.type in _RDMA_RESOURCES else ()
            ),
            "volumeMounts": self._mounts(is_worker=True),
        }
        pod = self._pod(group, needs_token=False)
        if size.gpus:
            # Clouds keep pods without GPUs away from GPU nodes by this taint.
            pod["tolerations"] = [{"key": group.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
        pod |= self._affinity()
        pod |= {"containers": [container], "volumes": self._volumes(size.shm_mib, is_worker=True)}
        annotations = _interfaces() if fabric is not None and fabric.type == "gcp-rdma" else {}
        return self._template(pod, annotations, group.pod_template)

    def submitter(self) -> Manifest:
        """Return the template of the pod that submits the job; KubeRay adds the command and Ray's token."""
        values = {"HOME": HOME, "USER": "launcher"}
        if self.spec.auth == "disabled":
            values["RAY_AUTH_MODE"] = "disabled"
        resources = _resources(1, 1024, {})
        resources["requests"] = {**resources["requests"], "cpu": "500m"}  # it mostly waits
        container = {
            "name": "ray-job-submitter",
            **self._image(),
            "env": [{"name": name, "value": value} for name, value in values.items()],
            "resources": resources,
            "securityContext": self._container_security(),
            "volumeMounts": [{"name": name, "mountPath": path} for name, path in _SCRATCH.items()],
        }
        pod = {
            **self._identity(needs_token=False),
            "restartPolicy": "Never",
            "securityContext": self._pod_security(),
            "containers": [container],
            "volumes": [{"name": name, "emptyDir": {}} for name in _SCRATCH],
        }
        return _patched({"metadata": {"labels": self.labels()}, "spec": pod}, self.spec.pod_template)

    def labels(self) -> dict[str, str]:
        """Return the labels of every object and pod of the run."""
        labels = {"app.kubernetes.io/instance": self.name, "app.kubernetes.io/part-of": "launcher"}
        return labels | dict(self.spec.pod_labels)

    def autoscaler_security(self) -> Manifest:
        """Return the security context of the autoscaler's container in the head's pod; it has no empty volumes."""
        return {**self._container_security(), "readOnlyRootFilesystem": False}

    def _template(self, pod: Manifest, annotations: dict[str, str], patch: PodTemplate) -> Manifest:
        watched = {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(METRICS_PORT),
            "prometheus.io/path": "/metrics",
            # An autoscaler of nodes must not move a run's pod to save money: the run would restart from a checkpoint.
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
        if any(volume.manifest.get("csi", {}).get("driver") == _GCSFUSE for volume in self.spec.volumes.values()):
            watched["gke-gcsfuse/volumes"] = "true"
        template = {"metadata": {"labels": self.labels(), "annotations": watched | annotations}, "spec": pod}
        return _patched(_patched(template, self.spec.pod_template), patch)

    def _pod(self, pod: HeadPod | WorkerGroup, needs_token: bool) -> Manifest:
        # A pod gets longer than Ray needs to drain its node and stop.
        body: Manifest = {
            **self._identity(needs_token),
            "terminationGracePeriodSeconds": self._drain_s() + _TEARDOWN_S,
            "securityContext": self._pod_security(),
        }
        return body | ({"nodeSelector": dict(pod.node_selector)} if pod.node_selector else {})

    def _drain_s(self) -> int:
        """Return the seconds that Ray keeps a draining node: longer than the run needs for its checkpoint."""
        return self.cluster.grace_s + _NOTICE_S

    def _identity(self, needs_token: bool) -> Manifest:
        body: Manifest = {}
        if self.spec.service_account is not None:
            body["serviceAccountName"] = self.spec.service_account
        # Cloud roles for buckets (IRSA, GKE's Workload Identity) bring tokens of their own.
        if not needs_token:
            body["automountServiceAccountToken"] = False
        return body

    def _image(self) -> Manifest:
        return {"image": self.spec.image, "imagePullPolicy": self.spec.pull_policy}

    def _env(self, gpus: int, fabric: Fabric | None) -> list[Manifest]:
        values = {
            "HOME": HOME,
            # Some libraries look up a user name, and the image need not know the user it runs as.
            "USER": "launcher",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self._drain_s()),
        }
        if self.spec.auth == "disabled":
            values["RAY_AUTH_MODE"] = "disabled"
        if gpus == 0:
            # Without it the NVIDIA runtime shows all GPUs of the node to a pod that requested none.
            values["NVIDIA_VISIBLE_DEVICES"] = "void"
        if fabric is not None:
            values |= fabric_env(fabric)
        values |= self.spec.env  # the job file's own variables take precedence
        secrets = self.spec.env_from_secret.items()
        return [
            *({"name": name, "value": value} for name, value in values.items()),
            *({"name": name, "valueFrom": {"secretKeyRef": {"name": s.secret, "key": s.key}}} for name, s in secrets),
        ]

    def _head_env(self) -> list[Manifest]:
        spec = self.spec
        env = self._env(0, None)
        if "RAY_JOB_START_TIMEOUT_SECONDS" in spec.env or not (spec.autoscales or self.cluster.driver == "worker"):
            return env
        # Ray fails a job whose driver found no place within 15 minutes; nodes may take longer to start.
        timeout = str(spec.pre_running_deadline_s or _START_TIMEOUT_S)
        return [*env, {"name": "RAY_JOB_START_TIMEOUT_SECONDS", "value": timeout}]

    def _env_from(self) -> Manifest:
        return {"envFrom": [{"secretRef": {"name": name}} for name in self.spec.secrets]} if self.spec.secrets else {}

    def _volumes(self, shm_mib: int, is_worker: bool) -> list[Manifest]:
        return [
            {"name": "own-job", "configMap": {"name": config_name(self.name)}},
            *({"name": name, "emptyDir": {}} for name in _SCRATCH),
            {"name": "own-shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(shm_mib)}},
            *({"name": name, "hostPath": {"path": node}} for name, (node, _) in self._gib_paths(is_worker).items()),
            *({"name": name, **volume.manifest} for name, volume in self.spec.volumes.items()),
        ]

    def _mounts(self, is_worker: bool) -> list[Manifest]:
        gib = self._gib_paths(is_worker).items()
        return [
            {"name": "own-job", "mountPath": JOB_DIR, "readOnly": True},
            *({"name": name, "mountPath": path} for name, path in _SCRATCH.items()),
            {"name": "own-shm", "mountPath": "/dev/shm"},
            *({"name": name, "mountPath": path, "readOnly": True} for name, (_, path) in gib),
            *(_mount(name, volume) for name, volume in self.spec.volumes.items()),
        ]

    def _gib_paths(self, is_worker: bool) -> Mapping[str, tuple[str, str]]:
        fabric = self.spec.fabric
        return _GIB_PATHS if is_worker and fabric is not None and fabric.type == "gcp-rdma" else {}

    def _pod_security(self) -> Manifest:
        user = self.spec.run_as_user
        owner = {"runAsNonRoot": True, "runAsUser": user, "runAsGroup": user, "fsGroup": user}
        return {
            **(owner if user else {"runAsUser": 0}),
            **({"fsGroupChangePolicy": "OnRootMismatch"} if user else {}),
            "seccompProfile": {"type": "RuntimeDefault"},
        }

    def _container_security(self, capabilities: tuple[str, ...] = ()) -> Manifest:
        return {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": self.spec.read_only_root,
            "capabilities": {"drop": ["ALL"]} | ({"add": list(capabilities)} if capabilities else {}),
        }

    def _affinity(self) -> Manifest:
        if self.spec.spread == "none":
            return {}
        labels = {"app.kubernetes.io/instance": self.name, "ray.io/node-type": "worker"}
        term: Manifest = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
        if self.spec.spread == "required":
            rule = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
        else:
            rule = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
        return {"affinity": {"podAntiAffinity": rule}}


def fabric_env(fabric: Fabric) -> dict[str, str]:
    """Return NCCL's variables for a network, as docs.nvidia.com/deeplearning/nccl and the clouds document them."""
    if fabric.type == "efa":
        return {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"}
    if fabric.type == "gcp-rdma":
        return dict(_GIB_ENV)
    values = {"NCCL_IB_DISABLE": "1" if fabric.type == "ethernet" else "0"}
    if fabric.interface is not None:
        values["NCCL_SOCKET_IFNAME"] = fabric.interface
        # gloo does not know NCCL's signs for "all but" (^) and "exactly" (=).
        if fabric.type == "ethernet" and fabric.interface[0] not in "^=":
            values["GLOO_SOCKET_IFNAME"] = fabric.interface
    return values


def _devices(group: WorkerGroup, size: GroupSize, fabric: Fabric | None) -> dict[str, int]:
    devices = {group.gpu_resource: size.gpus} if size.gpus else {}
    if fabric is not None and fabric.type in _RDMA_RESOURCES:
        devices[fabric.resource or _RDMA_RESOURCES[fabric.type]] = fabric.per_pod
    elif fabric is not None and fabric.type == "efa":
        devices["vpc.amazonaws.com/efa"] = fabric.per_pod
    return devices


def _resources(cpus: int, memory_mib: int, devices: dict[str, int]) -> Manifest:
    """Return equal requests and limits, which makes the pod the last to be evicted."""
    counts = {name: str(count) for name, count in devices.items()}
    limits = {"cpu": str(cpus), "memory": quantity(memory_mib), **counts}
    return {"requests": dict(limits), "limits": limits}


def _mount(name: str, volume: Volume) -> Manifest:
    mount: Manifest = {"name": name, "mountPath": volume.path} | ({} if volume.can_write else {"readOnly": True})
    if isinstance(volume, ClaimVolume) and volume.sub_path is not None:
        mount["subPath"] = volume.sub_path
    return mount


def _interfaces() -> dict[str, str]:
    """Return GKE's annotations for the adapters, which the pods see as eth2, eth3, ..."""
    first = {"interfaceName": "eth0", "network": "default"}
    others = [{"interfaceName": f"eth{n}", "network": network} for n, network in enumerate(_GIB_NETWORKS, start=2)]
    return {"networking.gke.io/default-interface": "eth0", "networking.gke.io/interfaces": json.dumps([first, *others])}


def _patched(template: Manifest, patch: PodTemplate) -> Manifest:
    sections: Manifest = {name: part for name, part in patch.model_dump().items() if part}
    patched: Manifest = _merged(template, sections, "")
    return patched


def _merged(value: Any, patch: Any, key: str) -> Any:  # any parts of a manifest
    """Return a part of a manifest with a patch: mappings merge, list items merge by name or are added, null removes."""
    if isinstance(value, dict) and isinstance(patch, dict):
        merged = {name: _merged(value.get(name), patch[name], name) for name in patch}
        return {name: part for name, part in {**value, **merged}.items() if part is not None}
    if not isinstance(value, list) or not isinstance(patch, list):
        return copy.deepcopy(patch)
    items = list(value)
    merge_key = _MERGE_KEYS.get(key, "name")
    for item in patch:
        name = item.get(merge_key) if isinstance(item, dict) else None
        index = next((n for n, other in enumerate(items) if name is not None and other.get(merge_key) == name), None)
        if index is None:
            items.append(copy.deepcopy(item))
        else:
            items[index] = _merged(items[index], item, "")
    return items
