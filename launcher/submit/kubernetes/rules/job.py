"""Rules for a RayJob: submission, deletion, and what a shell does to its command line. Pure.

In K8sJobMode and SidecarMode the submitter's own shell reads entrypoint and runtime environment before Ray does.
"""

import json
import shlex
from collections.abc import Iterator

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from launcher.spec.messages import not_one_of
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.view import RayObject, below, listing, mapping, number

_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_KUEUE = "kueue.x-k8s.io/queue-name"
_AT = "spec.deletionStrategy"
# Inner objects are deleted first: their time must not be later.
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
# Characters that a shell acts on outside of quotes; `live_character` tracks backslashes and quotes.
# Some act only at the start of a word (~, #, !). Refusing them everywhere costs the user a pair of quotes, and saves a
# parser of bash here.
_LIVE = set("$`&|;<>()*?[]{}#~!\n")
_LIVE_IN_DOUBLE = set("$`")
_WITH_SHELL = ("K8sJobMode", "SidecarMode")


def _mode(obj: RayObject) -> Iterator[str]:
    # The schema accepts any text; with an unknown submissionMode KubeRay never submits anything.
    if obj.mode not in _MODES:
        yield not_one_of("spec.submissionMode", obj.mode, _MODES)


def _one_cluster(obj: RayObject) -> Iterator[str]:
    if not obj.cluster and not obj.selects_cluster:
        yield "spec.rayClusterSpec is missing; give one, or a clusterSelector with an existing cluster"
    if obj.cluster and obj.selects_cluster:
        yield "spec.rayClusterSpec is ignored with a clusterSelector; keep one of them"
    if obj.selects_cluster and not mapping(obj.spec, "clusterSelector").get("ray.io/cluster"):
        yield "spec.clusterSelector names no cluster; write ray.io/cluster: NAME"


def _selected_cluster(obj: RayObject) -> Iterator[str]:
    if not obj.selects_cluster:
        return
    if obj.mode == "SidecarMode":
        yield "spec.submissionMode SidecarMode cannot be combined with clusterSelector; choose K8sJobMode"
    if number(obj.spec, "backoffLimit"):
        yield "spec.backoffLimit cannot be combined with clusterSelector, as a retry is a new cluster; set it to 0"
    if obj.spec.get("suspend") is True:
        yield "spec.suspend cannot be combined with clusterSelector; remove one of them"


def _sidecar(obj: RayObject) -> Iterator[str]:
    if obj.mode != "SidecarMode":
        return
    for key in ("submitterPodTemplate", "submitterConfig"):
        if obj.spec.get(key) is not None:
            yield f"spec.{key} cannot be combined with SidecarMode, which has no submitting pod; remove it"
    if obj.head.restart_policy != "Never":
        yield (
            f"{obj.head.where} has restartPolicy {obj.head.restart_policy}, which SidecarMode refuses; write Never or "
            "remove it"
        )


def _combinations(obj: RayObject) -> Iterator[str]:
    is_shut_down = obj.spec.get("shutdownAfterJobFinishes") is True
    # A retry would keep spec.jobId and count as running at once (KubeRay's issue 3525).
    if obj.mode == "InteractiveMode" and number(obj.spec, "backoffLimit"):
        yield "spec.backoffLimit cannot be combined with InteractiveMode; set it to 0"
    if obj.spec.get("suspend") is True and not is_shut_down:
        yield "spec.suspend needs shutdownAfterJobFinishes: true; set it"
    if mapping(obj.cluster, "upgradeStrategy"):
        yield "spec.rayClusterSpec.upgradeStrategy is only for a RayCluster without a RayJob; remove it"
    if mapping(obj.cluster, "authOptions").get("enableK8sTokenAuth") is True:
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth cannot be combined with a RayJob; remove it"
    # The rules below are Kueue's (kueue.sigs.k8s.io/docs/tasks/run_rayjobs); KubeRay accepts these combinations.
    if _KUEUE not in mapping(obj.manifest, "metadata", "labels"):
        return
    if not is_shut_down:
        yield f"the label {_KUEUE} needs spec.shutdownAfterJobFinishes: true, or the quota is never given back; set it"
    if obj.selects_cluster:
        yield f"the label {_KUEUE} cannot be combined with clusterSelector; remove one of them"
    if obj.autoscales:
        yield f"the label {_KUEUE} cannot be combined with enableInTreeAutoscaling; Kueue admits a fixed number of pods"


def _limits(obj: RayObject) -> Iterator[str]:
    yield from below("spec.activeDeadlineSeconds", number(obj.spec, "activeDeadlineSeconds"), least=1)
    for key in ("backoffLimit", "entrypointNumCpus", "entrypointNumGpus"):
        yield from below(f"spec.{key}", number(obj.spec, key))
    submitter = mapping(obj.spec, "submitterConfig")
    yield from below("spec.submitterConfig.backoffLimit", number(submitter, "backoffLimit"))


def _entrypoint_resources(obj: RayObject) -> Iterator[str]:
    # KubeRay passes this text on without parsing it (job.go): wrong JSON fails in the submitting pod, when the whole
    # cluster is up.
    text = obj.spec.get("entrypointResources")
    if not text:
        return
    try:
        is_mapping = isinstance(json.loads(str(text)), dict)
    except ValueError:
        is_mapping = False
    if not is_mapping:
        yield f'spec.entrypointResources is {text}, which is not a JSON mapping; write it like {{"TPU": 4}}'


def _time_to_live(obj: RayObject) -> Iterator[str]:
    ttl = number(obj.spec, "ttlSecondsAfterFinished")
    yield from below("spec.ttlSecondsAfterFinished", ttl)
    if ttl is not None and ttl > 0 and obj.spec.get("shutdownAfterJobFinishes") is not True:
        yield "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true; set it"


