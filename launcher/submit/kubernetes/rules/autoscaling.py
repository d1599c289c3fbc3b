"""Rules about Ray's autoscaler. Pure."""

from collections.abc import Iterator

from launcher.submit.kubernetes.rules.read import RayObject, env_names, listing, mapping, number, version

_V2 = "RAY_enable_autoscaler_v2"
_RESERVED = "KUBERAY_GEN_AUTOSCALER_START_CMD"
_PRIORITY_FROM = (2, 56)


def _options(it: RayObject) -> Iterator[str]:
    options = mapping(it.cluster, "autoscalerOptions")
    if options and not it.autoscales:
        yield f"{it.at}.autoscalerOptions has no effect without enableInTreeAutoscaling: true; set it"
    idle = number(options, "idleTimeoutSeconds")
    if idle is not None and idle < 0:
        yield f"{it.at}.autoscalerOptions.idleTimeoutSeconds is {idle}, which is below 0; give 0 or more"
    said = options.get("version")
    if said is not None and said not in ("v1", "v2"):
        yield f"{it.at}.autoscalerOptions.version is {said}, which is not one of v1, v2; write v2"
    if any(one.get("name") == _RESERVED for one in listing(options, "env")):
        yield f"{it.at}.autoscalerOptions.env sets {_RESERVED}, which is KubeRay's own; remove it"


def _variable(it: RayObject) -> Iterator[str]:
    env = env_names(it.head.ray)
    if _V2 not in env:
        return
    if not it.autoscales and env[_V2] in ("1", "true"):
        yield f"{it.head.where} sets {_V2}, but enableInTreeAutoscaling is not true; set that"
    if it.autoscales and mapping(it.cluster, "autoscalerOptions").get("version") is not None:
        yield f"{it.head.where} sets {_V2} beside autoscalerOptions.version; keep the option"


def _needs_v2(it: RayObject) -> Iterator[str]:
    for group in it.groups:
        for key in ("idleTimeoutSeconds", "priority"):
            value = number(group, key)
            if value is None:
                continue
            where = f"{it.group_name(group)}.{key}"
            if not it.autoscales_v2:
                yield f"{where} needs the autoscaler's version 2, said in words; write autoscalerOptions.version: v2"
            if key == "idleTimeoutSeconds" and value < 0:
                yield f"{where} is {value}, which is below 0; give 0 or more"
            ray = version(str(it.cluster.get("rayVersion", "")))
            if key == "priority" and ray is not None and ray < _PRIORITY_FROM:
                yield f"{where} needs Ray 2.56 or newer, not {it.cluster.get('rayVersion')}; remove it"


def _restarts(it: RayObject) -> Iterator[str]:
    if not it.autoscales_v2:
        return
    for pod in (it.head, *it.workers):
        if pod.restart_policy != "Never":
            yield (
                f"{pod.where} has restartPolicy {pod.restart_policy}, which the autoscaler's version 2 refuses; write "
                "Never or leave it out"
            )


def _suspended_groups(it: RayObject) -> Iterator[str]:
    for group in it.groups:
        if it.autoscales and group.get("suspend") is True:
            yield f"{it.group_name(group)}.suspend does not go with autoscaling; remove it"


RULES = (_options, _variable, _needs_v2, _restarts, _suspended_groups)
