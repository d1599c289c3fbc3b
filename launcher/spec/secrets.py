"""Keys that stand in a job file, where everyone who sees the job would see them. Pure; runs anywhere."""

from collections.abc import Iterator
from typing import NamedTuple

from launcher.formatting import find_secret, mask_secrets
from launcher.spec.document import KeyPath
from launcher.spec.job import JobSpec


class FoundSecret(NamedTuple):
    """A key in a value of a job file."""

    key: KeyPath
    shown: str
    """The value without it."""
    what: str


def secrets_in(job: JobSpec) -> Iterator[FoundSecret]:
    """Yield the values of a job that hold an account or a key in a URI."""
    yield from _secrets(job.model_dump(mode="json"), ())


def _secrets(value: object, path: KeyPath) -> Iterator[FoundSecret]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _secrets(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, (*path, index))
    elif isinstance(value, str) and (what := find_secret(value)) is not None:
        yield FoundSecret(path, mask_secrets(value), what)
