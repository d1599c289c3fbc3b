"""Views of manifests that may hold anything: a missing or mistyped part reads as empty. Pure.

The API server refuses values of the wrong type by itself; the rules are about what it lets through.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.submit.kubernetes.manifest import GATES, Manifest, name_of


def mapping(value: Any, *keys: str) -> Manifest:  # a part of a manifest
    """Return the mapping below some keys; {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def listing(value: Any, *keys: str) -> list[Manifest]:  # a part of a manifest
    """Return the mappings of a list below some keys; [] where there is none."""
    items = mapping(value, *keys[:-1]).get(keys[-1])
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def number(value: Any, key: str) -> int | None:  # a part of a manifest
    """Return a whole number; None where there is none."""
    count = mapping(value).get(key)
    # true is an int in Python.
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def below(where: str, value: int | None, least: int = 0) -> Iterator[str]:
    """Yield a sentence if a number is below the least that is allowed."""
    if value is not None and value < least:
        yield f"{where} is {value}, which is below {least}; give {least} or more"


def env_names(container: Manifest) -> dict[str, str]:
    """Return a container's environment variables; "" for a value from a Secret or elsewhere."""
    return {str(entry.get("name")): str(entry.get("value", "")) for entry in listing(container, "env")}


def version(text: str) -> tuple[int, ...] | None:
    """Return 2.60.0 as numbers to compare; None for what is not a version."""
    return tuple(map(int, text.split("."))) if re.fullmatch(r"[0-9]+\.[0-9]+(\.[0-9]+)?", text) else None


@dataclass(frozen=True)
class Pod:
    """A pod template.

    Args:
        where: Path of its group in the manifest.
        template: Metadata and spec.
    """

    where: str
    template: Manifest

    @property
    def spec(self) -> Manifest:
        """Return the spec of the pod."""
        return mapping(self.template, "spec")

    @property
    def containers(self) -> list[Manifest]:
        """Return the pod's containers, Ray's first."""
        return listing(self.spec, "containers")

    @property
    def ray(self) -> Manifest:
        """Return the container that KubeRay starts Ray in, the first; {} where there is none."""
        return self.containers[0] if self.containers else {}

    @property
    def restart_policy(self) -> str:
        """Return the restart policy; `Never` where it is unset, as KubeRay defaults it."""
        return str(self.spec.get("restartPolicy") or "Never")


# Frozen, and cached all the same: cached_property writes to `__dict__` directly. With slots=True it would fail.
@dataclass(frozen=True)
class RayObject:
    """A RayJob or RayCluster."""

    manifest: Manifest

    @cached_property
    def kind(self) -> str:
        """Return RayJob or RayCluster."""
        return str(self.manifest.get("kind"))

    @property
    def is_job(self) -> bool:
        """Return whether it is a RayJob."""
        return self.kind == "RayJob"

    @cached_property
    def name(self) -> str:
        """Return the name in its metadata."""
        return name_of(self.manifest)

    @cached_property
    def spec(self) -> Manifest:
        """Return its spec."""
        return mapping(self.manifest, "spec")

    @cached_property
    def mode(self) -> str:
        """Return the submission mode of a job."""
        return str(self.spec.get("submissionMode", "K8sJobMode"))

    @cached_property
    def cluster(self) -> Manifest:
        """Return the spec of the Ray cluster; {} for a job on an existing cluster."""
        return mapping(self.spec, "rayClusterSpec") if self.is_job else self.spec

    @cached_property
    def at(self) -> str:
        """Return the path of the cluster's spec."""
        return "spec.rayClusterSpec" if self.is_job else "spec"

    @cached_property
    def autoscales(self) -> bool:
        """Return whether Ray's autoscaler runs."""
        return self.cluster.get("enableInTreeAutoscaling") is True

    @cached_property
    def autoscales_v2(self) -> bool:
        """Return whether the autoscaler is version 2, set by the options or by the older variable."""
        # Version 2 counts only when it is written down, whatever the Ray in the image defaults to.
        option = mapping(self.cluster, "autoscalerOptions").get("version")
        variable = env_names(self.head.ray).get("RAY_enable_autoscaler_v2", "")
        return self.autoscales and (option == "v2" or variable in ("1", "true"))

    @cached_property
    def selects_cluster(self) -> bool:
        """Return whether the job runs on an existing cluster."""
        return bool(mapping(self.spec, "clusterSelector"))

    @cached_property
    def head(self) -> Pod:
        """Return the head's pod."""
        group = mapping(self.cluster, "headGroupSpec")
        return Pod(f"{self.at}.headGroupSpec", mapping(group, "template"))

    @cached_property
    def groups(self) -> list[Manifest]:
        """Return the groups of workers."""
        return listing(self.cluster, "workerGroupSpecs")

    def group_name(self, group: Manifest) -> str:
        """Return the path of a group, for messages."""
        return f"{self.at}.workerGroupSpecs[{group.get('groupName') or self.groups.index(group)}]"

    @cached_property
    def workers(self) -> list[Pod]:
        """Return the pods of the groups."""
        return [Pod(self.group_name(group), mapping(group, "template")) for group in self.groups]

    @cached_property
    def pods(self) -> list[Pod]:
        """Return all pods that the manifest describes."""
        submitter = mapping(self.spec, "submitterPodTemplate")
        pods = [self.head, *self.workers] if self.cluster else []
        return [*pods, Pod("spec.submitterPodTemplate", submitter)] if submitter and self.is_job else pods

    @cached_property
    def annotations(self) -> Manifest:
        """Return the annotations in its metadata."""
        return mapping(self.manifest, "metadata", "annotations")

    @cached_property
    def gates(self) -> list[str]:
        """Return the feature gates that the manifest confirms its operator has on."""
        return [gate for gate in str(self.annotations.get(GATES, "")).split(",") if gate]
