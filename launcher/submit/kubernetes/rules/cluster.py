"""Rules for a Ray cluster: its groups, the autoscaler, fault tolerance, tokens, feature gates. Pure."""

from collections import Counter
from collections.abc import Iterator

from launcher.spec.kubernetes_pods import is_label_key, is_label_value
from launcher.spec.messages import not_one_of
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.view import RayObject, below, env_names, listing, mapping, number, version

_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_V2 = "RAY_enable_autoscaler_v2"
_RESERVED = "KUBERAY_GEN_AUTOSCALER_START_CMD"
_PRIORITY_FROM = (2, 56)
_TOKENS_FROM, _CLUSTER_TOKENS_FROM = (2, 52), (2, 55)
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_REDIS_ONLY = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")
_FAULT_TOLERANCE_KEYS = ("backend", *_REDIS_ONLY, "storage")
_ROCKS_GATE = "GCSFaultToleranceEmbeddedStorage"
_ROCKS_VOLUME, _ROCKS_PATH = "gcs-storage", "/data/gcs"
_TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def _containers(obj: RayObject) -> Iterator[str]:
    for pod in (obj.head, *obj.workers):
        if not pod.containers:
            yield f"{pod.where}.template has no containers; give it one that runs Ray"


def _group_names(obj: RayObject) -> Iterator[str]:
    names = [str(group.get("groupName") or "") for group in obj.groups]
    for name, count in Counter(names).items():
        if not name or not is_label_value(name):
            yield f"{obj.at}.workerGroupSpecs has the groupName {name!r}, which is not a label; use letters and digits"
        # Only a webhook of KubeRay checks this, and an installation may run without it.
        elif count > 1:
            yield f"{obj.at}.workerGroupSpecs has the groupName {name} {count} times; give each group its own"


def _counts(obj: RayObject) -> Iterator[str]:
    for group in obj.groups:
        where = obj.group_name(group)
        counts = {key: number(group, key) for key in ("minReplicas", "replicas", "maxReplicas")}
        for key, value in counts.items():
            yield from below(f"{where}.{key}", value)
            if value is None and key != "replicas" and not obj.autoscales:
                yield f"{where}.{key} is missing, which a cluster without autoscaling needs; give it"
        yield from _counts_in_order(where, counts)
        yield from below(f"{where}.numOfHosts", number(group, "numOfHosts"), least=1)


def _counts_in_order(where: str, counts: dict[str, int | None]) -> Iterator[str]:
    least, now, most = counts["minReplicas"], counts["replicas"], counts["maxReplicas"]
    if least is not None and most is not None and least > most:
        yield f"{where}.minReplicas is {least}, above maxReplicas {most}; swap them"
    elif now is not None and least is not None and now < least:
        yield f"{where}.replicas is {now}, below minReplicas {least}; KubeRay would start {least}, so write that"
    elif now is not None and most is not None and now > most:
        yield f"{where}.replicas is {now}, above maxReplicas {most}; KubeRay would start {most}, so write that"


def _start_params(obj: RayObject) -> Iterator[str]:
    for where, group in _all_groups(obj):
        params = mapping(group, "rayStartParams")
        # By value: KubeRay takes an empty text for unset (validation.go, validateRayGroupResources).
        both = [key for key in _START_RESOURCES if params.get(key)]
        if both and mapping(group, "resources"):
            yield f"{where} has resources and rayStartParams.{both[0]}; keep one of them"
        # By key: KubeRay refuses even an empty value of this one (validateRayGroupLabels).
        if "labels" in params:
            yield f"{where}.rayStartParams.labels is refused by KubeRay; write them as {where}.labels"


def _ray_labels(obj: RayObject) -> Iterator[str]:
    for where, group in _all_groups(obj):
        for key, value in mapping(group, "labels").items():
            if not is_label_key(str(key)) or not is_label_value(str(value)):
                yield f"{where}.labels has {key}: {value}, which is not a label; use at most 63 plain letters each"


def _all_groups(obj: RayObject) -> Iterator[tuple[str, Manifest]]:
    yield obj.head.where, mapping(obj.cluster, "headGroupSpec")
    yield from ((obj.group_name(group), group) for group in obj.groups)


def _autoscaler_options(obj: RayObject) -> Iterator[str]:
    options = mapping(obj.cluster, "autoscalerOptions")
    if options and not obj.autoscales:
        yield f"{obj.at}.autoscalerOptions has no effect without enableInTreeAutoscaling: true; set it"
    yield from below(f"{obj.at}.autoscalerOptions.idleTimeoutSeconds", number(options, "idleTimeoutSeconds"))
    if _RESERVED in env_names(options):
        yield f"{obj.at}.autoscalerOptions.env sets {_RESERVED}, which is KubeRay's own; remove it"


