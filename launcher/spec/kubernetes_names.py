"""Names and numbers that Kubernetes allows, as types of the fields of `cluster.kubernetes:`. Runs anywhere."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from launcher.spec.base import PATTERN_WORDS

ObjectName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$",
        json_schema_extra={
            PATTERN_WORDS: "no name of a Kubernetes object: lower-case letters, digits, dashes and dots, with a letter "
            "or digit at both ends"
        },
    ),
]
"""Name of a Secret, a claim, a service account ... (an RFC 1123 subdomain)."""

JobName = Annotated[
    str,
    Field(
        pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$",
        json_schema_extra={
            PATTERN_WORDS: "no name KubeRay takes: at most 47 lower-case letters, digits and dashes, with a letter "
            "first and no dash last"
        },
    ),
]
"""Name of a RayJob: an RFC 1035 label that leaves KubeRay room for its suffixes."""

Namespace = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        json_schema_extra={PATTERN_WORDS: "no namespace: at most 63 lower-case letters, digits and dashes"},
    ),
]
"""An RFC 1123 label."""

Resource = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$",
        json_schema_extra={PATTERN_WORDS: "no resource of a device plug-in, such as nvidia.com/gpu or rdma/ib"},
    ),
]
"""Extended resource that a device plug-in offers."""

ImageName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]*$",
        json_schema_extra={PATTERN_WORDS: "no name of an image, such as registry.example.com/launcher:0.1.0"},
    ),
]
"""Image in a registry, with its tag or digest."""

RayVersion = Annotated[
    str,
    Field(pattern=r"^2\.[0-9]+\.[0-9]+$", json_schema_extra={PATTERN_WORDS: "no release of Ray 2, such as 2.60.0"}),
]
"""Three numbers."""

ArchiveUri = Annotated[
    str,
    Field(
        # Nothing a shell acts on: the submitter's shell sees it.
        pattern=r"^(https|s3|gs|azure|abfss)://[A-Za-z0-9._~:/?@=%+-]+\.(zip|tar\.gz|tgz)$",
        json_schema_extra={PATTERN_WORDS: "no URI of a .zip, .tar.gz or .tgz (https, s3, gs, azure, abfss)"},
    ),
]
"""What Ray can fetch and unpack."""

SecretEntry = Annotated[
    str,
    Field(
        pattern=r"^[-._a-zA-Z0-9]+$",
        json_schema_extra={PATTERN_WORDS: "no key of a Secret: letters, digits, dashes, dots and underscores"},
    ),
]
"""Key in a Secret."""

LabelValue = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$",
        json_schema_extra={PATTERN_WORDS: "no value of a label: at most 63 letters, digits, dashes, dots, underscores"},
    ),
]
"""Text that becomes a label's value."""

Interfaces = Annotated[
    str,
    Field(
        pattern=r"^[\^=]?[A-Za-z0-9_.,:-]+$",
        json_schema_extra={
            PATTERN_WORDS: "no list of interfaces as NCCL reads it, such as eth0, mlx5_0,mlx5_1 or ^docker"
        },
    ),
]
"""Network interfaces or adapters."""

HostPort = Annotated[
    str,
    Field(
        pattern=r"^(rediss?://)?[A-Za-z0-9.-]+:[0-9]+$",
        json_schema_extra={PATTERN_WORDS: "no HOST:PORT, such as redis:6379 or rediss://redis:6380"},
    ),
]
"""Address of a Redis."""

RelativePath = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_@+-][A-Za-z0-9._@+/-]*$",
        json_schema_extra={PATTERN_WORDS: "no path inside a volume, such as runs/team-a"},
    ),
]
"""Directory inside a volume."""

_KEY_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_KEY_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def is_label_key(key: str) -> bool:
    """Whether Kubernetes takes a key of labels and annotations: `name` or `prefix/name`."""
    prefix, slash, name = key.rpartition("/")
    return bool(_KEY_NAME.fullmatch(name) and (not slash or _KEY_PREFIX.fullmatch(prefix)))


def is_label_value(value: str) -> bool:
    """Whether Kubernetes takes a value of a label."""
    return bool(_VALUE.fullmatch(value))


def _good_keys(values: dict[str, str]) -> dict[str, str]:
    for key in values:
        if not is_label_key(key):
            raise ValueError(f"{key!r} is no key Kubernetes takes; write name or prefix/name, at most 63 letters")
    return values


def _good_labels(values: dict[str, str]) -> dict[str, str]:
    for key, value in _good_keys(values).items():
        if not is_label_value(value):
            raise ValueError(
                f"{key} has the value {value!r}, which is no value of a label; use at most 63 letters, digits, dashes, "
                "dots and underscores, with a letter or digit at both ends"
            )
    return values


Labels = Annotated[dict[str, str], AfterValidator(_good_labels)]
"""Labels, or what they must be: keys and short values."""

Annotations = Annotated[dict[str, str], AfterValidator(_good_keys)]
"""Annotations: keys and any text."""