def _legacy_deletion(obj: RayObject) -> Iterator[str]:
    strategy = mapping(obj.spec, "deletionStrategy")
    for key in ("onSuccess", "onFailure"):
        if key not in strategy:
            continue
        policy = mapping(strategy, key).get("policy")
        yield from _fitting(f"{_AT}.{key}", str(policy), obj)
        if policy == "DeleteNone" and obj.spec.get("shutdownAfterJobFinishes") is True:
            yield f"{_AT}.{key} is DeleteNone, against shutdownAfterJobFinishes: true; remove one of them"


def _deletion_rules(obj: RayObject) -> Iterator[str]:
    rules = listing(mapping(obj.spec, "deletionStrategy"), "deletionRules")
    if rules and obj.spec.get("shutdownAfterJobFinishes") is True:
        yield f"{_AT}.deletionRules cannot be combined with shutdownAfterJobFinishes: true; remove one of them"
    seen: dict[tuple[str, str], int] = {}
    for index, rule in enumerate(rules):
        where, policy = f"{_AT}.deletionRules[{index}]", str(rule.get("policy"))
        yield from _fitting(where, policy, obj)
        pair = (policy, _ending(mapping(rule, "condition")))
        if pair in seen:
            yield f"{where} repeats {policy} for {pair[1]}, first in rule {seen[pair]}; remove one"
        seen.setdefault(pair, index)


def _fitting(where: str, policy: str, obj: RayObject) -> Iterator[str]:
    if obj.selects_cluster and policy in ("DeleteCluster", "DeleteWorkers"):
        yield f"{where} is {policy}, which cannot be combined with clusterSelector; remove it"
    if obj.autoscales and policy == "DeleteWorkers":
        yield f"{where} is DeleteWorkers, which cannot be combined with autoscaling; write DeleteCluster"


def _deletion_order(obj: RayObject) -> Iterator[str]:
    endings: dict[str, dict[str, int]] = {}
    for rule in listing(mapping(obj.spec, "deletionStrategy"), "deletionRules"):
        condition = mapping(rule, "condition")
        times = endings.setdefault(_ending(condition), {})
        # The first of two equal rules counts; `_deletion_rules` reports the second.
        times.setdefault(str(rule.get("policy")), number(condition, "ttlSeconds") or 0)
    for ending, times in endings.items():
        present = [(policy, times[policy]) for policy in _ORDER if policy in times]
        for (first, early), (second, late) in zip(present, present[1:], strict=False):
            if late < early:
                yield (
                    f"{_AT}.deletionRules: for {ending}, {second} comes after {late} s and {first} after {early} s; "
                    f"give {second} at least {early}"
                )


def _ending(condition: Manifest) -> str:
    return str(condition.get("jobStatus") or condition.get("jobDeploymentStatus"))


def _entrypoint(obj: RayObject) -> Iterator[str]:
    text = obj.spec.get("entrypoint")
    if obj.mode == "InteractiveMode":
        return
    if not isinstance(text, str) or not text.strip():
        yield "spec.entrypoint is empty; give the command the driver runs"
        return
    if obj.mode not in _WITH_SHELL:
        return  # HTTPMode passes the line unchanged to the driver's own shell
    live = live_character(text)
    if live is not None:
        yield (
            f"spec.entrypoint holds {live!r} outside of single quotes, on which the submitter's shell acts in its own "
            "pod; write single-quoted words, sh -c '...' around a whole command line"
        )
    elif not _closes(text):
        yield "spec.entrypoint has a quote that is not closed; close it"


def live_character(text: str) -> str | None:
    """Return the first character a shell would act on; None when all words are plain or quoted."""
    quote = ""
    characters = iter(text)
    for character in characters:
        if quote:
            if character == quote:
                quote = ""
            elif quote == '"' and character == "\\":
                next(characters, None)
            elif quote == '"' and character in _LIVE_IN_DOUBLE:
                return character
        elif character in "'\"":
            quote = character
        elif character == "\\":
            next(characters, None)
        elif character in _LIVE:
            return character
    return None


def _closes(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


def _runtime_env(obj: RayObject) -> Iterator[str]:
    text = obj.spec.get("runtimeEnvYAML")
    if text is None:
        return
    try:
        value = YAML(typ="safe", pure=True).load(str(text))
    except YAMLError as error:
        yield f"spec.runtimeEnvYAML is not valid YAML ({' '.join(str(error).split())[:120]}); fix it"
        return
    if value is not None and not isinstance(value, dict):
        yield "spec.runtimeEnvYAML is not a mapping; write keys such as working_dir and env_vars"
    elif obj.mode in _WITH_SHELL:
        yield from _not_live("spec.runtimeEnvYAML", str(text))


def _metadata(obj: RayObject) -> Iterator[str]:
    if obj.mode in _WITH_SHELL:
        for key, value in mapping(obj.spec, "metadata").items():
            yield from _not_live(f"spec.metadata.{key}", str(value))


def _not_live(where: str, text: str) -> Iterator[str]:
    # KubeRay puts these values between double quotes into the submitter's command (job.go, strconv.Quote), where a
    # shell still expands both characters.
    for character in sorted(_LIVE_IN_DOUBLE.intersection(text)):
        yield f"{where} holds {character!r}, which the submitter's shell would act on; write it without"


RULES = (
    _mode, _one_cluster, _selected_cluster, _sidecar, _combinations, _limits, _entrypoint_resources, _time_to_live,
    _legacy_deletion, _deletion_rules, _deletion_order, _entrypoint, _runtime_env, _metadata,
)  # fmt: skip
