"""A job as Kubernetes objects: the ConfigMap with the job file, and the RayJob or RayCluster. Pure; on the client.

The pods are made in `submit/kubernetes/pod.py`; `rules/check.py` says whether KubeRay would take what comes out.
"""

import json
import shlex
from typing import Literal

from launcher.errors import ClusterError
from launcher.spec.job import JobSpec
from launcher.spec.kubernetes import JOB_DIR, KubernetesSpec
from launcher.spec.kubernetes_services import Kai, Kueue, Queue, RocksDb, SecretKey, Volcano, YuniKorn
from launcher.spec.kubernetes_sizes import GroupSize, group_sizes
from launcher.spec.loader import dump_job
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.names import config_name, job_name
from launcher.submit.kubernetes.pod import Pods
from launcher.submit.kubernetes.volumes import quantity

API_VERSION = "ray.io/v1"
GATES = "launcher/feature-gates"
"""Annotation that names the operator's feature gates a manifest relies on."""

RUN = "launcher/run"
"""Annotation with the run's name."""

Command = Literal["train", "tune"]
Kind = Literal["job", "cluster"]


def objects(job: JobSpec, command: Command, kind: Kind) -> list[Manifest]:
    """The objects of a job, in the order in which they should be applied.

    Args:
        job: whose `cluster.kubernetes` says how.
        command: what the RayJob runs.
        kind: a RayJob that runs it, or a RayCluster to work on by hand.

    Raises:
        ClusterError: the job says nothing about Kubernetes.
    """
    cluster = job.cluster
    spec = cluster.kubernetes
    if spec is None:
        raise ClusterError("cluster.kubernetes is missing; add it to the job file, with at least an image")
    pods = Pods(job_name(job), cluster, spec)
    body = _rayjob(job, command, pods) if kind == "job" else _raycluster(job, pods)
    return [_config_map(job, pods), body]


def entrypoint(job: JobSpec, command: Command) -> str:
    """The driver's command line.

    KubeRay's submitter expands what a shell expands in its own pod, so that only plain or single-quoted words mean
    the same in every submission mode. `exec` gives the launcher the stop signal.
    """
    line = f"exec {shlex.join(['python', '-m', 'launcher', command, f'{JOB_DIR}/job.yaml'])}"
    prepare = job.cluster.prepare
    return line if prepare is None else shlex.join(["sh", "-c", f"{prepare} && {line}"])


def _config_map(job: JobSpec, pods: Pods) -> Manifest:
    # In the pods there is a Ray already, the one they make up.
    inside = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": "auto"})})
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, pods, config_name(pods.name)),
        "data": {"job.yaml": dump_job(inside)},
    }


def _metadata(job: JobSpec, pods: Pods, name: str) -> Manifest:
    spec = pods.spec
    found: Manifest = {"name": name}
    if spec.namespace is not None:
        found["namespace"] = spec.namespace
    return {**found, "labels": pods.labels(), "annotations": {RUN: job.name}}


def _ray_metadata(job: JobSpec, pods: Pods) -> Manifest:
    spec = pods.spec
    found = _metadata(job, pods, pods.name)
    if spec.queue is not None:
        found["labels"] = found["labels"] | _queue_labels(spec.queue, pods)
    if isinstance(spec.fault_tolerance, RocksDb):
        found["annotations"][GATES] = "GCSFaultToleranceEmbeddedStorage"
    return found


def _queue_labels(queue: Queue, pods: Pods) -> dict[str, str]:
    if isinstance(queue, Kueue):
        priority = {} if queue.priority is None else {"kueue.x-k8s.io/priority-class": queue.priority}
        return {"kueue.x-k8s.io/queue-name": queue.queue, **priority}
    if isinstance(queue, Volcano):
        labels = {} if queue.queue is None else {"volcano.sh/queue-name": queue.queue}
        if pods.spec.priority_class is not None:
            labels["ray.io/priority-class-name"] = pods.spec.priority_class
        if queue.topology_tier is not None:
            labels["volcano.sh/network-topology-mode"] = "hard"
            labels["volcano.sh/network-topology-highest-tier-allowed"] = str(queue.topology_tier)
        return labels
    if isinstance(queue, YuniKorn):
        own = {"yunikorn.apache.org/app-id": pods.name, "yunikorn.apache.org/queue": queue.queue}
        return {"ray.io/gang-scheduling-enabled": "true", **own}
    if isinstance(queue, Kai):
        return {"kai.scheduler/queue": queue.queue}
    return {"ray.io/gang-scheduling-enabled": "true"}


