"""A job file that is meant for pods: read, overridden, and checked for paths that pods do not have. On the client."""

from collections.abc import Sequence
from pathlib import Path

from launcher.errors import SpecError
from launcher.spec.base import KeyPath
from launcher.spec.job import JobSpec
from launcher.spec.loader import TaskParamsLookup, apply_override, load_job, read_document
from launcher.spec.messages import Problem
from launcher.submit.kubernetes.places import misplaced


def load_for_pods(path: Path, overrides: Sequence[str], params_of: TaskParamsLookup | None) -> JobSpec:
    """A job file as pods would see it.

    Args:
        path: the job file.
        overrides: `key.path=value`.
        params_of: checks the task's parameters; None takes them as they are.

    Raises:
        SpecError: all that is wrong with it, among that every path the pods would not find.
    """
    job = load_job(path, overrides, params_of)
    spec = job.cluster.kubernetes
    if spec is None:
        raise SpecError((_problem(path, overrides, ("cluster", "kubernetes"), _MISSING),))
    found = misplaced(job, spec)
    if found:
        raise SpecError(tuple(_problem(path, overrides, key, sentence) for key, sentence in found))
    return job


_MISSING = (
    "cluster.kubernetes is missing; add it with at least an image: `kubernetes: {image: registry/launcher:0.1.0}`"
)


def _problem(path: Path, overrides: Sequence[str], key: KeyPath, sentence: str) -> str:
    document = read_document(path)
    for position, override in enumerate(overrides):
        apply_override(document, override, position)
    return str(Problem(document.place(key), sentence))
