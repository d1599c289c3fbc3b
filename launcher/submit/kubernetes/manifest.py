"""Manifests as plain values, their names, and as YAML that kubectl reads the same way. Runs on the client."""

import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MantissaNoDotYAML1_1Warning, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from launcher.errors import ClusterError
from launcher.spec.job import JobSpec

# JSON whose form depends on the kind of object; the API server knows the schema.
Manifest: TypeAlias = dict[str, Any]

KINDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters", "ConfigMap": "configmaps"}
"""Kinds of objects that the launcher creates, with the last part of their URL."""

GATES = "launcher/feature-gates"
"""Annotation that names the operator's feature gates a manifest relies on."""

# YAML 1.1 reads these words as null or a boolean; YAML 1.2, the version of the job file, knows fewer of them.
_WORDS = {"", "~", "null", "true", "false", "yes", "no", "on", "off", "y", "n"}
# KubeRay's limit for a RayJob: with KubeRay's suffixes the name must still fit a label.
_LONGEST = 47
_HASH = 6
# Texts that are left without quotes. No number begins with such a character, and a colon counts only inside a word (a
# URI, an image's tag).
_PLAIN = re.compile(r"[A-Za-z/(]([A-Za-z0-9 ._/()+=%@-]|:(?=[A-Za-z0-9/]))*(?<! )")


def name_of(manifest: Mapping[str, Any]) -> str:
    """Return the name in the metadata; "" where there is none."""
    metadata = manifest.get("metadata")
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def job_name(job: JobSpec) -> str:
    """Return the RayJob's name: the run's where KubeRay takes it, otherwise one derived from it that is unique.

    Returns:
        RFC 1035 label of at most 47 characters; where it differs from the run's name it ends with a hash of that.
    """
    spec = job.cluster.kubernetes
    if spec is not None and spec.name is not None:
        return spec.name
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if not name or not name[0].isalpha():
        name = f"run-{name}".rstrip("-")
    if name == job.name and len(name) <= _LONGEST:
        return name
    # Not Python's hash(), which differs in each process: every command must find the same name. Without the digest, the
    # runs My_run and my-run would share one RayJob.
    digest = hashlib.sha256(job.name.encode()).hexdigest()[:_HASH]
    return f"{name[: _LONGEST - _HASH - 1].rstrip('-')}-{digest}"


def config_name(name: str) -> str:
    """Return the name of the ConfigMap with the job file."""
    return f"{name}-job"


def quantity(mib: int) -> str:
    """Return an amount of memory as Kubernetes writes it."""
    return f"{mib}Mi" if mib % 1024 else f"{mib // 1024}Gi"


def dump_manifests(manifests: Sequence[Manifest], comment: str = "") -> str:
    """Return a multi-document YAML stream.

    Args:
        manifests: Objects, in the order in which they must be applied.
        comment: Lines at the top.
    """
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return head + "---\n".join(_dump(manifest) for manifest in manifests)


def _dump(manifest: Manifest) -> str:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=2, offset=0)  # as kubectl writes it
    text = io.StringIO()
    yaml.dump(manifest, text)
    return text.getvalue()


class _Representer(RoundTripRepresenter):
    """A YAML writer that quotes text which YAML 1.1, Kubernetes' version, would read as another type."""

    def represent_text(self, text: str) -> ScalarNode:
        # A block keeps the job file readable. It cannot hold control characters, which need double quotes, and a space
        # at its start would be taken for indentation.
        if "\n" in text and text.replace("\n", "").isprintable() and not text[0].isspace():
            return self.represent_scalar("tag:yaml.org,2002:str", text, style="|")
        plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')

    def ignore_aliases(self, _data: object) -> bool:
        return True  # anchors and aliases are hard to read


_Representer.add_representer(str, _Representer.represent_text)


def read_manifests(path: Path) -> list[Manifest]:
    """Return the objects of a file, or of all YAML files of a directory in the order of their names.

    Raises:
        ClusterError: The path cannot be read, or holds something that is not an object.
    """
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
    if not files:
        raise ClusterError(f"{path}: this directory has no .yaml file; write some with `launcher kube render -o`")
    return [manifest for file in files for manifest in _read(file)]


def _read(path: Path) -> Iterable[Manifest]:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # as kubectl reads it: `yes` is true
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MantissaNoDotYAML1_1Warning)  # kubectl reads 5e-5 as a number too
            documents = list(yaml.load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: cannot be read ({error}); check the path") from error
    except YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(f"{path}: not valid YAML ({reason}); fix it there") from error
    for number, document in enumerate(documents, start=1):
        if document is None:
            continue
        if not isinstance(document, dict) or "kind" not in document or "apiVersion" not in document:
            raise ClusterError(
                f"{path}: document {number} is not a Kubernetes object (it has no apiVersion and kind); remove it"
            )
        yield document


def is_manifest(path: Path) -> bool:
    """Return whether a path holds manifests rather than a job file."""
    if path.is_dir():
        return True
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    # By its text, since the path may hold a job file that is not valid YAML: its own reader reports that better.
    return re.search(r"^apiVersion:", text, re.MULTILINE) is not None
