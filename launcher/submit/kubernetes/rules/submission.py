"""Rules about how a RayJob is submitted, retried and ended. Pure."""

import json
from collections.abc import Iterator

from launcher.spec.messages import not_one_of
from launcher.submit.kubernetes.rules.read import RayObject, mapping, number

_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_KUEUE = "kueue.x-k8s.io/queue-name"


def _mode(it: RayObject) -> Iterator[str]:
    # The schema takes any text, and with an unknown one nothing is ever submitted.
    if it.mode not in _MODES:
        yield not_one_of("spec.submissionMode", it.mode, _MODES)


def _one_cluster(it: RayObject) -> Iterator[str]:
    if not it.cluster and not it.selects_cluster:
        yield "spec.rayClusterSpec is missing; give one, or a clusterSelector with a cluster that is there"
    if it.cluster and it.selects_cluster:
        yield "spec.rayClusterSpec is ignored beside clusterSelector; keep one of them"
    if it.selects_cluster and not mapping(it.spec, "clusterSelector").get("ray.io/cluster"):
        yield "spec.clusterSelector names no cluster; write ray.io/cluster: NAME"


def _selected_cluster(it: RayObject) -> Iterator[str]:
    if not it.selects_cluster:
        return
    if it.mode == "SidecarMode":
        yield "spec.submissionMode SidecarMode does not go with clusterSelector; choose K8sJobMode"
    if number(it.spec, "backoffLimit"):
        yield "spec.backoffLimit does not go with clusterSelector, as a retry is a new cluster; set it to 0"
    if it.spec.get("suspend") is True:
        yield "spec.suspend does not go with clusterSelector; remove one of them"


def _interactive(it: RayObject) -> Iterator[str]:
    if it.mode == "InteractiveMode" and number(it.spec, "backoffLimit"):
        yield "spec.backoffLimit does not go with InteractiveMode; set it to 0"


def _sidecar(it: RayObject) -> Iterator[str]:
    if it.mode != "SidecarMode":
        return
    for key in ("submitterPodTemplate", "submitterConfig"):
        if it.spec.get(key) is not None:
            yield f"spec.{key} does not go with SidecarMode, which has no submitting pod; remove it"
    if it.head.restart_policy != "Never":
        yield (
            f"{it.head.where} has restartPolicy {it.head.restart_policy}, which SidecarMode refuses; write Never or "
            "leave it out"
        )


def _suspend(it: RayObject) -> Iterator[str]:
    if it.spec.get("suspend") is True and it.spec.get("shutdownAfterJobFinishes") is not True:
        yield "spec.suspend needs shutdownAfterJobFinishes: true; set it"


def _limits(it: RayObject) -> Iterator[str]:
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        value = number(it.spec, key)
        if value is not None and value <= 0:
            yield f"spec.{key} is {value}, which is not above 0; give seconds or leave it out"
    pairs = {"spec.backoffLimit": number(it.spec, "backoffLimit")}
    pairs["spec.submitterConfig.backoffLimit"] = number(mapping(it.spec, "submitterConfig"), "backoffLimit")
    pairs["spec.entrypointNumCpus"] = number(it.spec, "entrypointNumCpus")
    pairs["spec.entrypointNumGpus"] = number(it.spec, "entrypointNumGpus")
    for where, value in pairs.items():
        if value is not None and value < 0:
            yield f"{where} is {value}, which is below 0; give 0 or more"


def _managed_by(it: RayObject) -> Iterator[str]:
    manager = it.spec.get("managedBy")
    if manager is not None and manager not in _MANAGERS:
        yield not_one_of("spec.managedBy", str(manager), _MANAGERS)


def _no_upgrade(it: RayObject) -> Iterator[str]:
    if mapping(it.cluster, "upgradeStrategy"):
        yield "spec.rayClusterSpec.upgradeStrategy is for a RayCluster of its own; remove it"


def _no_cluster_token(it: RayObject) -> Iterator[str]:
    if mapping(it.cluster, "authOptions").get("enableK8sTokenAuth") is True:
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth does not go with a RayJob; remove it"


def _kueue(it: RayObject) -> Iterator[str]:
    if _KUEUE not in mapping(it.manifest, "metadata", "labels"):
        return
    if it.spec.get("shutdownAfterJobFinishes") is not True:
        yield f"the label {_KUEUE} needs spec.shutdownAfterJobFinishes: true, or the quota is never given back; set it"
    if it.selects_cluster:
        yield f"the label {_KUEUE} does not go with clusterSelector; remove one of them"
    if it.autoscales:
        yield f"the label {_KUEUE} does not go with enableInTreeAutoscaling; Kueue admits a fixed number of pods"


def _entrypoint_resources(it: RayObject) -> Iterator[str]:
    text = it.spec.get("entrypointResources")
    if not text:
        return
    try:
        is_mapping = isinstance(json.loads(str(text)), dict)
    except ValueError:
        is_mapping = False
    if not is_mapping:
        yield f'spec.entrypointResources is {text}, which is no JSON mapping; write it like {{"TPU": 4}}'


RULES = (
    _mode, _one_cluster, _selected_cluster, _interactive, _sidecar, _suspend, _limits, _managed_by, _no_upgrade,
    _no_cluster_token, _kueue, _entrypoint_resources,
)  # fmt: skip
