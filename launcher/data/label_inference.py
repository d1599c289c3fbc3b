"""What only the training data tells of a task: its classes and their weights. Client and head.

The whole label column is read for it, a part at a time. What came of a large one is kept in the storage's cache, by
files and parameters, so that a run of a thousand million rows goes on without reading them all again.
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

_WORTH_KEEPING = 1_000_000
"""Rows; fewer are read again sooner than one looks for a file."""
_LOG = logging.getLogger("launcher")


class LearnedRecord(Record):
    """.cache/learned/KEY.json: parameters of a task, with what the data told."""

    parameters: dict[str, object]


def infer_task_params(job: JobSpec, task: Task, train: Split) -> JobSpec:
    """The job with all parameters of its task.

    Raises:
        DataError: the data does not fit the task.
    """
    cache, name = RunDir(join(job.output.storage, ".cache/learned")), f"{_key(job, task, train)}.json"
    worth = train.rows >= _WORTH_KEEPING
    parameters = _kept(cache, name) if worth else None
    if parameters is None:
        found = task.infer_params(_Columns(train))
        parameters = found.model_dump(mode="json")
        if worth and found != task.params:
            _keep(cache, name, parameters)
    return job.model_copy(update={"task": TaskSpec.model_validate({"type": job.task.type, **parameters})})


@dataclass(frozen=True)
class _Columns:
    """The training split as `tasks.base.TrainingColumns`."""

    split: Split

    @property
    def names(self) -> list[str]:
        return list(self.split.schema.names)

    def type_of(self, name: str) -> pa.DataType:
        return self.split.schema.field(name).type

    def pieces(self, name: str) -> Iterator[pa.Array]:
        return self.split.pieces(name)

    def class_names(self, name: str) -> tuple[str, ...] | None:
        return dict(self.split.class_names).get(name)


def _key(job: JobSpec, task: Task, train: Split) -> str:
    facts = [job.task.type, task.params.model_dump(mode="json"), train.version, train.class_names, str(train.schema)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _kept(cache: RunDir, name: str) -> dict[str, object] | None:
    try:
        found = cache.find_record(name, LearnedRecord)
    except RunError as error:
        _LOG.warning("%s: the data is read anew", error.message)
        return None
    return None if found is None else found.parameters


def _keep(cache: RunDir, name: str, parameters: dict[str, object]) -> None:
    try:
        cache.write_record(name, LearnedRecord(parameters=parameters))
    except RunError as error:  # the next command reads the data again
        _LOG.warning("%s", error.message)
