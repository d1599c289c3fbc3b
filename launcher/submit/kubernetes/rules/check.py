"""What KubeRay 1.7 refuses, or takes and then never runs, told before anything is sent. Pure; runs on the client.

Each rule is a small function of one object, grouped by subject: `names`, `submission`, `deletion`, `shell`, `cluster`,
`autoscaling`, `services`, `pods`. The API server checks types and unknown fields itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from launcher.errors import SpecError
from launcher.formatting import find_secret
from launcher.submit.kubernetes.manifest import KINDS, Manifest, name_of
from launcher.submit.kubernetes.rules import autoscaling, cluster, deletion, names, pods, services, shell, submission
from launcher.submit.kubernetes.rules.read import RayObject

Rule: TypeAlias = Callable[[RayObject], Iterator[str]]

_JOB_RULES: tuple[Rule, ...] = (*submission.RULES, *deletion.RULES, *shell.RULES)
_CLUSTER_RULES: tuple[Rule, ...] = (*cluster.RULES, *autoscaling.RULES, *services.RULES, *pods.RULES)


def problems_of(manifests: Sequence[Manifest]) -> list[str]:
    """One sentence for each thing that is wrong with some manifests, in their order; [] when KubeRay would run them."""
    found = []
    for manifest in manifests:
        where = f"{manifest.get('kind')} {name_of(manifest) or '(no name)'}"
        found += [f"{where}: {sentence}" for sentence in _problems(manifest)]
    return found


def check(manifests: Sequence[Manifest]) -> None:
    """Look for what KubeRay would refuse or never run.

    Raises:
        SpecError: one sentence for each problem.
    """
    problems = problems_of(manifests)
    if problems:
        raise SpecError(tuple(problems))


def _problems(manifest: Manifest) -> Iterator[str]:
    kind, api_version = manifest.get("kind"), manifest.get("apiVersion")
    if kind not in KINDS:
        yield f"kind is {kind}, which is not one of {', '.join(KINDS)}; apply it with kubectl"
        return
    expected = "v1" if kind == "ConfigMap" else "ray.io/v1"
    if api_version != expected:
        yield f"apiVersion is {api_version}, which is not {expected}; write {expected}"
        return
    yield from _secrets(manifest, ())
    yield from names.metadata(manifest)
    if kind == "ConfigMap":
        yield from names.config_map(manifest)
        return
    it = RayObject(manifest)
    for rule in (*names.RULES, *(_JOB_RULES if it.is_job else ()), *(_CLUSTER_RULES if it.cluster else ())):
        yield from rule(it)


def _secrets(value: object, path: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence for each text that holds a key in a URI."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _secrets(inner, (*path, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, (*path, str(index)))
    elif isinstance(value, str) and (what := find_secret(value)) is not None:
        yield (
            f"{'.'.join(path)} holds {what} in a URI, which everyone may read who may read the manifest; give the pods "
            "a role, or the keys as variables from a Secret"
        )
