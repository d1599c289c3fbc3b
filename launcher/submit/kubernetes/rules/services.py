"""Rules about fault tolerance, tokens, and what only feature gates allow. Pure."""

from collections.abc import Iterator

from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.read import RayObject, env_names, listing, mapping, version

_TOKENS_FROM, _CLUSTER_TOKENS_FROM = (2, 52), (2, 55)
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_REDIS_ONLY = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")
_ROCKS_GATE = "GCSFaultToleranceEmbeddedStorage"
_ROCKS_VOLUME, _ROCKS_PATH = "gcs-storage", "/data/gcs"
_TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def _redis_said_elsewhere(it: RayObject) -> Iterator[str]:
    env = env_names(it.head.ray)
    params = mapping(it.cluster, "headGroupSpec", "rayStartParams")
    options = it.cluster.get("gcsFaultToleranceOptions")
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield f"{it.head.where} names a Redis user; write it as gcsFaultToleranceOptions.redisUsername"
    if not isinstance(options, dict):
        if "RAY_REDIS_ADDRESS" in env and it.annotations.get("ray.io/ft-enabled") != "true":
            yield f"{it.head.where} sets RAY_REDIS_ADDRESS; write it as gcsFaultToleranceOptions.redisAddress"
        return
    if params.get("redis-password"):
        yield f"{it.head.where}.rayStartParams has redis-password; write gcsFaultToleranceOptions.redisPassword"
    for name, key in {"REDIS_PASSWORD": "redisPassword", "RAY_REDIS_ADDRESS": "redisAddress"}.items():
        if name in env:
            yield f"{it.head.where} sets {name} beside gcsFaultToleranceOptions; write it there as {key}"
    for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if it.annotations.get(name):
            yield f"the annotation {name} does not go with gcsFaultToleranceOptions; remove it"


def _backend(it: RayObject) -> Iterator[str]:
    options = it.cluster.get("gcsFaultToleranceOptions")
    if not isinstance(options, dict):
        return
    at = f"{it.at}.gcsFaultToleranceOptions"
    if options.get("backend", "redis") != "rocksdb":
        if options.get("storage") is not None:
            yield f"{at}.storage is for the rocksdb backend alone; remove it"
        return
    if not it.has_gate(_ROCKS_GATE):
        yield _behind_gate(f"{at}.backend rocksdb", _ROCKS_GATE)
    for key in _REDIS_ONLY:
        if options.get(key) is not None:
            yield f"{at}.{key} does not go with the rocksdb backend; remove it"
    storage = mapping(options, "storage")
    if storage.get("claimName") and any(key in storage for key in ("size", "storageClassName", "accessModes")):
        yield f"{at}.storage has a claimName and describes a new volume; keep one of them"
    yield from _operators_own(it)


def _operators_own(it: RayObject) -> Iterator[str]:
    for name in ("RAY_gcs_storage", "RAY_gcs_storage_path"):
        if name in env_names(it.head.ray):
            yield f"{it.head.where} sets {name}, which KubeRay sets for the rocksdb backend; remove it"
    names = [volume.get("name") for volume in listing(it.head.spec, "volumes")]
    mounts = listing(it.head.ray, "volumeMounts")
    taken = [mount for mount in mounts if mount.get("mountPath") == _ROCKS_PATH or mount.get("name") == _ROCKS_VOLUME]
    if _ROCKS_VOLUME in names or taken:
        yield f"{it.head.where} has a volume {_ROCKS_VOLUME} or something at {_ROCKS_PATH}, KubeRay's own; rename it"


def _auth(it: RayObject) -> Iterator[str]:
    options = it.cluster.get("authOptions")
    if not isinstance(options, dict):
        return
    at, mode = f"{it.at}.authOptions", options.get("mode")
    if mode is None:
        # The field's comment says that token is the default; the operator reads it as off.
        yield f"{at} has no mode, which leaves the cluster open; write mode: token, or mode: disabled on purpose"
    elif mode not in ("token", "disabled"):
        yield f"{at}.mode is {mode}, which is not one of token, disabled; choose one of them"
    by_kubernetes = options.get("enableK8sTokenAuth") is True
    if by_kubernetes and mode != "token":
        yield f"{at}.enableK8sTokenAuth needs mode: token; set it"
    if by_kubernetes and options.get("secretName"):
        yield f"{at} has enableK8sTokenAuth and a secretName; keep one of them"
    if mode == "token":
        yield from _auth_version(it, _CLUSTER_TOKENS_FROM if by_kubernetes else _TOKENS_FROM)


def _auth_version(it: RayObject, first: tuple[int, int]) -> Iterator[str]:
    given = str(it.cluster.get("rayVersion") or "")
    found, needed = version(given), f"{first[0]}.{first[1]}"
    if not given:
        yield f"{it.at}.rayVersion is missing, which authOptions needs; write that of the image, {needed} or newer"
    elif found is None:
        yield f"{it.at}.rayVersion is {given}, which is no version; write it like {needed}.0"
    elif found < first:
        yield f"{it.at}.rayVersion is {given}, but authOptions needs Ray {needed} or newer; use a newer image"


def _gated(it: RayObject) -> Iterator[str]:
    for key, gate in _GATED.items():
        if it.cluster.get(key) is not None and not it.has_gate(gate):
            yield _behind_gate(f"{it.at}.{key}", gate)


def _behind_gate(what: str, gate: str) -> str:
    return (
        f"{what} is refused by an operator without the feature gate {gate}; remove it, or confirm that the gate is on "
        f"with the annotation launcher/feature-gates: {gate}"
    )


def _network(it: RayObject) -> Iterator[str]:
    policy = mapping(it.cluster, "networkPolicy")
    at, mode = f"{it.at}.networkPolicy", str(policy.get("mode", "DenyAll"))
    names = {group.get("groupName") for group in it.groups}
    parts: list[tuple[str, Manifest]] = [(key, mapping(policy, key)) for key in ("head", "worker")]
    for part in listing(policy, "workerGroups"):
        parts.append((f"workerGroups[{part.get('groupName')}]", part))
        if part.get("groupName") not in names:
            yield f"{at}.workerGroups names {part.get('groupName')}, which is no group of the cluster; choose one"
    for where, part in parts:
        for allowed, rules in {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.items():
            if mode == allowed and part.get(rules):
                yield f"{at}.{where}.{rules} has no effect with mode {mode}; remove it or deny that way too"


def _tls(it: RayObject) -> Iterator[str]:
    if mapping(it.cluster, "tlsOptions").get("enabled") is not True:
        return
    for pod in (it.head, *it.workers):
        for name in _TLS_ENV:
            if name in env_names(pod.ray):
                yield f"{pod.where} sets {name}, which KubeRay sets with tlsOptions; remove it"


def _history(it: RayObject) -> Iterator[str]:
    options = it.cluster.get("historyServerOptions")
    if isinstance(options, dict) and not options.get("collectorOptions"):
        yield f"{it.at}.historyServerOptions has no collectorOptions; give them or remove it"


RULES = (_redis_said_elsewhere, _backend, _auth, _gated, _network, _tls, _history)
