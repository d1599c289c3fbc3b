"""Rules about names, labels and annotations. Pure."""

import json
import re
from collections.abc import Iterator

from launcher.spec.kubernetes_names import is_label_key, is_label_value
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.rules.read import RayObject, mapping

_LONGEST = {"RayJob": 47, "RayCluster": 53}
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LARGEST_BYTES = 2**20
_KNOWN_GATES = (
    "RayCronJob", "SidecarSubmitterRestart", "RayClusterNetworkPolicy", "GCSFaultToleranceEmbeddedStorage",
    "RayClusterMTLS", "RayClusterHistoryServer", "KubernetesWAS",
)  # fmt: skip


def metadata(manifest: Manifest) -> Iterator[str]:
    """Of any object: a name, labels and annotations that the API server takes."""
    found = mapping(manifest, "metadata")
    if not found.get("name"):
        yield "metadata.name is missing; give one, because a run is found again by it"
    for key in ("labels", "annotations"):
        for name, value in mapping(found, key).items():
            where = f"metadata.{key} has {name}"
            if not is_label_key(str(name)):
                yield f"{where}, which is no key Kubernetes takes; write name or prefix/name, at most 63 letters"
            elif not isinstance(value, str):
                yield f"{where} with the value {json.dumps(value, default=str)}, which is no text; put it in quotes"
            elif key == "labels" and not is_label_value(value):
                yield f"{where} with the value {value}, which is no value of a label; use at most 63 plain letters"


def config_map(manifest: Manifest) -> Iterator[str]:
    """A ConfigMap that the API server takes."""
    name = str(mapping(manifest, "metadata").get("name", ""))
    if name and not _SUBDOMAIN.fullmatch(name):
        yield f"metadata.name is {name}, which is no name Kubernetes takes; use lower-case letters, digits and dashes"
    size = sum(len(str(value).encode()) for value in mapping(manifest, "data").values())
    if size > _LARGEST_BYTES:
        yield f"data holds {size} bytes, more than the {_LARGEST_BYTES} Kubernetes takes; put them on a volume"


def _dns_1035(it: RayObject) -> Iterator[str]:
    longest = _LONGEST[it.kind]
    if it.name and not _LABEL_1035.fullmatch(it.name):
        yield (
            f"metadata.name is {it.name}, which KubeRay refuses; use lower-case letters, digits and dashes, with a "
            "letter first and no dash last"
        )
    elif len(it.name) > longest:
        yield f"metadata.name has {len(it.name)} characters, more than the {longest} KubeRay takes; shorten it"


def _gates(it: RayObject) -> Iterator[str]:
    for gate in it.gates():
        if gate not in _KNOWN_GATES:
            yield (
                f"the annotation launcher/feature-gates names {gate}, which is no feature gate that KubeRay 1.7 has "
                f"off; choose of {', '.join(_KNOWN_GATES)}"
            )


RULES = (_dns_1035, _gates)
