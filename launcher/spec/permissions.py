"""Permissions that only the user can give a job, and secrets that a job file must not hold. Runs anywhere.

A run directory may belong to somebody else or be writable by others, so its job.yaml grants nothing: only the user's
own job file and command line do. Commands that take a run call `grant_permissions`; a fork uses the permissions of
its own job file.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from launcher.errors import SpecError
from launcher.formatting import find_secret, mask_secrets
from launcher.spec.base import KeyPath, Section
from launcher.spec.job import JobSpec

PERMISSIONS: Mapping[str, str] = {
    "model.trust_remote_code": "runs Python code from the model's directory",
    "model.allow_pickle": "lets weights run code when they are loaded",
    "cluster.address": "sends data and environment to that cluster",
    "cluster.pass_env": "sends these environment variables to the workers",
    "data.files_below": "lets the data refer to any file below these directories",
    "logging.mlflow": "sends metrics and the credentials in MLflow's variables to that server",
}
"""Keys that need permission, each with what its value allows."""
_LOCAL_ADDRESSES = (None, "auto", "local")
"""Values of `cluster.address` that name no other machine."""
_ONLY_SUBMITTED = ("cluster.prepare", "cluster.code")


def grant_permissions(job: JobSpec, where: str, overrides: Sequence[str], is_training: bool = False) -> JobSpec:
    """Return a run's job with only those permissions that the command line gives it.

    Args:
        job: Job of the run, with the overrides applied.
        where: Path or URI of its file, for the message.
        overrides: Changes of the command line, `key.path=value`.
        is_training: True if the command trains, and so reports to trackers.

    Raises:
        SpecError: The file asks for permissions that the command line neither gives nor denies; one problem each.
    """
    typed = [override.partition("=")[0] for override in overrides]
    problems = []
    for key, allows in PERMISSIONS.items():
        value = _get_value(job, key)
        if value == _get_default(key) or (key == "cluster.address" and value in _LOCAL_ADDRESSES):
            continue
        # An override of the whole section was typed by the user as well.
        if any(key == name or key.startswith(f"{name}.") for name in typed):
            continue
        if key == "logging.mlflow" and not is_training:
            continue
        allow = _format_override(key, value)
        deny = _format_override(key, _get_default(key))
        problems.append(
            f"{where}: asks for {key}: {_to_yaml(value)}, which {allows}, and only you can permit that; add {allow} to "
            f"the command to allow it, or {deny} to run without it"
        )
    if problems:
        raise SpecError(tuple(problems))
    # These two run only in a submitted job, which has the user's own job file; a run's copy of them is never used.
    return _replace_values(job, {key: _get_default(key) for key in _ONLY_SUBMITTED})


def with_permissions_of(job: JobSpec, own: JobSpec) -> JobSpec:
    """Return a run's job with the permissions and the storage of the user's own job."""
    own_values = {key: _get_value(own, key) for key in (*PERMISSIONS, *_ONLY_SUBMITTED)}
    return _replace_values(job, {**own_values, "output.storage": own.output.storage})


def permission_overrides(job: JobSpec, words: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the overrides that give a run the permissions of the user's own job, except those that `words` set."""
    values = {key: _get_value(job, key) for key in PERMISSIONS if not any(word.startswith(f"{key}=") for word in words)}
    return tuple(f"{key}={_to_yaml(value)}" for key, value in values.items() if value != _get_default(key))


def _format_override(key: str, value: object) -> str:
    # The user copies it from the message into a shell.
    return shlex.quote(f"{key}={_to_yaml(value)}")


def _to_yaml(value: object) -> str:
    # JSON is also YAML, so an override reads it back.
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _get_value(job: JobSpec, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(job, section), name)


def _get_default(key: str) -> object:
    section, name = key.split(".")
    kind = JobSpec.model_fields[section].annotation
    assert isinstance(kind, type) and issubclass(kind, Section)
    # All these fields have plain defaults. One with a default_factory would be PydanticUndefined here, and equal to
    # nothing.
    return kind.model_fields[name].default


def _replace_values(job: JobSpec, values: Mapping[str, object]) -> JobSpec:
    for key, value in values.items():
        section, name = key.split(".")
        # model_copy validates nothing, so only values of a validated job may come here.
        job = job.model_copy(update={section: getattr(job, section).model_copy(update={name: value})})
    return job


class FoundSecret(NamedTuple):
    """A text of a job file or manifest with a secret in a URI; everyone who sees the job would see it."""

    key: KeyPath
    shown: str
    """The value with the secret masked."""
    what: str


def find_secrets(value: object, path: KeyPath = ()) -> Iterator[FoundSecret]:
    """Yield the texts that hold credentials or an access key in a URI.

    Args:
        value: Plain values, such as those of `JobSpec.model_dump`.
        path: Keys that lead to the value.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from find_secrets(inner, (*path, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from find_secrets(inner, (*path, index))
    elif isinstance(value, str):
        secret = find_secret(value)
        if secret is not None:
            yield FoundSecret(path, mask_secrets(value), secret)
