"""Task parameters that only the training data can tell: the classes and their weights. Runs on the client and the head.

The whole label column is read, in parts. For large data the result is cached in the storage, keyed by the files and the
parameters, so that resuming a run with a thousand million rows does not read them all again.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from launcher.data.splits import Split
from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record
from launcher.rundir.uri import join
from launcher.spec.job import JobSpec, TaskSpec
from launcher.tasks.base import Task

_MIN_CACHED_ROWS = 1_000_000
"""Fewer rows are read faster than the cache is looked up."""
_LOG = logging.getLogger("launcher")


class InferredParamsRecord(Record):
    """.cache/learned/KEY.json: parameters of a task, those inferred from the data included."""

    parameters: dict[str, object]


def infer_task_params(job: JobSpec, task: Task, train: Split) -> JobSpec:
    """Return the job with all parameters of its task, inferred from the training data where the job leaves them out.

    Raises:
        DataError: The data does not fit the task.
    """
    cache = RunDir(join(job.output.storage, ".cache/learned"))
    name = f"{_cache_key(job, task, train)}.json"
    is_cached = train.rows >= _MIN_CACHED_ROWS
    parameters = _load(cache, name) if is_cached else None
    if parameters is None:
        inferred = task.infer_params(_Columns(train))
        parameters = inferred.model_dump(mode="json")
        # Equal parameters: the data added nothing, so there is nothing to save.
        if is_cached and inferred != task.params:
            _save(cache, name, parameters)
    return job.model_copy(update={"task": TaskSpec.model_validate({"type": job.task.type, **parameters})})


@dataclass(frozen=True)
class _Columns:
    """Training split as `tasks.base.TrainingColumns`."""

    split: Split

    @property
    def names(self) -> list[str]:
        return list(self.split.schema.names)

    def type_of(self, name: str) -> pa.DataType:
        return self.split.schema.field(name).type

    def pieces(self, name: str) -> Iterator[pa.Array]:
        return self.split.iter_column(name)

    def class_names(self, name: str) -> tuple[str, ...] | None:
        return dict(self.split.class_names).get(name)


def _cache_key(job: JobSpec, task: Task, train: Split) -> str:
    # `version`, not the fingerprint, which does not change with the values of a column.
    facts = [job.task.type, task.params.model_dump(mode="json"), train.version, train.class_names, str(train.schema)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _load(cache: RunDir, name: str) -> dict[str, object] | None:
    try:
        record = cache.find_record(name, InferredParamsRecord)
    except RunError as error:
        _LOG.warning("%s: the label column is read again", error.message)
        return None
    return None if record is None else record.parameters


def _save(cache: RunDir, name: str, parameters: dict[str, object]) -> None:
    try:
        cache.write_record(name, InferredParamsRecord(parameters=parameters))
    except RunError as error:  # the next command reads the data again
        _LOG.warning("%s", error.message)
