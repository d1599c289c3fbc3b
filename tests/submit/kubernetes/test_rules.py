"""KubeRay's rules: a good manifest has no problems, and each way to break it has its own sentence."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from launcher.spec.loader import load_job
from launcher.submit.kubernetes.render import GATES, objects
from launcher.submit.kubernetes.rules.check import problems_of
from launcher.submit.kubernetes.rules.job import live_character
from tests.submit.kubernetes.conftest import Validate

Object = dict[str, Any]
Break = Callable[[Object], None]

_GROUP = "spec.rayClusterSpec.workerGroupSpecs[workers]"
_HEAD = "spec.rayClusterSpec.headGroupSpec"


class At:
    """Sets a value by its path: `At("spec.suspend")(True)`; ... removes it."""

    def __init__(self, path: str) -> None:
        self.keys = [int(key) if key.isdigit() else key.replace("~", ".") for key in path.split(".")]

    def __call__(self, value: Any) -> Break:
        def set_value(obj: Object) -> None:
            new = copy.deepcopy(value)
            place: Any = obj
            for key, following in zip(self.keys, self.keys[1:], strict=False):
                if isinstance(place, dict) and key not in place:
                    place[key] = [] if isinstance(following, int) else {}
                place = place[key]
            if value is ...:
                del place[self.keys[-1]]
            elif isinstance(place, list) and self.keys[-1] == len(place):
                place.append(new)
            else:
                place[self.keys[-1]] = new

        return set_value


def spec(key: str, value: Any) -> Break:
    return At(f"spec.{key}")(value)


def cluster(key: str, value: Any) -> Break:
    return At(f"spec.rayClusterSpec.{key}")(value)


def group(key: str, value: Any) -> Break:
    return At(f"spec.rayClusterSpec.workerGroupSpecs.0.{key}")(value)


def pod(key: str, value: Any) -> Break:
    return group(f"template.spec.{key}", value)


def env(name: str, value: Any = "1", head: bool = True) -> Break:
    def add(obj: Object) -> None:
        part = obj["spec"]["rayClusterSpec"]
        part = part["headGroupSpec"] if head else part["workerGroupSpecs"][0]
        part["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": value})

    return add


def rules(*entries: tuple[str, str, int]) -> list[Object]:
    return [{"policy": policy, "condition": {"jobStatus": end, "ttlSeconds": ttl}} for policy, end, ttl in entries]


_AUTO = (cluster("enableInTreeAutoscaling", True), cluster("autoscalerOptions", {"version": "v2"}))
_RULED = (spec("shutdownAfterJobFinishes", False), spec("ttlSecondsAfterFinished", 0))
_ROCKS = cluster("gcsFaultToleranceOptions", {"backend": "rocksdb", "storage": {"size": "1Gi"}})
_GATE = At(f"metadata.annotations.{GATES}")
_SELECTED = (spec("rayClusterSpec", ...), spec("clusterSelector", {"ray.io/cluster": "c"}), spec("backoffLimit", 0))

NAMES: list[tuple[str, list[Break], str]] = [
    ("none", [At("metadata.name")(...)], "metadata.name is missing; give one"),
    ("digit", [At("metadata.name")("7b-sft")],
     "metadata.name is 7b-sft, which KubeRay refuses; use lower-case letters"),
    ("dot", [At("metadata.name")("a.b")], "metadata.name is a.b, which KubeRay refuses"),
    ("long", [At("metadata.name")("a" * 48)],
     "metadata.name has 48 characters, more than the 47 KubeRay takes; shorten"),
    ("label", [At("metadata.labels.team")("a b")], "metadata.labels has team with the value a b, which is not a label"),
    ("label key", [At("metadata.labels.a b")("c")],
     "metadata.labels has a b, which is not a key Kubernetes takes; write"),
    ("label type", [At("metadata.labels.team")(True)],
     "metadata.labels has team with the value true, which is not text"),
    ("annotation", [At("metadata.annotations.n")(3)],
     "metadata.annotations has n with the value 3, which is not text; put"),
    ("gate", [_GATE("Nope")], "the annotation launcher/feature-gates names Nope, which is not a feature gate that"),
]  # fmt: skip

SUBMISSION: list[tuple[str, list[Break], str]] = [
    ("mode", [spec("submissionMode", "K8sjobMode")],
     "spec.submissionMode is K8sjobMode, which is not one of K8sJobMode, HTTPMode, SidecarMode, "
     "InteractiveMode; did you mean K8sJobMode?"),
    ("no cluster", [spec("rayClusterSpec", ...)],
     "spec.rayClusterSpec is missing; give one, or a clusterSelector with"),
    ("both", [spec("clusterSelector", {"ray.io/cluster": "c"}), spec("backoffLimit", 0)],
     "spec.rayClusterSpec is ignored with a clusterSelector; keep one"),
    ("selector", [*_SELECTED, spec("clusterSelector", {"x": "c"})],
     "spec.clusterSelector names no cluster; write ray.io/cluster: NAME"),
    ("selector retries", [*_SELECTED, spec("backoffLimit", 1)],
     "spec.backoffLimit cannot be combined with clusterSelector, as a retry is a new cluster; set it to 0"),
    ("selector suspend", [*_SELECTED, spec("suspend", True)],
     "spec.suspend cannot be combined with clusterSelector; remove one"),
    ("selector sidecar",
     [*_SELECTED, spec("submissionMode", "SidecarMode"), spec("submitterPodTemplate", ...),
      spec("submitterConfig", ...)],
     "spec.submissionMode SidecarMode cannot be combined with clusterSelector; choose K8sJobMode"),
    ("interactive", [spec("submissionMode", "InteractiveMode")],
     "spec.backoffLimit cannot be combined with InteractiveMode; set it to 0"),
    ("sidecar template", [spec("submissionMode", "SidecarMode"), spec("submitterConfig", ...)],
     "spec.submitterPodTemplate cannot be combined with SidecarMode, which has no submitting pod; remove it"),
    ("sidecar config", [spec("submissionMode", "SidecarMode"), spec("submitterPodTemplate", ...)],
     "spec.submitterConfig cannot be combined with SidecarMode"),
    ("sidecar restarts",
     [spec("submissionMode", "SidecarMode"), spec("submitterPodTemplate", ...), spec("submitterConfig", ...),
      cluster("headGroupSpec.template.spec.restartPolicy", "Always")],
     f"{_HEAD} has restartPolicy Always, which SidecarMode refuses; write Never"),
    ("suspend", [spec("suspend", True), spec("shutdownAfterJobFinishes", False), spec("ttlSecondsAfterFinished", 0)],
     "spec.suspend needs shutdownAfterJobFinishes: true; set it"),
    ("deadline", [spec("activeDeadlineSeconds", 0)],
     "spec.activeDeadlineSeconds is 0, which is below 1; give 1 or more"),
    ("retries", [spec("backoffLimit", -1)], "spec.backoffLimit is -1, which is below 0; give 0 or more"),
    ("submitter retries", [spec("submitterConfig.backoffLimit", -1)],
     "spec.submitterConfig.backoffLimit is -1, which is below 0"),
    ("driver cpus", [spec("entrypointNumCpus", -1)], "spec.entrypointNumCpus is -1, which is below 0; give 0 or more"),
    ("upgrade", [cluster("upgradeStrategy", {"type": "Recreate"})],
     "spec.rayClusterSpec.upgradeStrategy is only for a RayCluster without a RayJob; remove it"),
    ("cluster tokens", [cluster("authOptions.enableK8sTokenAuth", True)],
     "spec.rayClusterSpec.authOptions.enableK8sTokenAuth cannot be combined with a RayJob; remove it"),
    ("kueue stays",
     [At("metadata.labels.kueue~x-k8s~io/queue-name")("q"), spec("shutdownAfterJobFinishes", False),
      spec("ttlSecondsAfterFinished", 0)],
     "the label kueue.x-k8s.io/queue-name needs spec.shutdownAfterJobFinishes: true, or the quota is never "
     "given back"),
    ("kueue autoscaling", [At("metadata.labels.kueue~x-k8s~io/queue-name")("q"), *_AUTO],
     "the label kueue.x-k8s.io/queue-name cannot be combined with enableInTreeAutoscaling; Kueue"),
    ("kueue selector", [At("metadata.labels.kueue~x-k8s~io/queue-name")("q"), *_SELECTED],
     "the label kueue.x-k8s.io/queue-name cannot be combined with clusterSelector; remove one"),
    ("resources", [spec("entrypointResources", "TPU: 4")],
     'spec.entrypointResources is TPU: 4, which is not a JSON mapping; write it like {"TPU": 4}'),
]  # fmt: skip

DELETION: list[tuple[str, list[Break], str]] = [
    ("ttl below 0", [spec("ttlSecondsAfterFinished", -1)],
     "spec.ttlSecondsAfterFinished is -1, which is below 0; give 0 or more"),
    ("ttl alone", [spec("shutdownAfterJobFinishes", False)],
     "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true; set it"),
    ("both ways", [spec("deletionStrategy.deletionRules", rules(("DeleteCluster", "FAILED", 0)))],
     "spec.deletionStrategy.deletionRules cannot be combined with shutdownAfterJobFinishes: true; remove one"),
    ("none and shutdown",
     [spec("deletionStrategy", {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteSelf"}})],
     "spec.deletionStrategy.onSuccess is DeleteNone, against shutdownAfterJobFinishes: true; remove one"),
    ("twice",
     [*_RULED, spec("deletionStrategy.deletionRules", rules(("DeleteSelf", "FAILED", 0), ("DeleteSelf", "FAILED", 5)))],
     "spec.deletionStrategy.deletionRules[1] repeats DeleteSelf for FAILED, first in rule 0; remove one"),
    ("order",
     [*_RULED, spec("deletionStrategy.deletionRules", rules(("DeleteCluster", "FAILED", 60),
      ("DeleteSelf", "FAILED", 5)))],
     "spec.deletionStrategy.deletionRules: for FAILED, DeleteSelf comes after 5 s and DeleteCluster after 60 s; "
     "give DeleteSelf at least 60"),
    ("workers scale", [*_RULED, *_AUTO, spec("deletionStrategy.deletionRules", rules(("DeleteWorkers", "FAILED", 0)))],
     "spec.deletionStrategy.deletionRules[0] is DeleteWorkers, which cannot be combined with autoscaling; write "
     "DeleteCluster"),
    ("others' cluster",
     [*_RULED, *_SELECTED, spec("deletionStrategy.deletionRules", rules(("DeleteCluster", "FAILED", 0)))],
     "spec.deletionStrategy.deletionRules[0] is DeleteCluster, which cannot be combined with clusterSelector"),
]  # fmt: skip

SHELL: list[tuple[str, list[Break], str]] = [
    ("empty", [spec("entrypoint", " ")], "spec.entrypoint is empty; give the command the driver runs"),
    ("variable", [spec("entrypoint", "python x.py $HOME")],
     "spec.entrypoint holds '$' outside of single quotes, on which the submitter's shell acts in its own pod; "
     "write single-quoted words"),
    ("and", [spec("entrypoint", "cd x && python x.py")], "spec.entrypoint holds '&' outside of single quotes"),
    ("double quotes", [spec("entrypoint", 'python -c "print($x)"')],
     "spec.entrypoint holds '$' outside of single quotes"),
    ("backtick", [spec("entrypoint", "echo `date`")], "spec.entrypoint holds '`' outside of single quotes"),
    ("open quote", [spec("entrypoint", "python 'x.py")], "spec.entrypoint has a quote that is not closed; close it"),
    ("env not yaml", [spec("runtimeEnvYAML", "a: [")], "spec.runtimeEnvYAML is not valid YAML ("),
    ("env no mapping", [spec("runtimeEnvYAML", "- pip")],
     "spec.runtimeEnvYAML is not a mapping; write keys such as working_dir and env_vars"),
    ("env variable", [spec("runtimeEnvYAML", "env_vars: {A: $HOME}")],
     "spec.runtimeEnvYAML holds '$', which the submitter's shell would act on; write it without"),
    ("metadata", [spec("metadata.x", "`date`")],
     "spec.metadata.x holds '`', which the submitter's shell would act on; write it without"),
]  # fmt: skip

CLUSTER: list[tuple[str, list[Break], str]] = [
    ("empty head", [cluster("headGroupSpec.template.spec.containers", [])],
     f"{_HEAD}.template has no containers; give it one that runs Ray"),
    ("empty worker", [pod("containers", [])], f"{_GROUP}.template has no containers; give it one that runs Ray"),
    ("same name",
     [lambda obj: obj["spec"]["rayClusterSpec"]["workerGroupSpecs"].append(
          obj["spec"]["rayClusterSpec"]["workerGroupSpecs"][0])],
     "spec.rayClusterSpec.workerGroupSpecs has the groupName workers 2 times; give each group its own"),
    ("no group name", [group("groupName", "")],
     "spec.rayClusterSpec.workerGroupSpecs has the groupName '', which is not a label"),
    ("min above max", [group("minReplicas", 5)], f"{_GROUP}.minReplicas is 5, above maxReplicas 4; swap them"),
    ("replicas below", [group("replicas", 3)],
     f"{_GROUP}.replicas is 3, below minReplicas 4; KubeRay would start 4, so write that"),
    ("replicas above", [group("replicas", 9)],
     f"{_GROUP}.replicas is 9, above maxReplicas 4; KubeRay would start 4, so write that"),
    ("negative", [group("minReplicas", -1)], f"{_GROUP}.minReplicas is -1, which is below 0; give 0 or more"),
    ("no max", [group("maxReplicas", ...)],
     f"{_GROUP}.maxReplicas is missing, which a cluster without autoscaling needs; give it"),
    ("hosts", [group("numOfHosts", 0)], f"{_GROUP}.numOfHosts is 0, which is below 1; give 1 or more"),
    ("params and resources", [group("rayStartParams.num-cpus", "1"), group("resources", {"CPU": "1"})],
     f"{_GROUP} has resources and rayStartParams.num-cpus; keep one of them"),
    ("labels param", [cluster("headGroupSpec.rayStartParams.labels", "a=b")],
     f"{_HEAD}.rayStartParams.labels is refused by KubeRay; write them as {_HEAD}.labels"),
    ("ray label", [group("labels", {"a b": "c"})],
     f"{_GROUP}.labels has a b: c, which is not a label; use at most 63 plain letters each"),
]  # fmt: skip

AUTOSCALING: list[tuple[str, list[Break], str]] = [
    ("options alone", [cluster("autoscalerOptions", {"version": "v2"})],
     "spec.rayClusterSpec.autoscalerOptions has no effect without enableInTreeAutoscaling: true; set it"),
    ("idle", [*_AUTO, cluster("autoscalerOptions.idleTimeoutSeconds", -1)],
     "spec.rayClusterSpec.autoscalerOptions.idleTimeoutSeconds is -1, which is below 0"),
    ("reserved",
     [*_AUTO, cluster("autoscalerOptions.env", [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": "x"}])],
     "spec.rayClusterSpec.autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD, which is KubeRay's own; "
     "remove it"),
    ("variable alone", [env("RAY_enable_autoscaler_v2")],
     f"{_HEAD} sets RAY_enable_autoscaler_v2, but enableInTreeAutoscaling is not true; set that"),
    ("variable beside", [*_AUTO, env("RAY_enable_autoscaler_v2")],
     f"{_HEAD} sets RAY_enable_autoscaler_v2 in addition to autoscalerOptions.version; keep the option"),
    ("group idle", [cluster("enableInTreeAutoscaling", True), group("idleTimeoutSeconds", 9)],
     f"{_GROUP}.idleTimeoutSeconds needs autoscaler version 2, set explicitly; write autoscalerOptions.version: v2"),
    ("group idle below", [*_AUTO, group("idleTimeoutSeconds", -9)],
     f"{_GROUP}.idleTimeoutSeconds is -9, which is below 0; give 0 or more"),
    ("priority", [group("priority", 9)], f"{_GROUP}.priority needs autoscaler version 2"),
    ("old priority", [*_AUTO, group("priority", 9), cluster("rayVersion", "2.55.1")],
     f"{_GROUP}.priority needs Ray 2.56 or newer, not 2.55.1; remove it"),
    ("restarts", [*_AUTO, pod("restartPolicy", "Always")],
     f"{_GROUP} has restartPolicy Always, which autoscaler version 2 refuses; write Never or remove it"),
    ("suspended", [*_AUTO, group("suspend", True)], f"{_GROUP}.suspend cannot be combined with autoscaling; remove it"),
]  # fmt: skip

_REDIS = cluster("gcsFaultToleranceOptions", {"redisAddress": "redis:6379"})
_NET = "spec.rayClusterSpec.networkPolicy"

SERVICES: list[tuple[str, list[Break], str]] = [
    ("redis by variable", [env("RAY_REDIS_ADDRESS")],
     f"{_HEAD} sets RAY_REDIS_ADDRESS; write it as gcsFaultToleranceOptions.redisAddress"),
    ("redis twice", [_REDIS, env("RAY_REDIS_ADDRESS")],
     f"{_HEAD} sets RAY_REDIS_ADDRESS in addition to gcsFaultToleranceOptions; move it there as redisAddress"),
    ("redis password", [_REDIS, env("REDIS_PASSWORD")],
     f"{_HEAD} sets REDIS_PASSWORD in addition to gcsFaultToleranceOptions; move it there as redisPassword"),
    ("redis user", [env("REDIS_USERNAME")],
     f"{_HEAD} names a Redis user; write it as gcsFaultToleranceOptions.redisUsername"),
    ("redis param", [_REDIS, cluster("headGroupSpec.rayStartParams.redis-password", "x")],
     f"{_HEAD}.rayStartParams has redis-password; write gcsFaultToleranceOptions.redisPassword"),
    ("ft annotation", [_REDIS, At("metadata.annotations.ray~io/ft-enabled")("true")],
     "the annotation ray.io/ft-enabled cannot be combined with gcsFaultToleranceOptions; remove it"),
    ("storage of redis", [_REDIS, cluster("gcsFaultToleranceOptions.storage", {"size": "1Gi"})],
     "spec.rayClusterSpec.gcsFaultToleranceOptions.storage is only for the rocksdb backend; remove it"),
    ("rocksdb", [_ROCKS],
     "spec.rayClusterSpec.gcsFaultToleranceOptions.backend rocksdb is refused by an operator without the "
     "feature gate GCSFaultToleranceEmbeddedStorage; remove it, or confirm"),
    ("rocksdb and redis",
     [_ROCKS, _GATE("GCSFaultToleranceEmbeddedStorage"), cluster("gcsFaultToleranceOptions.redisAddress", "r:1")],
     "spec.rayClusterSpec.gcsFaultToleranceOptions.redisAddress cannot be combined with the rocksdb backend"),
    ("rocksdb claim",
     [_ROCKS, _GATE("GCSFaultToleranceEmbeddedStorage"), cluster("gcsFaultToleranceOptions.storage.claimName", "c")],
     "spec.rayClusterSpec.gcsFaultToleranceOptions.storage has a claimName and describes a new volume; keep one"),
    ("rocksdb env", [_ROCKS, _GATE("GCSFaultToleranceEmbeddedStorage"), env("RAY_gcs_storage")],
     f"{_HEAD} sets RAY_gcs_storage, which KubeRay sets for the rocksdb backend; remove it"),
    ("rocksdb volume",
     [_ROCKS, _GATE("GCSFaultToleranceEmbeddedStorage"),
      lambda obj: obj["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"].append(
          {"name": "gcs-storage"})],
     f"{_HEAD} has a volume gcs-storage or something at /data/gcs, KubeRay's own; rename it"),
    ("no auth mode", [cluster("authOptions", {})],
     "spec.rayClusterSpec.authOptions has no mode, which leaves the cluster open; write mode: token, or mode: "
     "disabled on purpose"),
    ("auth without version", [cluster("rayVersion", ...)],
     "spec.rayClusterSpec.rayVersion is missing, which authOptions needs; write that of the image, 2.52 or newer"),
    ("old auth", [cluster("rayVersion", "2.51.0")],
     "spec.rayClusterSpec.rayVersion is 2.51.0, but authOptions needs Ray 2.52 or newer; use a newer image"),
    ("nightly", [cluster("rayVersion", "nightly")],
     "spec.rayClusterSpec.rayVersion is nightly, which is not a version; write it like 2.52.0"),
    ("network", [cluster("networkPolicy", {"mode": "DenyAll"})],
     f"{_NET} is refused by an operator without the feature gate RayClusterNetworkPolicy; remove it"),
    ("tls", [cluster("tlsOptions", {"enabled": True})],
     "spec.rayClusterSpec.tlsOptions is refused by an operator without the feature gate RayClusterMTLS; remove it"),
    ("history", [cluster("historyServerOptions", {"collectorOptions": {"x": 1}})],
     "spec.rayClusterSpec.historyServerOptions is refused by an operator without the feature gate "
     "RayClusterHistoryServer"),
    ("history empty", [_GATE("RayClusterHistoryServer"), cluster("historyServerOptions", {})],
     "spec.rayClusterSpec.historyServerOptions has no collectorOptions; give them or remove it"),
    ("network rules",
     [_GATE("RayClusterNetworkPolicy"), cluster("networkPolicy",
      {"mode": "DenyAllEgress", "head": {"ingressRules": [{}]}})],
     f"{_NET}.head.ingressRules has no effect with mode DenyAllEgress; remove it or deny that direction too"),
    ("network group",
     [_GATE("RayClusterNetworkPolicy"), cluster("networkPolicy", {"workerGroups": [{"groupName": "x"}]})],
     f"{_NET}.workerGroups names x, which is no group of the cluster; choose one"),
    ("tls env", [_GATE("RayClusterMTLS"), cluster("tlsOptions", {"enabled": True}), env("RAY_USE_TLS")],
     f"{_HEAD} sets RAY_USE_TLS, which KubeRay sets with tlsOptions; remove it"),
]  # fmt: skip

_C0 = "containers.0"

PODS: list[tuple[str, list[Break], str]] = [
    ("no name", [pod(f"{_C0}.name", "")], f"{_GROUP} has a container without a name; give it one"),
    ("no image", [pod(f"{_C0}.image", "")], f"{_GROUP} has the container ray-worker without an image; give it one"),
    ("mount without volume", [pod(f"{_C0}.volumeMounts.0.name", "data")],
     f"{_GROUP} mounts data, which is not one of its volumes; add that volume"),
    ("env both", [cluster("headGroupSpec.template.spec.containers.0.env.0.valueFrom", {})],
     f"{_HEAD} sets HOME by value and valueFrom; keep one of them"),
    ("request above limit", [pod(f"{_C0}.resources.requests.memory", "64Gi")],
     f"{_GROUP}, container ray-worker, requests 64Gi of memory, above its limit 20Gi; raise the limit"),
    ("gpu differs", [pod(f"{_C0}.resources.limits", {"nvidia.com/gpu": 2, "cpu": 2, "memory": "20Gi"})],
     f"{_GROUP}, container ray-worker, requests 1 of nvidia.com/gpu and limits 2; they must be the same"),
    ("gpu without limit", [pod(f"{_C0}.resources.limits", {"cpu": 2, "memory": "20Gi"})],
     f"{_GROUP}, container ray-worker, requests nvidia.com/gpu without a limit, which Kubernetes refuses"),
    ("no time", [pod("terminationGracePeriodSeconds", 60)],
     f"{_GROUP} drains for 90 s (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S), but is killed after 60 s; raise "
     "terminationGracePeriodSeconds"),
    ("no time said", [pod("terminationGracePeriodSeconds", ...)],
     f"{_GROUP} drains for 90 s (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S), but is killed after 30 s"),
    ("submitter", [spec("submitterPodTemplate.spec.containers.0.image", "")],
     "spec.submitterPodTemplate has the container ray-job-submitter without an image; give it one"),
]  # fmt: skip

SUBJECTS = {
    "names": NAMES, "submission": SUBMISSION, "deletion": DELETION, "shell": SHELL, "cluster": CLUSTER,
    "autoscaling": AUTOSCALING, "services": SERVICES, "pods": PODS,
}  # fmt: skip
CASES = [
    pytest.param(breaks, expected, id=f"{subject}-{name}")
    for subject, cases in SUBJECTS.items()
    for name, breaks, expected in cases
]


def test_a_good_manifest_has_no_problems(rayjob: Object) -> None:
    assert problems_of([rayjob]) == []


@pytest.mark.parametrize(("breaks", "expected"), CASES)
def test_a_broken_manifest_has_one_problem(rayjob: Object, breaks: list[Break], expected: str) -> None:
    for break_object in breaks:
        break_object(rayjob)
    (problem,) = problems_of([rayjob])
    name = rayjob["metadata"].get("name", "(no name)")
    assert problem.startswith(f"RayJob {name}: {expected}")
    assert ";" in problem or problem.endswith("?")


@pytest.mark.parametrize(
    "breaks",
    [
        [spec("preRunningDeadlineSeconds", -1)],
        [spec("managedBy", "me")],
        [*_RULED, spec("deletionStrategy.deletionRules", rules(("DeleteAll", "FAILED", 0)))],
        [*_RULED, spec("deletionStrategy.deletionRules", rules(("DeleteSelf", "FAILED", -5)))],
        [*_RULED, spec("deletionStrategy.deletionRules", [{"policy": "DeleteSelf", "condition": {}}])],
        [*_RULED, spec("deletionStrategy.onSuccess", {"policy": "DeleteSelf"})],
        [spec("metadata.x", 3)],
        [cluster("headGroupSpec", ...)],
        [group("rayStartParams.num-cpus", 1)],
        [cluster("autoscalerOptions", {"version": "v3"})],
        [cluster("authOptions.mode", "on")],
        [cluster("upgradeStrategy", {"type": "Replace"})],
        [pod("containers.1", {"name": "ray-worker", "image": "i"})],
        [pod("volumes.0.name", "own-tmp")],
        [pod("containers.0.volumeMounts.0.mountPath", "/tmp")],
        [env("HOME", head=False)],
        [env("N", 3)],
        [pod("containers.0.resources.limits.memory", "8 GB")],
    ],
)
def test_what_has_no_rule_is_reported_by_the_schema(rayjob: Object, validate: Validate, breaks: list[Break]) -> None:
    for break_object in breaks:
        break_object(rayjob)
    assert validate(rayjob)


def test_all_problems_come_at_once(rayjob: Object) -> None:
    for break_object in (spec("submissionMode", "x"), spec("backoffLimit", -1), group("minReplicas", 9)):
        break_object(rayjob)
    assert len(problems_of([rayjob, rayjob])) == 6


def test_a_gate_that_is_confirmed_is_believed(rayjob: Object) -> None:
    for break_object in (_ROCKS, _GATE("GCSFaultToleranceEmbeddedStorage,RayClusterMTLS"), cluster("tlsOptions", {})):
        break_object(rayjob)
    assert problems_of([rayjob]) == []


def test_a_shell_that_is_the_drivers_own_may_do_what_it_likes(rayjob: Object) -> None:
    for break_object in (spec("submissionMode", "HTTPMode"), spec("entrypoint", "cd $X && python x.py > log")):
        break_object(rayjob)
    assert problems_of([rayjob]) == []


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("RayCluster", "a" * 54, "metadata.name has 54 characters, more than the 53 KubeRay takes; shorten it"),
        ("RayService", "a", "kind is RayService, which is not one of RayJob, RayCluster, ConfigMap; apply it with"),
    ],
)
def test_other_kinds(job_file: Any, kind: str, name: str, expected: str) -> None:
    manifest = {**objects(load_job(job_file), "train", "cluster")[1], "kind": kind}
    manifest["metadata"]["name"] = name
    assert problems_of([manifest])[0].startswith(f"{kind} {name}: {expected}")


def test_an_alpha_version(rayjob: Object) -> None:
    (problem,) = problems_of([{**rayjob, "apiVersion": "ray.io/v1alpha1"}])
    assert "apiVersion is ray.io/v1alpha1, which is not ray.io/v1; write ray.io/v1" in problem


@pytest.mark.parametrize("value", [None, 3, "text", [], [3], {"spec": 3}, {"spec": {"rayClusterSpec": [1]}}])
def test_any_rubbish_is_survived(value: Any) -> None:
    problems_of([{"kind": "RayJob", "apiVersion": "ray.io/v1", "metadata": value, "spec": value}])
    nested = {"rayClusterSpec": {"headGroupSpec": value, "workerGroupSpecs": value}, "deletionStrategy": value}
    obj = problems_of([{"kind": "RayJob", "apiVersion": "ray.io/v1", "metadata": {"name": "a"}, "spec": nested}])
    assert all(isinstance(problem, str) for problem in obj)


@pytest.mark.parametrize(
    ("text", "live"),
    [
        ("python -m x a=b s3://c/d", None),
        ("sh -c 'a && b $C `d`'", None),
        ("echo 'it'\"'\"'s'", None),
        (r"echo a\&b", None),
        ('echo "a & b \\$c"', None),
        ('echo "$c"', "$"),
        ("echo *", "*"),
        ("a;b", ";"),
        ("a\nb", "\n"),
    ],
)
def test_live_characters(text: str, live: str | None) -> None:
    assert live_character(text) == live
