"""What a job may do with the user's machine and secrets: granted by the user alone. Runs anywhere.

A run directory may be another person's, or writable by others, so its job.yaml grants nothing: the user's own job file
and the command line do. Commands that take a run go through `granted`; a fork takes its job file's permissions.
"""

import json
import shlex
from collections.abc import Mapping, Sequence

from launcher.errors import SpecError
from launcher.spec.base import Section
from launcher.spec.job import JobSpec

PERMISSIONS: Mapping[str, str] = {
    "model.trust_remote_code": "runs Python code that lies beside the model",
    "model.allow_pickle": "lets weights run code when they are loaded",
    "cluster.address": "sends data and environment to that cluster",
    "cluster.pass_env": "sends these environment variables to the workers",
    "data.files_below": "lets data name any file below them",
    "logging.mlflow": "sends numbers and the account of MLflow's variables to that server",
}
"""Each key with what its value allows."""
_ADDRESSES = (None, "auto", "local")
"""Values of `cluster.address` that name no other machine."""
_ONLY_SUBMITTED = ("cluster.prepare", "cluster.code")


def granted(job: JobSpec, where: str, overrides: Sequence[str], is_training: bool = False) -> JobSpec:
    """Return a run's job with the permissions that the command line gave it.

    Args:
        job: Job of the run, with the overrides.
        where: Path or URI of its file, for the message.
        overrides: `key.path=value` of the command line.
        is_training: Whether the command trains it, which reports to trackers.

    Raises:
        SpecError: The file asks for a permission that the command line neither gives nor takes; names each.
    """
    typed = [override.partition("=")[0] for override in overrides]
    problems = []
    for key, allows in PERMISSIONS.items():
        value = _value(job, key)
        if value == _default(key) or (key == "cluster.address" and value in _ADDRESSES):
            continue
        if any(key == name or key.startswith(f"{name}.") for name in typed):
            continue
        if key == "logging.mlflow" and not is_training:
            continue
        problems.append(
            f"{where}: asks for {key}: {_yaml(value)}, which {allows}, and only you can permit that; add "
            f"{_override(key, value)} to the command to do so, or {_override(key, _default(key))} to do without"
        )
    if problems:
        raise SpecError(tuple(problems))
    return _replaced(job, {key: _default(key) for key in _ONLY_SUBMITTED})


def with_permissions_of(job: JobSpec, own: JobSpec) -> JobSpec:
    """Return a run's job with the permissions, and the storage, of the user's own job."""
    own_values = {key: _value(own, key) for key in (*PERMISSIONS, *_ONLY_SUBMITTED)}
    return _replaced(job, {**own_values, "output.storage": own.output.storage})


def as_overrides(job: JobSpec, words: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the overrides that give a run what the user's own job permits, but for what the words set themselves."""
    values = {key: _value(job, key) for key in PERMISSIONS if not any(word.startswith(f"{key}=") for word in words)}
    return tuple(f"{key}={_yaml(value)}" for key, value in values.items() if value != _default(key))


def _override(key: str, value: object) -> str:
    return shlex.quote(f"{key}={_yaml(value)}")


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _value(job: JobSpec, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(job, section), name)


def _default(key: str) -> object:
    section, name = key.split(".")
    kind = JobSpec.model_fields[section].annotation
    assert isinstance(kind, type) and issubclass(kind, Section)
    return kind.model_fields[name].default


def _replaced(job: JobSpec, values: Mapping[str, object]) -> JobSpec:
    for key, value in values.items():
        section, name = key.split(".")
        job = job.model_copy(update={section: getattr(job, section).model_copy(update={name: value})})
    return job