def _variable(obj: RayObject) -> Iterator[str]:
    env = env_names(obj.head.ray)
    if _V2 not in env:
        return
    # KubeRay compares with exactly these two texts (validation.go).
    if not obj.autoscales and env[_V2] in ("1", "true"):
        yield f"{obj.head.where} sets {_V2}, but enableInTreeAutoscaling is not true; set that"
    # Even with the value that the option has: KubeRay asks only whether both are there.
    if obj.autoscales and mapping(obj.cluster, "autoscalerOptions").get("version") is not None:
        yield f"{obj.head.where} sets {_V2} in addition to autoscalerOptions.version; keep the option"


def _needs_v2(obj: RayObject) -> Iterator[str]:
    for group in obj.groups:
        for key in ("idleTimeoutSeconds", "priority"):
            value = number(group, key)
            if value is None:
                continue
            where = f"{obj.group_name(group)}.{key}"
            if not obj.autoscales_v2:
                yield f"{where} needs autoscaler version 2, set explicitly; write autoscalerOptions.version: v2"
            if key == "idleTimeoutSeconds":
                yield from below(where, value)
            ray = version(str(obj.cluster.get("rayVersion", "")))
            if key == "priority" and ray is not None and ray < _PRIORITY_FROM:
                yield f"{where} needs Ray 2.56 or newer, not {obj.cluster.get('rayVersion')}; remove it"


def _restarts(obj: RayObject) -> Iterator[str]:
    if not obj.autoscales_v2:
        return
    for pod in (obj.head, *obj.workers):
        if pod.restart_policy != "Never":
            yield (
                f"{pod.where} has restartPolicy {pod.restart_policy}, which autoscaler version 2 refuses; write "
                "Never or remove it"
            )


def _suspended_groups(obj: RayObject) -> Iterator[str]:
    for group in obj.groups:
        if obj.autoscales and group.get("suspend") is True:
            yield f"{obj.group_name(group)}.suspend cannot be combined with autoscaling; remove it"


def _misplaced_redis(obj: RayObject) -> Iterator[str]:
    env = env_names(obj.head.ray)
    params = mapping(obj.cluster, "headGroupSpec", "rayStartParams")
    options = obj.cluster.get("gcsFaultToleranceOptions")
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield f"{obj.head.where} names a Redis user; write it as gcsFaultToleranceOptions.redisUsername"
    if not isinstance(options, dict):
        # The annotation is the older way to switch fault tolerance on; with it the variable is allowed.
        if "RAY_REDIS_ADDRESS" in env and obj.annotations.get("ray.io/ft-enabled") != "true":
            yield f"{obj.head.where} sets RAY_REDIS_ADDRESS; write it as gcsFaultToleranceOptions.redisAddress"
        return
    if params.get("redis-password"):
        yield f"{obj.head.where}.rayStartParams has redis-password; write gcsFaultToleranceOptions.redisPassword"
    for name, key in {"REDIS_PASSWORD": "redisPassword", "RAY_REDIS_ADDRESS": "redisAddress"}.items():
        if name in env:
            yield f"{obj.head.where} sets {name} in addition to gcsFaultToleranceOptions; move it there as {key}"
    for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if obj.annotations.get(name):
            yield f"the annotation {name} cannot be combined with gcsFaultToleranceOptions; remove it"


def _fault_tolerance(obj: RayObject) -> Iterator[str]:
    options = obj.cluster.get("gcsFaultToleranceOptions")
    if not isinstance(options, dict):
        return
    at = f"{obj.at}.gcsFaultToleranceOptions"
    # The job file's `fault_tolerance` is passed through as it is, so here is the first check of its keys.
    for key in options:
        if key not in _FAULT_TOLERANCE_KEYS:
            yield not_one_of(f"{at}: key", str(key), _FAULT_TOLERANCE_KEYS)
    if options.get("backend", "redis") == "rocksdb":
        yield from _rocksdb(obj, options, at)
        return
    if not options.get("redisAddress"):
        yield f"{at}.redisAddress is missing; give HOST:PORT, or backend: rocksdb"
    if options.get("storage") is not None:
        yield f"{at}.storage is only for the rocksdb backend; remove it"


