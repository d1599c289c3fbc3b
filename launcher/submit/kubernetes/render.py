"""A job as Kubernetes objects: the ConfigMap with the job file, and the RayJob or RayCluster. Pure; on the client.

`pods.py` renders the pod templates; `rules/check.py` finds what KubeRay would refuse in the result.
"""

import json
import shlex
from typing import Literal

from launcher.spec.job import JobSpec
from launcher.spec.kubernetes import JOB_DIR, KubernetesSpec, Queue
from launcher.spec.kubernetes_pods import GroupSize, group_sizes
from launcher.spec.loader import dump_job
from launcher.submit.kubernetes.manifest import GATES, Manifest, config_name, job_name
from launcher.submit.kubernetes.pods import PodTemplates

API_VERSION = "ray.io/v1"
RUN = "launcher/run"
"""Annotation with the run's name."""

Command = Literal["train", "tune"]
Kind = Literal["job", "cluster"]


def objects(job: JobSpec, command: Command, kind: Kind) -> list[Manifest]:
    """Return the objects of a job, in the order in which they must be applied.

    Args:
        job: Job with a `cluster.kubernetes` section, as `load_for_pods` returns.
        command: Command that the RayJob runs.
        kind: Kind of object: a RayJob that runs the command, or a RayCluster to work on by hand.
    """
    spec = job.cluster.kubernetes
    assert spec is not None
    pods = PodTemplates(job_name(job), job.cluster, spec)
    body: Manifest = {
        "apiVersion": API_VERSION,
        "kind": "RayJob" if kind == "job" else "RayCluster",
        "metadata": _ray_metadata(job, pods),
        "spec": _rayjob_spec(job, command, pods) if kind == "job" else _cluster_spec(pods),
    }
    return [_config_map(job, pods), body]


def entrypoint(job: JobSpec, command: Command) -> str:
    """Return the driver's command line.

    KubeRay's submitter expands what a shell expands, in its own pod. Only plain or single-quoted words mean the same in
    every submission mode. `exec` passes the stop signal on to the launcher.
    """
    line = f"exec {shlex.join(['python', '-m', 'launcher', command, f'{JOB_DIR}/job.yaml'])}"
    prepare = job.cluster.prepare
    return line if prepare is None else shlex.join(["sh", "-c", f"{prepare} && {line}"])


def _config_map(job: JobSpec, pods: PodTemplates) -> Manifest:
    # Inside the pods the driver joins the Ray cluster that the pods form.
    inside = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": "auto"})})
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, pods, config_name(pods.name)),
        "data": {"job.yaml": dump_job(inside)},
    }


def _metadata(job: JobSpec, pods: PodTemplates, name: str) -> Manifest:
    namespace = {} if pods.spec.namespace is None else {"namespace": pods.spec.namespace}
    return {"name": name, **namespace, "labels": pods.labels(), "annotations": {RUN: job.name}}


def _ray_metadata(job: JobSpec, pods: PodTemplates) -> Manifest:
    metadata = _metadata(job, pods, pods.name)
    if pods.spec.queue is not None:
        metadata["labels"] |= _queue_labels(pods.spec.queue, pods)
    if pods.spec.feature_gates:
        metadata["annotations"][GATES] = ",".join(pods.spec.feature_gates)
    return metadata


def _queue_labels(queue: Queue, pods: PodTemplates) -> dict[str, str]:
    labels: dict[str, str | None]
    if queue.type == "kueue":
        labels = {"kueue.x-k8s.io/queue-name": queue.queue, "kueue.x-k8s.io/priority-class": queue.priority}
    elif queue.type == "volcano":
        # Volcano's PodGroup takes its priority from this label, not from the pods.
        priority = pods.spec.pod_template.spec.get("priorityClassName")
        labels = {
            "volcano.sh/queue-name": queue.queue,
            "ray.io/priority-class-name": str(priority) if priority else None,
        }
    elif queue.type == "yunikorn":
        labels = {
            "ray.io/gang-scheduling-enabled": "true",
            "yunikorn.apache.org/app-id": pods.name,
            "yunikorn.apache.org/queue": queue.queue,
        }
    elif queue.type == "kai":
        labels = {"kai.scheduler/queue": queue.queue}
    else:
        labels = {"ray.io/gang-scheduling-enabled": "true"}
    return {key: value for key, value in labels.items() if value is not None}


def _rayjob_spec(job: JobSpec, command: Command, pods: PodTemplates) -> Manifest:
    spec = pods.spec
    body: Manifest = {"submissionMode": spec.submission}
    if spec.submission != "InteractiveMode":
        body |= {
            "entrypoint": entrypoint(job, command),
            "runtimeEnvYAML": _runtime_env(job, spec),
            "metadata": {"launcher.run": job.name, "launcher.storage": job.output.storage, "launcher.command": command},
        }
        if job.cluster.driver == "worker":
            # The head offers no CPUs, so a driver that needs one is placed on a worker.
            body["entrypointNumCpus"] = 1
    body |= {
        # Without it the pods, and their GPUs, stay after the end, and KubeRay refuses a time to live.
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": spec.ttl_s,
        "backoffLimit": spec.backoff_limit,
    }
    if spec.active_deadline_s is not None:
        body["activeDeadlineSeconds"] = spec.active_deadline_s
    if spec.pre_running_deadline_s is not None:
        body["preRunningDeadlineSeconds"] = spec.pre_running_deadline_s
    if spec.submission == "K8sJobMode":
        body["submitterConfig"] = {"backoffLimit": spec.submitter_retries}
        body["submitterPodTemplate"] = pods.submitter()
    body["rayClusterSpec"] = _cluster_spec(pods)
    return body


def _runtime_env(job: JobSpec, spec: KubernetesSpec) -> str:
    # Ray kills a stopped job after 3 s, unless the job's own environment sets another time.
    lines = [] if spec.working_dir is None else [f"working_dir: {json.dumps(spec.working_dir)}"]
    lines += ["env_vars:", f'  RAY_JOB_STOP_WAIT_TIME_S: "{job.cluster.grace_s}"']
    return "\n".join(lines) + "\n"


def _cluster_spec(pods: PodTemplates) -> Manifest:
    spec = pods.spec
    body: Manifest = {"rayVersion": spec.ray_version, "authOptions": {"mode": spec.auth}}
    if spec.fault_tolerance is not None:
        # Without externalStorageNamespace a retry's new cluster does not read the state of the previous one.
        body["gcsFaultToleranceOptions"] = dict(spec.fault_tolerance)
    if spec.autoscales:
        body["enableInTreeAutoscaling"] = True
        # Idle timeouts of groups need version 2, which KubeRay assumes only when it is set explicitly.
        body["autoscalerOptions"] = {"version": "v2", "securityContext": pods.autoscaler_security()}
    # A head without CPUs takes no workers and no data tasks.
    body["headGroupSpec"] = {"rayStartParams": {"num-cpus": "0"}, "template": pods.head()}
    sizes = group_sizes(spec.groups, pods.cluster.demand)
    body["workerGroupSpecs"] = [_group(name, size, pods) for name, size in sizes.items()]
    return body


def _group(name: str, size: GroupSize, pods: PodTemplates) -> Manifest:
    group = pods.spec.groups[name]
    body: Manifest = {
        "groupName": name,
        "replicas": size.min_pods,
        "minReplicas": size.min_pods,
        "maxReplicas": size.max_pods,
        "rayStartParams": {},
        "template": pods.worker(group, size),
    }
    if group.idle_timeout_s is not None:
        body["idleTimeoutSeconds"] = group.idle_timeout_s
    return body
