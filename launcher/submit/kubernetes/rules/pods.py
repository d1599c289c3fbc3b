"""Rules about pod templates, which the API server does not look into inside of a custom resource. Pure."""

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.read import Pod, RayObject, env_names, listing, mapping, number

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|[kMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
_BINARY = {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL = {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", start=1)}
_SCALES = {**_BINARY, **_DECIMAL, "m": Decimal("0.001"), "": Decimal(1)}
_PLAIN = ("cpu", "memory", "ephemeral-storage")
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_DEFAULT_GRACE_S = 30


def _names(it: RayObject) -> Iterator[str]:
    for pod in it.pods:
        names = [str(container.get("name") or "") for container in pod.containers]
        for name, count in Counter(names).items():
            if not name:
                yield f"{pod.where} has a container without a name; give it one"
            elif count > 1:
                yield f"{pod.where} has {count} containers named {name}; give each its own name"
        for container in pod.containers:
            if not container.get("image"):
                yield f"{pod.where} has the container {container.get('name')} without an image; give it one"


def _mounts(it: RayObject) -> Iterator[str]:
    for pod in it.pods:
        volumes = Counter(str(volume.get("name")) for volume in listing(pod.spec, "volumes"))
        for name, count in volumes.items():
            if count > 1:
                yield f"{pod.where} has {count} volumes named {name}; give each its own name"
        for container in pod.containers:
            mounts = listing(container, "volumeMounts")
            for mount in mounts:
                if str(mount.get("name")) not in volumes:
                    yield f"{pod.where} mounts {mount.get('name')}, which is none of its volumes; add that volume"
            paths = Counter(str(mount.get("mountPath")) for mount in mounts)
            for path, count in paths.items():
                if count > 1:
                    yield f"{pod.where} mounts {count} volumes at {path}; give each its own path"


def _environment(it: RayObject) -> Iterator[str]:
    for pod in it.pods:
        for container in pod.containers:
            for name, count in Counter(str(one.get("name")) for one in listing(container, "env")).items():
                if count > 1:
                    yield f"{pod.where} sets {name} {count} times; keep one of them"
            for one in listing(container, "env"):
                if "value" in one and not isinstance(one["value"], str):
                    yield f"{pod.where} sets {one.get('name')} to {one['value']!r}, which is no text; put it in quotes"
                if "value" in one and "valueFrom" in one:
                    yield f"{pod.where} sets {one.get('name')} by value and valueFrom; keep one of them"


def _resources(it: RayObject) -> Iterator[str]:
    for pod in it.pods:
        for container in pod.containers:
            yield from _resources_of(pod, container)


def _resources_of(pod: Pod, container: Manifest) -> Iterator[str]:
    requests, limits = mapping(container, "resources", "requests"), mapping(container, "resources", "limits")
    where = f"{pod.where}, container {container.get('name')},"
    for name in sorted({*requests, *limits}):
        asked, most = (_amount(part.get(name)) for part in (requests, limits))
        for given, amount in ((requests.get(name), asked), (limits.get(name), most)):
            if given is not None and amount is None:
                yield f"{where} has {name}: {given}, which is no amount; write it like 2, 500m or 8Gi"
        if asked is None and most is None:
            continue
        if asked is not None and most is not None and asked > most:
            yield f"{where} requests {requests[name]} of {name}, above its limit {limits[name]}; raise the limit"
        elif name not in _PLAIN and most is None:
            yield f"{where} requests {name} without a limit, which Kubernetes refuses; set the limit to the same"
        elif name not in _PLAIN and asked is not None and asked != most:
            yield f"{where} requests {requests[name]} of {name} and limits {limits[name]}; they must be the same"


def _amount(value: object) -> Decimal | None:
    match = _QUANTITY.fullmatch(str(value))
    if value is None or match is None:
        return None
    figure, suffix = Decimal(match[1]), match[2] or ""
    return figure * (Decimal(f"1{suffix}") if suffix[:1] in ("e", "E") and suffix[1:] else _SCALES[suffix])


def _time_to_stop(it: RayObject) -> Iterator[str]:
    for pod in (it.head, *it.workers):
        drain = env_names(pod.ray).get(_DRAIN, "")
        grace = number(pod.spec, "terminationGracePeriodSeconds") or _DEFAULT_GRACE_S
        if drain.isdigit() and int(drain) >= grace:
            yield (
                f"{pod.where} drains for {drain} s ({_DRAIN}), but is killed after {grace} s; raise "
                "terminationGracePeriodSeconds above that, or checkpoints are lost"
            )


RULES = (_names, _mounts, _environment, _resources, _time_to_stop)
