"""Checks of manifests for what KubeRay 1.7 refuses, or accepts and then never runs. Pure; runs on the client.

Each rule is a small function of one object: `job.py`, `cluster.py`, `pods.py`. What the schema of KubeRay's CRD reports
has no rule here (types, choices, required fields, equal names in a list): the API server refuses that in the dry run
that `apply` begins with.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from launcher.errors import SpecError
from launcher.spec.kubernetes_pods import is_label_key, is_label_value
from launcher.spec.messages import dotted
from launcher.spec.permissions import find_secrets
from launcher.submit.kubernetes.manifest import KINDS, Manifest, name_of
from launcher.submit.kubernetes.rules import cluster, job, pods
from launcher.submit.kubernetes.rules.view import RayObject, mapping

Rule: TypeAlias = Callable[[RayObject], Iterator[str]]

# The schema of the CRD checks neither length nor form. The server would store the object, and the operator refuse it
# afterwards.
_LONGEST = {"RayJob": 47, "RayCluster": 53}
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# The gates that are off by default. The server does not know which of them its operator has on, so a manifest has to
# confirm the ones it needs.
_KNOWN_GATES = (
    "RayCronJob", "SidecarSubmitterRestart", "RayClusterNetworkPolicy", "GCSFaultToleranceEmbeddedStorage",
    "RayClusterMTLS", "RayClusterHistoryServer", "KubernetesWAS",
)  # fmt: skip


def check(manifests: Sequence[Manifest]) -> None:
    """Check manifests for what KubeRay would refuse or never run.

    Raises:
        SpecError: One sentence for each problem.
    """
    problems = problems_of(manifests)
    if problems:
        raise SpecError(tuple(problems))


def problems_of(manifests: Sequence[Manifest]) -> list[str]:
    """Return one sentence for each problem of some manifests, in their order; [] when KubeRay would run them."""
    return [
        f"{manifest.get('kind')} {name_of(manifest) or '(no name)'}: {sentence}"
        for manifest in manifests
        for sentence in _problems(manifest)
    ]


def _problems(manifest: Manifest) -> Iterator[str]:
    kind, api_version = manifest.get("kind"), manifest.get("apiVersion")
    if kind not in KINDS:
        yield f"kind is {kind}, which is not one of {', '.join(KINDS)}; apply it with kubectl"
        return
    expected = "v1" if kind == "ConfigMap" else "ray.io/v1"
    if api_version != expected:
        yield f"apiVersion is {api_version}, which is not {expected}; write {expected}"
        return
    # Before the rules, and for all kinds: the ConfigMap holds the whole job file.
    for key, _, what in find_secrets(manifest):
        yield (
            f"{dotted(key)} holds {what} in a URI, which everyone can read who can read the manifest; give the pods a "
            "role, or the keys as variables from a Secret"
        )
    if not name_of(manifest):
        yield "metadata.name is missing; give one, by which the run can be found again"
    yield from _metadata(mapping(manifest, "metadata"), "metadata")
    if kind == "ConfigMap":
        return
    obj = RayObject(manifest)
    yield from _name(obj)
    yield from _gates(obj)
    for pod in obj.pods:
        yield from _metadata(mapping(pod.template, "metadata"), f"{pod.where}.template.metadata")
    for rule in (*(job.RULES if obj.is_job else ()), *((*cluster.RULES, *pods.RULES) if obj.cluster else ())):
        yield from rule(obj)


def _metadata(metadata: Manifest, where: str) -> Iterator[str]:
    for key in ("labels", "annotations"):
        for name, value in mapping(metadata, key).items():
            entry = f"{where}.{key} has {name}"
            if not is_label_key(str(name)):
                yield f"{entry}, which is not a key Kubernetes takes; write name or prefix/name, at most 63 letters"
            elif not isinstance(value, str):
                yield f"{entry} with the value {json.dumps(value, default=str)}, which is not text; put it in quotes"
            elif key == "labels" and not is_label_value(value):
                yield f"{entry} with the value {value}, which is not a label value; use at most 63 plain letters"


def _name(obj: RayObject) -> Iterator[str]:
    longest = _LONGEST[obj.kind]
    if obj.name and not _LABEL_1035.fullmatch(obj.name):
        yield (
            f"metadata.name is {obj.name}, which KubeRay refuses; use lower-case letters, digits and dashes, with a "
            "letter first and no dash last"
        )
    elif len(obj.name) > longest:
        yield f"metadata.name has {len(obj.name)} characters, more than the {longest} KubeRay takes; shorten it"


def _gates(obj: RayObject) -> Iterator[str]:
    for gate in obj.gates:
        if gate not in _KNOWN_GATES:
            yield (
                f"the annotation launcher/feature-gates names {gate}, which is not a feature gate that KubeRay 1.7 has "
                f"off; choose of {', '.join(_KNOWN_GATES)}"
            )