def _rocksdb(obj: RayObject, options: Manifest, at: str) -> Iterator[str]:
    if _ROCKS_GATE not in obj.gates:
        yield _behind_gate(f"{at}.backend rocksdb", _ROCKS_GATE)
    for key in _REDIS_ONLY:
        if options.get(key) is not None:
            yield f"{at}.{key} cannot be combined with the rocksdb backend; remove it"
    storage = mapping(options, "storage")
    if storage.get("claimName") and any(key in storage for key in ("size", "storageClassName", "accessModes")):
        yield f"{at}.storage has a claimName and describes a new volume; keep one of them"
    for name in ("RAY_gcs_storage", "RAY_gcs_storage_path"):
        if name in env_names(obj.head.ray):
            yield f"{obj.head.where} sets {name}, which KubeRay sets for the rocksdb backend; remove it"
    # KubeRay mounts a volume of its own here; two of a name or path fail only when the pod is created.
    names = [volume.get("name") for volume in listing(obj.head.spec, "volumes")]
    mounts = listing(obj.head.ray, "volumeMounts")
    taken = [mount for mount in mounts if mount.get("mountPath") == _ROCKS_PATH or mount.get("name") == _ROCKS_VOLUME]
    if _ROCKS_VOLUME in names or taken:
        yield f"{obj.head.where} has a volume {_ROCKS_VOLUME} or something at {_ROCKS_PATH}, KubeRay's own; rename it"


def _auth(obj: RayObject) -> Iterator[str]:
    options = obj.cluster.get("authOptions")
    if not isinstance(options, dict):
        return
    at, mode = f"{obj.at}.authOptions", options.get("mode")
    if mode is None:
        # KubeRay 1.7 documents token as the default, but its operator (IsAuthEnabled) reads a missing mode as off.
        yield f"{at} has no mode, which leaves the cluster open; write mode: token, or mode: disabled on purpose"
    by_kubernetes = options.get("enableK8sTokenAuth") is True
    if by_kubernetes and mode != "token":
        yield f"{at}.enableK8sTokenAuth needs mode: token; set it"
    if by_kubernetes and options.get("secretName"):
        yield f"{at} has enableK8sTokenAuth and a secretName; keep one of them"
    if mode == "token":
        yield from _auth_version(obj, _CLUSTER_TOKENS_FROM if by_kubernetes else _TOKENS_FROM)


def _auth_version(obj: RayObject, first: tuple[int, int]) -> Iterator[str]:
    ray = str(obj.cluster.get("rayVersion") or "")
    numbers = version(ray)
    needed = f"{first[0]}.{first[1]}"
    # KubeRay compares the version that the manifest states. It does not look into the image.
    if not ray:
        yield f"{obj.at}.rayVersion is missing, which authOptions needs; write that of the image, {needed} or newer"
    elif numbers is None:
        yield f"{obj.at}.rayVersion is {ray}, which is not a version; write it like {needed}.0"
    elif numbers < first:
        yield f"{obj.at}.rayVersion is {ray}, but authOptions needs Ray {needed} or newer; use a newer image"


def _gated(obj: RayObject) -> Iterator[str]:
    for key, gate in _GATED.items():
        # The gates are of alpha quality and off by default. The API server accepts the fields all the same.
        if obj.cluster.get(key) is not None and gate not in obj.gates:
            yield _behind_gate(f"{obj.at}.{key}", gate)


def _behind_gate(what: str, gate: str) -> str:
    return (
        f"{what} is refused by an operator without the feature gate {gate}; remove it, or confirm that the gate is on: "
        f"cluster.kubernetes.feature_gates in a job file, the annotation launcher/feature-gates in a manifest"
    )


def _network_policy(obj: RayObject) -> Iterator[str]:
    policy = mapping(obj.cluster, "networkPolicy")
    at, mode = f"{obj.at}.networkPolicy", str(policy.get("mode", "DenyAll"))
    names = {group.get("groupName") for group in obj.groups}
    parts: list[tuple[str, Manifest]] = [(key, mapping(policy, key)) for key in ("head", "worker")]
    for part in listing(policy, "workerGroups"):
        parts.append((f"workerGroups[{part.get('groupName')}]", part))
        if part.get("groupName") not in names:
            yield f"{at}.workerGroups names {part.get('groupName')}, which is no group of the cluster; choose one"
    for where, part in parts:
        for allowed, rules in {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.items():
            if mode == allowed and part.get(rules):
                yield f"{at}.{where}.{rules} has no effect with mode {mode}; remove it or deny that direction too"


def _tls(obj: RayObject) -> Iterator[str]:
    if mapping(obj.cluster, "tlsOptions").get("enabled") is not True:
        return
    for pod in (obj.head, *obj.workers):
        for name in _TLS_ENV:
            if name in env_names(pod.ray):
                yield f"{pod.where} sets {name}, which KubeRay sets with tlsOptions; remove it"


def _history(obj: RayObject) -> Iterator[str]:
    options = obj.cluster.get("historyServerOptions")
    if isinstance(options, dict) and not options.get("collectorOptions"):
        yield f"{obj.at}.historyServerOptions has no collectorOptions; give them or remove it"


RULES = (
    _containers, _group_names, _counts, _start_params, _ray_labels, _autoscaler_options, _variable, _needs_v2,
    _restarts, _suspended_groups, _misplaced_redis, _fault_tolerance, _auth, _gated, _network_policy, _tls, _history,
)  # fmt: skip
