"""The pod templates of head, workers and submitter. Pure; runs on the client.

What goes into them: `submit/kubernetes/env.py`, `submit/kubernetes/volumes.py`; what comes out is put into objects by
`submit/kubernetes/objects.py`.
"""

import json
from dataclasses import dataclass

from launcher.spec.cluster import ClusterSpec
from launcher.spec.kubernetes import KubernetesSpec
from launcher.spec.kubernetes_pods import HeadPod, Toleration, WorkerGroup
from launcher.spec.kubernetes_services import Efa, GcpRdma, InfiniBand, Roce
from launcher.spec.kubernetes_sizes import GroupSize
from launcher.spec.kubernetes_volumes import CsiVolume
from launcher.submit.kubernetes import env, volumes
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.names import config_name

METRICS_PORT = 8080
"""Where KubeRay lets each node of Ray tell its metrics."""

_GCSFUSE = "gcsfuse.csi.storage.gke.io"
# The head's ports by the names KubeRay's service knows them by.
_HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


@dataclass(frozen=True)
class Pods:
    """What all pods of a run are made of.

    Args:
        name: of the RayJob or RayCluster.
        cluster: the job's `cluster:`.
        spec: its `kubernetes:`.
    """

    name: str
    cluster: ClusterSpec
    spec: KubernetesSpec

    def head(self) -> Manifest:
        """The head's template."""
        spec, head = self.spec, self.spec.head
        memory_mib = round(head.memory_gib * 1024)
        shm_mib = memory_mib // 2 if head.shm_gib is None else round(head.shm_gib * 1024)
        container = {
            "name": "ray-head",
            **self._image(),
            "ports": [{"name": name, "containerPort": port} for name, port in _HEAD_PORTS.items()],
            "env": env.head_env(self.cluster, spec),
            **self._env_from(),
            "resources": _resources(head.cpus, memory_mib, {}),
            "securityContext": self._container_security(()),
            "volumeMounts": volumes.pod_mounts(spec, worker=False),
        }
        pod: Manifest = {
            # The autoscaler runs in the head's pod and talks to the API server.
            **self._pod(head, needs_token=spec.autoscales),
            "containers": [container],
            "volumes": volumes.pod_volumes(spec, config_name(self.name), shm_mib, worker=False),
        }
        if spec.submission == "SidecarMode":
            pod["restartPolicy"] = "Never"
        return self._template(pod, {})

    def worker(self, group: WorkerGroup, size: GroupSize) -> Manifest:
        """The template of one group's workers."""
        spec = self.spec
        fabric = spec.fabric
        devices = {group.gpu_resource: size.gpus} if size.gpus else {}
        capabilities: tuple[str, ...] = ()
        if isinstance(fabric, InfiniBand | Roce):
            devices[fabric.resource] = fabric.per_pod
            capabilities = ("IPC_LOCK",)
        elif isinstance(fabric, Efa):
            devices["vpc.amazonaws.com/efa"] = fabric.per_pod
        container = {
            "name": "ray-worker",
            **self._image(),
            "env": env.pod_env(self.cluster, spec, size.gpus, fabric),
            **self._env_from(),
            "resources": _resources(size.cpus, size.memory_mib, devices),
            "securityContext": self._container_security(capabilities),
            "volumeMounts": volumes.pod_mounts(spec, worker=True),
        }
        pod = {
            **self._pod(group, needs_token=False),
            **_tolerations(group.tolerations, group.gpu_resource if size.gpus else None),
            **self._affinity(),
            "containers": [container],
            "volumes": volumes.pod_volumes(spec, config_name(self.name), size.shm_mib, worker=True),
        }
        return self._template(pod, _interfaces(fabric.networks) if isinstance(fabric, GcpRdma) else {})

    def submitter(self) -> Manifest:
        """The template of the pod that submits the job; KubeRay adds the command and Ray's token."""
        spec = self.spec
        container = {
            "name": "ray-job-submitter",
            **self._image(),
            "env": env.submitter_env(spec),
            "resources": _resources(1, 1024, {}, requested_cpus="500m"),
            "securityContext": self._container_security(()),
            "volumeMounts": volumes.scratch_mounts(),
        }
        pod = {
            **self._identity(needs_token=False),
            "restartPolicy": "Never",
            "securityContext": self._pod_security(),
            "containers": [container],
            "volumes": volumes.scratch_volumes(),
        }
        return {"metadata": {"labels": self.labels()}, "spec": pod}

    def labels(self) -> dict[str, str]:
        """Labels of every object and pod of the run."""
        own = {"app.kubernetes.io/instance": self.name, "app.kubernetes.io/part-of": "launcher"}
        return own | dict(self.spec.pod_labels)

    def autoscaler_security(self) -> Manifest:
        """Of the autoscaler's container beside the head, whose files the launcher does not mount."""
        return {**self._container_security(()), "readOnlyRootFilesystem": False}

    def _template(self, pod: Manifest, annotations: dict[str, str]) -> Manifest:
        watched = {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(METRICS_PORT),
            "prometheus.io/path": "/metrics",
            # A node is not emptied under a run to save money: it would restart from its last checkpoint elsewhere.
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
        if any(isinstance(volume, CsiVolume) and volume.driver == _GCSFUSE for volume in self.spec.volumes.values()):
            watched["gke-gcsfuse/volumes"] = "true"
        merged = watched | annotations | dict(self.spec.pod_annotations)
        return {"metadata": {"labels": self.labels(), "annotations": merged}, "spec": pod}

    def _pod(self, pod: HeadPod | WorkerGroup, needs_token: bool) -> Manifest:
        spec = self.spec
        found: Manifest = {
            **self._identity(needs_token),
            "terminationGracePeriodSeconds": env.termination_s(self.cluster),
            "securityContext": self._pod_security(),
        }
        priority = pod.priority_class or spec.priority_class
        if priority is not None:
            found["priorityClassName"] = priority
        if pod.node_selector:
            found["nodeSelector"] = dict(pod.node_selector)
        return found | _tolerations(pod.tolerations, None)

    def _identity(self, needs_token: bool) -> Manifest:
        spec = self.spec
        found: Manifest = {}
        if spec.service_account is not None:
            found["serviceAccountName"] = spec.service_account
        # Roles for buckets (IRSA, GKE's Workload Identity) bring tokens of their own.
        if not needs_token:
            found["automountServiceAccountToken"] = False
        if spec.pull_secrets:
            found["imagePullSecrets"] = [{"name": name} for name in spec.pull_secrets]
        return found

    def _image(self) -> Manifest:
        return {"image": self.spec.image, "imagePullPolicy": self.spec.pull_policy}

    def _env_from(self) -> Manifest:
        return {"envFrom": [{"secretRef": {"name": name}} for name in self.spec.secrets]} if self.spec.secrets else {}

    def _pod_security(self) -> Manifest:
        user = self.spec.run_as_user
        owner = {"runAsNonRoot": True, "runAsUser": user, "runAsGroup": user, "fsGroup": user}
        return {
            **(owner if user else {"runAsUser": 0}),
            **({"fsGroupChangePolicy": "OnRootMismatch"} if user else {}),
            "seccompProfile": {"type": "RuntimeDefault"},
        }

    def _container_security(self, added: tuple[str, ...]) -> Manifest:
        return {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": self.spec.read_only_root,
            "capabilities": {"drop": ["ALL"]} | ({"add": list(added)} if added else {}),
        }

    def _affinity(self) -> Manifest:
        if self.spec.spread == "none":
            return {}
        apart: Manifest = {
            "labelSelector": {
                "matchLabels": {"app.kubernetes.io/instance": self.name, "ray.io/node-type": "worker"},
            },
            "topologyKey": "kubernetes.io/hostname",
        }
        if self.spec.spread == "required":
            rule = {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}
        else:
            rule = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]}
        return {"affinity": {"podAntiAffinity": rule}}


def _resources(cpus: int, memory_mib: int, devices: dict[str, int], requested_cpus: str | None = None) -> Manifest:
    """Requests equal limits (the pod is the last to be evicted), but for a submitter, which mostly waits."""
    limits = {
        "cpu": str(cpus),
        "memory": volumes.quantity(memory_mib),
        **{name: str(count) for name, count in devices.items()},
    }
    return {"requests": {**limits, **({"cpu": requested_cpus} if requested_cpus else {})}, "limits": limits}


def _tolerations(given: tuple[Toleration, ...], gpu_resource: str | None) -> Manifest:
    found = [one.model_dump(exclude_none=True) for one in given]
    if gpu_resource is not None:
        # Clouds keep pods without GPUs away from GPU nodes by this taint.
        found.append({"key": gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
    return {"tolerations": found} if found else {}


def _interfaces(networks: tuple[str, ...]) -> dict[str, str]:
    first = {"interfaceName": "eth0", "network": "default"}
    others = [{"interfaceName": f"eth{n}", "network": network} for n, network in enumerate(networks, start=2)]
    return {
        "networking.gke.io/default-interface": "eth0",
        "networking.gke.io/interfaces": json.dumps([first, *others]),
    }
