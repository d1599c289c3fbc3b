"""Manifests as plain values, and as YAML that kubectl reads the same. Runs on the client."""

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

# JSON whose form depends on the kind of object; the API server knows the schema.
Manifest: TypeAlias = dict[str, Any]

KINDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters", "ConfigMap": "configmaps"}
"""Kinds of objects the launcher makes, with the last part of their URL."""

_WORDS = {"", "~", "null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_PLAIN = re.compile(r"[A-Za-z/(]([A-Za-z0-9 ._/()+=%@-]|:(?=[A-Za-z0-9/]))*(?<! )")


def name_of(manifest: Mapping[str, Any]) -> str:
    """The name in the metadata; "" where there is none."""
    metadata = manifest.get("metadata")
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def dump_manifests(manifests: Sequence[Manifest], comment: str = "") -> str:
    """A multi-document YAML stream.

    Args:
        manifests: the objects, in the order in which they should be applied.
        comment: lines put at the top.
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
    """Quotes what YAML 1.1, which Kubernetes reads, would take for something else than text."""

    def represent_text(self, text: str) -> ScalarNode:
        if "\n" in text and text.replace("\n", "").isprintable() and not text[0].isspace():
            return self.represent_scalar("tag:yaml.org,2002:str", text, style="|")
        plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')

    def ignore_aliases(self, _data: object) -> bool:
        return True  # an anchor is shorter, and unreadable


_Representer.add_representer(str, _Representer.represent_text)


def read_manifests(path: Path) -> list[Manifest]:
    """The objects of a file, or of all YAML files of a directory in the order of their names.

    Raises:
        ClusterError: it cannot be read, or holds something that is no object.
    """
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
    if not files:
        raise ClusterError(
            f"{path}: there is no .yaml file in this directory; write some with `launcher kube render -o`"
        )
    return [manifest for file in files for manifest in _read(file)]


def _read(path: Path) -> Iterable[Manifest]:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # as kubectl reads it: `yes` is true
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MantissaNoDotYAML1_1Warning)  # 5e-5 is a number to kubectl too
            documents = list(yaml.load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: cannot be read ({error}); check the path") from error
    except YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(f"{path}: not valid YAML ({reason}); mend it there") from error
    for number, document in enumerate(documents, start=1):
        if document is None:
            continue
        if not isinstance(document, dict) or "kind" not in document or "apiVersion" not in document:
            raise ClusterError(
                f"{path}: document {number} is no Kubernetes object (it has no apiVersion and kind); remove it"
            )
        yield document


def is_manifest(path: Path) -> bool:
    """Whether a path holds manifests, and no job file."""
    if path.is_dir():
        return True
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(r"^apiVersion:", text, re.MULTILINE) is not None
