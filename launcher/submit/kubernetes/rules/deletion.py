"""Rules about what is deleted after a RayJob, and when. Pure."""

from collections.abc import Iterator

from launcher.spec.messages import not_one_of
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.read import RayObject, listing, mapping, number

_AT = "spec.deletionStrategy"
_POLICIES = ("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
# What is inside goes first: its time must not be later.
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def _time_to_live(it: RayObject) -> Iterator[str]:
    ttl = number(it.spec, "ttlSecondsAfterFinished")
    if ttl is None:
        return
    if ttl < 0:
        yield f"spec.ttlSecondsAfterFinished is {ttl}, which is below 0; give 0 or more"
    elif ttl > 0 and it.spec.get("shutdownAfterJobFinishes") is not True:
        yield "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true; set it"


def _one_way(it: RayObject) -> Iterator[str]:
    strategy = it.spec.get("deletionStrategy")
    if not isinstance(strategy, dict):
        return
    legacy = [key for key in ("onSuccess", "onFailure") if key in strategy]
    rules = listing(strategy, "deletionRules")
    if rules and legacy:
        yield f"{_AT} has deletionRules and {legacy[0]}; keep the rules"
    if not rules and len(legacy) < 2:
        yield f"{_AT} needs deletionRules, or both onSuccess and onFailure; give them or remove it"
    if rules and it.spec.get("shutdownAfterJobFinishes") is True:
        yield f"{_AT}.deletionRules does not go with shutdownAfterJobFinishes: true; remove one of them"


def _legacy(it: RayObject) -> Iterator[str]:
    strategy = mapping(it.spec, "deletionStrategy")
    for key in ("onSuccess", "onFailure"):
        if key not in strategy:
            continue
        policy = mapping(strategy, key).get("policy")
        yield from _fitting(f"{_AT}.{key}", str(policy), it)
        if policy == "DeleteNone" and it.spec.get("shutdownAfterJobFinishes") is True:
            yield f"{_AT}.{key} is DeleteNone, against shutdownAfterJobFinishes: true; remove one of them"


def _rules(it: RayObject) -> Iterator[str]:
    seen: dict[tuple[str, str], int] = {}
    for index, rule in enumerate(listing(mapping(it.spec, "deletionStrategy"), "deletionRules")):
        where, policy, condition = f"{_AT}.deletionRules[{index}]", str(rule.get("policy")), mapping(rule, "condition")
        yield from _fitting(where, policy, it)
        yield from _condition(where, condition)
        pair = (policy, _ending(condition))
        if pair in seen:
            yield f"{where} says {policy} for {pair[1]} again, first in rule {seen[pair]}; remove one"
        seen.setdefault(pair, index)


def _fitting(where: str, policy: str, it: RayObject) -> Iterator[str]:
    if policy not in _POLICIES:
        yield not_one_of(f"{where}.policy", policy, _POLICIES)
    if it.selects_cluster and policy in ("DeleteCluster", "DeleteWorkers"):
        yield f"{where} says {policy}, which does not go with clusterSelector; remove it"
    if it.autoscales and policy == "DeleteWorkers":
        yield f"{where} says DeleteWorkers, which does not go with autoscaling; write DeleteCluster"


def _condition(where: str, condition: Manifest) -> Iterator[str]:
    ttl = number(condition, "ttlSeconds")
    if ttl is not None and ttl < 0:
        yield f"{where} has ttlSeconds {ttl}, which is below 0; give 0 or more"
    given = [key for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
    if len(given) != 1:
        yield f"{where}.condition needs either jobStatus or jobDeploymentStatus, and has {len(given)}; give one"


def _order(it: RayObject) -> Iterator[str]:
    endings: dict[str, dict[str, int]] = {}
    for rule in listing(mapping(it.spec, "deletionStrategy"), "deletionRules"):
        condition = mapping(rule, "condition")
        times = endings.setdefault(_ending(condition), {})
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


RULES = (_time_to_live, _one_way, _legacy, _rules, _order)
