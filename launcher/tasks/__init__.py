"""Tasks by name: the file name is the name in the job file. Runs anywhere; read `base.py` next."""

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from launcher.errors import UserError
from launcher.models.cells import CellSource
from launcher.spec.job import JobSpec
from launcher.spec.messages import not_one_of
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task, TaskParams

_SHARED = ("__init__", "base", "conversations", "padding", "targets")


def task_names() -> list[str]:
    """Names of the launcher's own tasks."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem.replace("_", "-") for file in files if file.stem not in _SHARED)


def task_class(name: str) -> type[Task]:
    """The class of a task, by its name or by an import path `package.module:Class`.

    Raises:
        UserError: there is no such task.
    """
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found: type[Task] = getattr(importlib.import_module(module_name), class_name)
        except (ModuleNotFoundError, AttributeError, ValueError) as error:
            raise UserError(
                f"task.type is {name}, which cannot be imported ({error}); put the module on PYTHONPATH"
            ) from error
        except Exception as error:  # process border: the user's own module, whatever it does
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"task.type is {name}, which cannot be imported ({what}); mend the module {module_name}"
            ) from error
        if not (isinstance(found, type) and issubclass(getattr(found, "Params", type(None)), TaskParams)):
            raise UserError(f"task.type is {name}, which is not a task; see `launcher/tasks/base.py` for what one is")
        return found
    if name not in task_names():
        raise UserError(not_one_of("task.type", name, task_names()))
    module = importlib.import_module(f"launcher.tasks.{name.replace('-', '_')}")
    return module.TASK  # type: ignore[no-any-return]  # every task file names its class so; the contract test checks


def params_of(name: str) -> type[TaskParams]:
    """The model of a task's own part of the job file; what `load_job` asks for."""
    return task_class(name).Params


def params_models() -> Mapping[str, type[TaskParams]]:
    """The parameters of all the launcher's own tasks, for the JSON Schema."""
    return {name: params_of(name) for name in task_names()}


def build_task(job: JobSpec) -> Task:
    """The task of a job file.

    Raises:
        UserError: the task's parameters are wrong.
    """
    kind = task_class(job.task.type)
    try:
        params = kind.Params.model_validate(job.task.parameters())
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"task.{'.'.join(map(str, first['loc']))}: {first['msg']}; mend the job file") from error
    task = kind(params, job.model, job.seed)
    task.places = CellSource.of(job.data)
    return task


@dataclass(frozen=True)
class TaskFacts:
    """A task as `launcher tasks` shows it."""

    summary: str
    inputs: tuple[str, ...]
    """Columns the model sees, by their default names."""
    targets: tuple[str, ...]
    metrics: tuple[str, ...]
    """The first decides which checkpoint is best."""
    parameters: tuple[tuple[str, str, str], ...]
    """Key, default and meaning."""


def describe(name: str) -> TaskFacts:
    """What a task reads, takes and measures, with its default parameters.

    Raises:
        UserError: there is no such task.
    """
    kind = task_class(name)
    task = kind(kind.Params(), ModelSpec(name="none"), 0)
    fields = kind.Params.model_fields.items()
    return TaskFacts(
        summary=(kind.__doc__ or "").strip().splitlines()[0] if kind.__doc__ else "",
        inputs=task.input_columns,
        targets=task.target_columns,
        metrics=tuple(task.metric_modes),
        parameters=tuple(
            (key, _default(field.default), " ".join((field.description or "").split())) for key, field in fields
        ),
    )


def _default(value: object) -> str:
    if isinstance(value, BaseModel):
        return ", ".join(f"{key} {_default(inner)}" for key, inner in value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
