"""Reads of manifests that may be anything: what is missing or of another kind reads as empty. Pure.

The API server refuses values of the wrong type by itself; the rules here are about what it lets through.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.submit.kubernetes.manifest import Manifest, name_of
from launcher.submit.kubernetes.objects import GATES

RAY_CONTAINER = 0
"""Index of the container that KubeRay starts Ray in."""


def mapping(value: Any, *keys: str) -> Manifest:  # a part of a manifest
    """The mapping below some keys; {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def listing(value: Any, *keys: str) -> list[Manifest]:  # a part of a manifest
    """The mappings of a list below some keys; [] where there is none."""
    found = mapping(value, *keys[:-1]).get(keys[-1])
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def number(value: Any, key: str) -> int | None:  # a part of a manifest
    """A whole number; None where there is none."""
    found = mapping(value).get(key)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def env_names(container: Manifest) -> dict[str, str]:
    """Names of a container's environment variables with their values; "" for one from elsewhere."""
    return {str(one.get("name")): str(one.get("value", "")) for one in listing(container, "env")}


def version(text: str) -> tuple[int, ...] | None:
    """2.60.0 as numbers to compare; None for what is no version."""
    return tuple(map(int, text.split("."))) if re.fullmatch(r"[0-9]+\.[0-9]+(\.[0-9]+)?", text) else None


@dataclass(frozen=True)
class Pod:
    """One pod template.

    Args:
        where: its path in the manifest.
        template: labels, annotations and spec.
    """

    where: str
    template: Manifest

    @property
    def spec(self) -> Manifest:
        """Of the pod."""
        return mapping(self.template, "spec")

    @property
    def containers(self) -> list[Manifest]:
        """The pod's containers, Ray's first."""
        return listing(self.spec, "containers")

    @property
    def ray(self) -> Manifest:
        """The container that runs Ray; {} where there is none."""
        return self.containers[RAY_CONTAINER] if self.containers else {}

    @property
    def restart_policy(self) -> str:
        """`Never` where none is given, as KubeRay needs it."""
        return str(self.spec.get("restartPolicy") or "Never")


@dataclass(frozen=True)
class RayObject:
    """A RayJob or RayCluster."""

    manifest: Manifest

    @cached_property
    def kind(self) -> str:
        """RayJob or RayCluster."""
        return str(self.manifest.get("kind"))

    @property
    def is_job(self) -> bool:
        """Whether it runs something by itself."""
        return self.kind == "RayJob"

    @cached_property
    def name(self) -> str:
        """In its metadata."""
        return name_of(self.manifest)

    @cached_property
    def spec(self) -> Manifest:
        """All that it is."""
        return mapping(self.manifest, "spec")

    @cached_property
    def mode(self) -> str:
        """How the job is submitted."""
        return str(self.spec.get("submissionMode", "K8sJobMode"))

    @cached_property
    def cluster(self) -> Manifest:
        """The cluster's spec; {} for a job on a cluster that is there already."""
        return mapping(self.spec, "rayClusterSpec") if self.is_job else self.spec

    @cached_property
    def at(self) -> str:
        """Path of the cluster's spec."""
        return "spec.rayClusterSpec" if self.is_job else "spec"

    @cached_property
    def autoscales(self) -> bool:
        """Whether Ray's autoscaler runs."""
        return self.cluster.get("enableInTreeAutoscaling") is True

    @cached_property
    def autoscales_v2(self) -> bool:
        """Whether KubeRay knows that it is version 2: said in the options, or by the older variable."""
        said = mapping(self.cluster, "autoscalerOptions").get("version")
        variable = env_names(self.head.ray).get("RAY_enable_autoscaler_v2", "")
        return self.autoscales and (said == "v2" or variable in ("1", "true"))

    @cached_property
    def selects_cluster(self) -> bool:
        """Whether the job runs on a cluster that is there already."""
        return bool(mapping(self.spec, "clusterSelector"))

    @cached_property
    def head(self) -> Pod:
        """The head's pod."""
        group = mapping(self.cluster, "headGroupSpec")
        return Pod(f"{self.at}.headGroupSpec", mapping(group, "template"))

    @cached_property
    def groups(self) -> list[Manifest]:
        """The groups of workers."""
        return listing(self.cluster, "workerGroupSpecs")

    def group_name(self, group: Manifest) -> str:
        """For messages."""
        return f"{self.at}.workerGroupSpecs[{group.get('groupName') or self.groups.index(group)}]"

    @cached_property
    def workers(self) -> list[Pod]:
        """The pods of the groups."""
        return [Pod(self.group_name(group), mapping(group, "template")) for group in self.groups]

    @cached_property
    def pods(self) -> list[Pod]:
        """All pods that the manifest describes."""
        submitter = mapping(self.spec, "submitterPodTemplate")
        own = [self.head, *self.workers] if self.cluster else []
        return [*own, Pod("spec.submitterPodTemplate", submitter)] if submitter and self.is_job else own

    @cached_property
    def annotations(self) -> Manifest:
        """In its metadata."""
        return mapping(self.manifest, "metadata", "annotations")

    def has_gate(self, gate: str) -> bool:
        """Whether the manifest says that its operator has a feature gate on."""
        return gate in str(self.annotations.get(GATES, "")).split(",")

    def gates(self) -> Iterator[str]:
        """The names in that annotation."""
        yield from (gate for gate in str(self.annotations.get(GATES, "")).split(",") if gate)
