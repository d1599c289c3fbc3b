"""Rules for pod templates, which the API server does not check inside a custom resource. Pure."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from launcher.spec.messages import nearest
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.view import Pod, RayObject, env_names, listing, mapping, number

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|[kMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
_BINARY = {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL = {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", start=1)}
_SCALES = {**_BINARY, **_DECIMAL, "m": Decimal("0.001"), "": Decimal(1)}
# Only these may have requests below their limits. For a device (GPU, RDMA) Kubernetes demands that both are equal.
_PLAIN = ("cpu", "memory", "ephemeral-storage")
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
# Kubernetes' default is as long as Ray's own drain (2.60), so without a longer one nothing is left for the end.
_DEFAULT_GRACE_S = 30


def _names(obj: RayObject) -> Iterator[str]:
    for pod in obj.pods:
        for container in pod.containers:
            if not container.get("name"):
                yield f"{pod.where} has a container without a name; give it one"
            if not container.get("image"):
                yield f"{pod.where} has the container {container.get('name')} without an image; give it one"


def _mounts(obj: RayObject) -> Iterator[str]:
    for pod in obj.pods:
        volumes = [volume.get("name") for volume in listing(pod.spec, "volumes")]
        for container in pod.containers:
            for mount in listing(container, "volumeMounts"):
                if mount.get("name") not in volumes:
                    yield f"{pod.where} mounts {mount.get('name')}, which is not one of its volumes; add that volume"


def _environment(obj: RayObject) -> Iterator[str]:
    for pod in obj.pods:
        for container in pod.containers:
            for entry in listing(container, "env"):
                if "value" in entry and "valueFrom" in entry:
                    yield f"{pod.where} sets {entry.get('name')} by value and valueFrom; keep one of them"


def _resources(obj: RayObject) -> Iterator[str]:
    for pod in obj.pods:
        for container in pod.containers:
            yield from _resources_of(pod, container)


def _resources_of(pod: Pod, container: Manifest) -> Iterator[str]:
    requests, limits = mapping(container, "resources", "requests"), mapping(container, "resources", "limits")
    where = f"{pod.where}, container {container.get('name')},"
    for name in sorted({*requests, *limits}, key=str):
        request = _amount(requests.get(name))
        limit = _amount(limits.get(name))
        if request is not None and limit is not None and request > limit:
            yield f"{where} requests {requests[name]} of {name}, above its limit {limits[name]}; raise the limit"
        elif name not in _PLAIN and limits.get(name) is None:
            yield f"{where} requests {name} without a limit, which Kubernetes refuses; set the limit to the same"
        elif name not in _PLAIN and request is not None and limit is not None and request != limit:
            yield f"{where} requests {requests[name]} of {name} and limits {limits[name]}; they must be the same"


def _amount(value: object) -> Decimal | None:
    """Return a quantity as a number; None for what is no quantity, which the schema reports."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        return None
    # Decimal is exact, as requests and limits may be in different units. `1E` is an exabyte, `1E3` a number with an
    # exponent.
    figure, suffix = Decimal(match[1]), match[2] or ""
    return figure * (Decimal(f"1{suffix}") if suffix[:1] in ("e", "E") and suffix[1:] else _SCALES[suffix])


def _time_to_stop(obj: RayObject) -> Iterator[str]:
    for pod in (obj.head, *obj.workers):
        drain = env_names(pod.ray).get(_DRAIN, "")
        given_grace = number(pod.spec, "terminationGracePeriodSeconds")
        grace = _DEFAULT_GRACE_S if given_grace is None else given_grace
        # At SIGTERM `ray start --block` first drains its node for that long (2.60). The kubelet kills the pod after the
        # grace period, whatever it still does.
        if drain.isdigit() and int(drain) >= grace:
            yield (
                f"{pod.where} drains for {drain} s ({_DRAIN}), but is killed after {grace} s; raise "
                "terminationGracePeriodSeconds above that, or checkpoints are lost"
            )


def _unknown_fields(obj: RayObject) -> Iterator[str]:
    for pod in obj.pods:
        yield from _unknown_keys(pod.template, "V1PodTemplateSpec", f"{pod.where}.template")


def _unknown_keys(value: Any, kind: str, path: str) -> Iterator[str]:  # any part of a pod template
    """Yield a sentence for each key that the models of the Kubernetes client do not have.

    The client is optional (`launcher[kube]`); without it the API server finds them.
    """
    try:
        from kubernetes.client import models
    except ModuleNotFoundError:
        return
    element = re.fullmatch(r"list\[(\w+)\]", kind)
    if element is not None and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, element[1], f"{path}[{index}]")
    model = getattr(models, kind, None)
    if model is None or not isinstance(value, dict):
        return
    # Tables of the generated models: JSON names by attribute, and types as text, `list[V1Container]`.
    names = {json_name: name for name, json_name in model.attribute_map.items()}
    for key, inner in value.items():
        if key in names:
            yield from _unknown_keys(inner, model.openapi_types[names[key]], f"{path}.{key}")
        else:
            near = nearest(str(key), names)
            remedy = f"did you mean {near}?" if near else "remove it"
            yield f"{path}.{key} is not a field of a Kubernetes {kind.removeprefix('V1')}; {remedy}"


RULES = (_unknown_fields, _names, _mounts, _environment, _resources, _time_to_stop)
