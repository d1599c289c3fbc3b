"""Rules about the groups of a cluster: how many pods, which parameters. Pure."""

import re
from collections import Counter
from collections.abc import Iterator

from launcher.spec.kubernetes_names import is_label_key, is_label_value
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.read import RayObject, mapping, number

_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_GROUP_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def _has_head(it: RayObject) -> Iterator[str]:
    if not mapping(it.cluster, "headGroupSpec"):
        yield f"{it.at}.headGroupSpec is missing; a cluster needs a head"


def _containers(it: RayObject) -> Iterator[str]:
    has_head = bool(mapping(it.cluster, "headGroupSpec"))
    for pod in (*([it.head] if has_head else []), *it.workers):
        if not pod.containers:
            yield f"{pod.where}.template has no containers; give it one that runs Ray"


def _group_names(it: RayObject) -> Iterator[str]:
    names = [str(group.get("groupName") or "") for group in it.groups]
    for name, count in Counter(names).items():
        if not _GROUP_NAME.fullmatch(name):
            yield f"{it.at}.workerGroupSpecs has the groupName {name!r}, which is no label; use letters, digits, dashes"
        elif count > 1:
            yield f"{it.at}.workerGroupSpecs has the groupName {name} {count} times; give each group its own"


def _counts(it: RayObject) -> Iterator[str]:
    for group in it.groups:
        where = it.group_name(group)
        counts = {key: number(group, key) for key in ("minReplicas", "replicas", "maxReplicas")}
        for key, value in counts.items():
            if value is not None and value < 0:
                yield f"{where}.{key} is {value}, which is below 0; give 0 or more"
            if value is None and key != "replicas" and not it.autoscales:
                yield f"{where}.{key} is missing, which a cluster without autoscaling needs; give it"
        yield from _counts_in_order(where, counts)
        hosts = number(group, "numOfHosts")
        if hosts is not None and hosts < 1:
            yield f"{where}.numOfHosts is {hosts}, which is below 1; give 1 or more"


def _counts_in_order(where: str, counts: dict[str, int | None]) -> Iterator[str]:
    least, now, most = counts["minReplicas"], counts["replicas"], counts["maxReplicas"]
    if least is not None and most is not None and least > most:
        yield f"{where}.minReplicas is {least}, above maxReplicas {most}; swap them"
    elif now is not None and least is not None and now < least:
        yield f"{where}.replicas is {now}, below minReplicas {least}; KubeRay would start {least}, so write that"
    elif now is not None and most is not None and now > most:
        yield f"{where}.replicas is {now}, above maxReplicas {most}; KubeRay would start {most}, so write that"


def _start_params(it: RayObject) -> Iterator[str]:
    for where, group in _all_groups(it):
        params = mapping(group, "rayStartParams")
        for key, value in params.items():
            if not isinstance(value, str):
                yield f"{where}.rayStartParams.{key} is {value!r}, which is no text; put it in quotes"
        both = [key for key in _START_RESOURCES if params.get(key)]
        if both and mapping(group, "resources"):
            yield f"{where} has resources and rayStartParams.{both[0]}; keep one of them"
        if "labels" in params:
            yield f"{where}.rayStartParams.labels is refused by KubeRay; write them as {where}.labels"


def _ray_labels(it: RayObject) -> Iterator[str]:
    for where, group in _all_groups(it):
        for key, value in mapping(group, "labels").items():
            if not is_label_key(str(key)) or not is_label_value(str(value)):
                yield f"{where}.labels has {key}: {value}, which is no label; use at most 63 plain letters each"


def _upgrade(it: RayObject) -> Iterator[str]:
    kind = mapping(it.cluster, "upgradeStrategy").get("type")
    if not it.is_job and kind is not None and kind not in ("Recreate", "None"):
        yield f"spec.upgradeStrategy.type is {kind}, which is not one of Recreate, None; choose one of them"


def _all_groups(it: RayObject) -> Iterator[tuple[str, Manifest]]:
    yield it.head.where, mapping(it.cluster, "headGroupSpec")
    yield from ((it.group_name(group), group) for group in it.groups)


RULES = (_has_head, _containers, _group_names, _counts, _start_params, _ray_labels, _upgrade)