def _rayjob(job: JobSpec, command: Command, pods: Pods) -> Manifest:
    spec = pods.spec
    found: Manifest = {"submissionMode": spec.submission}
    if spec.submission != "InteractiveMode":
        found |= {
            "entrypoint": entrypoint(job, command),
            "runtimeEnvYAML": _runtime_env(job, spec),
            "metadata": {
                "launcher.run": job.name,
                "launcher.storage": job.output.storage,
                "launcher.command": command,
            },
        }
        if job.cluster.driver == "worker":
            # The head has no CPUs to give, so that a driver that needs one cannot land there.
            found["entrypointNumCpus"] = 1
    found |= {
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": spec.ttl_s,
        "backoffLimit": spec.backoff_limit,
    }
    if spec.active_deadline_s is not None:
        found["activeDeadlineSeconds"] = spec.active_deadline_s
    if spec.pre_running_deadline_s is not None:
        found["preRunningDeadlineSeconds"] = spec.pre_running_deadline_s
    if spec.submission == "K8sJobMode":
        found["submitterConfig"] = {"backoffLimit": spec.submitter_retries}
        found["submitterPodTemplate"] = pods.submitter()
    found["rayClusterSpec"] = _cluster_spec(pods)
    return {"apiVersion": API_VERSION, "kind": "RayJob", "metadata": _ray_metadata(job, pods), "spec": found}


def _raycluster(job: JobSpec, pods: Pods) -> Manifest:
    return {
        "apiVersion": API_VERSION,
        "kind": "RayCluster",
        "metadata": _ray_metadata(job, pods),
        "spec": _cluster_spec(pods),
    }


def _runtime_env(job: JobSpec, spec: KubernetesSpec) -> str:
    # Ray kills a job that was told to stop after 3 s, unless its own environment says otherwise.
    lines = [] if spec.working_dir is None else [f"working_dir: {json.dumps(spec.working_dir)}"]
    lines += ["env_vars:", f'  RAY_JOB_STOP_WAIT_TIME_S: "{job.cluster.grace_s}"']
    return "\n".join(lines) + "\n"


def _cluster_spec(pods: Pods) -> Manifest:
    spec = pods.spec
    found: Manifest = {"rayVersion": spec.ray_version, "authOptions": {"mode": spec.auth}}
    if spec.fault_tolerance is not None:
        found["gcsFaultToleranceOptions"] = _fault_tolerance(spec)
    if spec.autoscales:
        found["enableInTreeAutoscaling"] = True
        # Idle timeouts of groups are for version 2, which KubeRay takes only when told so.
        found["autoscalerOptions"] = {"version": "v2", "securityContext": pods.autoscaler_security()}
    # No CPUs to give: workers and data tasks stay off the head.
    found["headGroupSpec"] = {"rayStartParams": {"num-cpus": "0"}, "template": pods.head()}
    sizes = group_sizes(spec, pods.cluster.demand)
    found["workerGroupSpecs"] = [_group(name, size, pods) for name, size in sizes.items()]
    return found


def _group(name: str, size: GroupSize, pods: Pods) -> Manifest:
    group = pods.spec.groups[name]
    found: Manifest = {
        "groupName": name,
        "replicas": size.min_pods,
        "minReplicas": size.min_pods,
        "maxReplicas": size.max_pods,
        "rayStartParams": {},
        "template": pods.worker(group, size),
    }
    if group.idle_timeout_s is not None:
        found["idleTimeoutSeconds"] = group.idle_timeout_s
    return found


def _fault_tolerance(spec: KubernetesSpec) -> Manifest:
    chosen = spec.fault_tolerance
    assert chosen is not None
    if isinstance(chosen, RocksDb):
        size: Manifest = {"size": quantity(round(chosen.size_gib * 1024))}
        if chosen.storage_class is not None:
            size["storageClassName"] = chosen.storage_class
        return {"backend": "rocksdb", "storage": size}
    found: Manifest = {"backend": "redis", "redisAddress": chosen.address}
    # No externalStorageNamespace: a retry's new cluster must not read the state of the one before.
    if chosen.username is not None:
        found["redisUsername"] = _secret(chosen.username)
    if chosen.password is not None:
        found["redisPassword"] = _secret(chosen.password)
    return found


def _secret(source: SecretKey) -> Manifest:
    return {"valueFrom": {"secretKeyRef": {"name": source.secret, "key": source.key}}}
