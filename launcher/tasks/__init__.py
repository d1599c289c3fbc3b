"""Look-up of tasks by name: `task.type` of the job file is a file name of this folder, or an import path.

Runs anywhere. Read `base.py` next for what a task is.
"""

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
from launcher.tasks.base import Task
from launcher.tasks.params import TaskParams

_NOT_TASKS = (
    "__init__", "answers", "base", "completions", "conversations", "documents", "padding", "params", "results",
    "samples", "targets", "text_pairs",
)  # fmt: skip


def task_names() -> list[str]:
    """Return the names of the built-in tasks, sorted."""
    files = Path(__file__).parent.glob("*.py")
    # Files are listed, not imported: a task costs its imports only when it is looked up.
    return sorted(file.stem.replace("_", "-") for file in files if file.stem not in _NOT_TASKS)


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Args:
        name: Name of a built-in task, or the import path `package.module:Class` of any other.

    Raises:
        UserError: There is no such task, or its module cannot be imported.
    """
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            task: type[Task] = getattr(importlib.import_module(module_name), class_name)
        except (ModuleNotFoundError, AttributeError, ValueError) as error:
            raise UserError(
                f"task.type is {name}, which cannot be imported ({error}); put the module on PYTHONPATH"
            ) from error
        except Exception as error:  # the user's own module runs at import and may raise anything
            # Messages of imports may have many lines; an error of the launcher is one sentence.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"task.type is {name}, which cannot be imported ({reason}); fix the module {module_name}"
            ) from error
        # By its `Params`: `issubclass` with a protocol that is not `runtime_checkable` raises TypeError.
        if not (isinstance(task, type) and issubclass(getattr(task, "Params", type(None)), TaskParams)):
            raise UserError(f"task.type is {name}, which is not a task; see `launcher/tasks/base.py` for the protocol")
        return task
    if name not in task_names():
        raise UserError(not_one_of("task.type", name, task_names()))
    module = importlib.import_module(f"launcher.tasks.{name.replace('-', '_')}")
    return module.TASK  # type: ignore[no-any-return]  # every task file has it (tests/tasks/test_contract.py)


def params_class(name: str) -> type[TaskParams]:
    """Return the model of a task's parameters; `load_job` takes this function."""
    return task_class(name).Params


def params_models() -> Mapping[str, type[TaskParams]]:
    """Return the parameters of all built-in tasks by name, for the JSON Schema of the job file."""
    return {name: params_class(name) for name in task_names()}


def build_task(job: JobSpec) -> Task:
    """Return the task of a job file.

    Raises:
        UserError: There is no such task, or its parameters are invalid.
    """
    kind = task_class(job.task.type)
    try:
        params = kind.Params.model_validate(job.task.parameters())
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"task.{'.'.join(map(str, first['loc']))}: {first['msg']}; fix the job file") from error
    task = kind(params, job.model, job.seed)
    # Set after the constructor, whose signature all tasks share. A task without it would read no file at all.
    task.cell_source = CellSource.from_data(job.data)
    return task


@dataclass(frozen=True)
class TaskFacts:
    """Summary of a task, as `launcher tasks` displays it."""

    summary: str
    inputs: tuple[str, ...]
    """Columns that the model reads, by their default names."""
    targets: tuple[str, ...]
    metrics: tuple[str, ...]
    """Names of the metrics; the first selects the best checkpoint."""
    parameters: tuple[tuple[str, str, str], ...]
    """Key, default and meaning."""


def describe_task(name: str) -> TaskFacts:
    """Return the summary of a task with its default parameters.

    Raises:
        UserError: There is no such task.
    """
    kind = task_class(name)
    # The model is never loaded: constructors load nothing (`Task.__init__`).
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
