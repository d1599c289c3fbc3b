"""A YAML job file and overrides -> `JobSpec`, with all problems at once; and back to YAML. Runs anywhere.

`spec/document.py` reads the file, `spec/messages.py` words what is wrong with it, `spec/job.py` is the model.
"""

import io
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from launcher.errors import SpecError, UserError
from launcher.spec.document import Document, KeyPath, Problem, apply_override, dotted, one_line, read_document
from launcher.spec.job import JobSpec
from launcher.spec.messages import problems_of
from launcher.spec.schema import JobKeys, Schema, definitions

_LARGEST = 2**63 - 1
_BAD_TEXT = "holds a NUL or half a character, which no file can; remove it"
_PATHS: tuple[KeyPath, ...] = (
    ("data", "train"), ("data", "validation"), ("data", "test"), ("data", "cache", "path"), ("model", "name"),
    ("output", "storage"), ("parallel", "offload_path"), ("logging", "mlflow"),
)  # fmt: skip
_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}|^\$[A-Za-z_][A-Za-z0-9_]*(?=/|$)")
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_IMPORT_PATH = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"


class ParamsOf(Protocol):
    """Finds the model of a task's parameters; given by the layers above, which know the tasks."""

    def __call__(self, type_name: str, /) -> type[BaseModel]:
        """The pydantic model of the keys of `task:` beside `type`.

        Raises:
            UserError: There is no such task; the text is a sentence that starts with `task.type is ...`
                (see `spec.problems.not_one_of`).
        """
        ...


def load_job(path: str | Path, overrides: Sequence[str] = (), params_of: ParamsOf | None = None) -> JobSpec:
    """Read, override and check a job file.

    Args:
        path: A YAML 1.2 file.
        overrides: `key.path=value`, the value in YAML; they make missing sections, and the last one wins.
        params_of: Checks the parameters of the task too; without it they are taken as they are.

    Returns:
        The job, with `task` as it was given.

    Raises:
        SpecError: Everything that is wrong with file and overrides, one sentence each.
    """
    document = read_document(Path(path))
    for position, override in enumerate(overrides):
        apply_override(document, override, position)
    params, problems = _task_params(document, params_of)
    problems += _unbearable(document, document.values)
    problems += _unreplaced(document)
    keys, job = _keys(params), None
    values = keys.without_false_numbers(document.values)
    try:
        job = JobSpec.model_validate(values)
    except ValidationError as error:
        problems += problems_of(error, document, keys)
    if params is not None:
        problems += _params_problems(values, document, params, keys)
    problems += document.problems
    if job is None or problems:
        problems.sort(key=lambda problem: problem.place.order)
        raise SpecError(tuple(str(problem) for problem in problems))
    return job


@lru_cache(maxsize=8)  # a sweep, and the tests, ask for the same ones again and again
def _keys(params: type[BaseModel] | None) -> JobKeys:
    return JobKeys(params)


def _unbearable(document: Document, value: object, path: KeyPath = ()) -> list[Problem]:
    """Values that no part of a run could bear: integers beyond 64 bits, and text with a NUL or half a character."""
    if isinstance(value, dict):
        names = [key for key in value if not _is_bearable(key)]
        problems = [
            Problem(document.place((*path, key)), f"a key of {dotted(path) or 'the job file'} {_BAD_TEXT}")
            for key in names
        ]
        return problems + [p for key, inner in value.items() for p in _unbearable(document, inner, (*path, key))]
    if isinstance(value, list):
        return [p for index, inner in enumerate(value) for p in _unbearable(document, inner, (*path, index))]
    if isinstance(value, str) and not _is_bearable(value):
        return [Problem(document.place(path), f"{dotted(path)} {_BAD_TEXT}")]
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        shown = document.shown(path, value)
        return [
            Problem(document.place(path), f"{dotted(path)} is {shown}, which no 64 bits hold; give a smaller number")
        ]
    return []


def _unreplaced(document: Document) -> list[Problem]:
    """Return paths with an environment variable, which nobody replaces: a directory of that name would be made."""
    problems = []
    for path in _PATHS:
        value: object = document.values
        for key in path:
            value = value.get(str(key)) if isinstance(value, dict) else None
        for text in value if isinstance(value, list) else [value]:
            found = _VARIABLE.search(text) if isinstance(text, str) else None
            if found:
                sentence = (
                    f"{dotted(path)} has {found.group()} in it, and a job file replaces no environment variables; "
                    f'write the path, or have the shell do it: {dotted(path)}="{one_line(str(text))}" as override'
                )
                problems.append(Problem(document.place(path), sentence))
    return problems


def _is_bearable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _task_params(document: Document, params_of: ParamsOf | None) -> tuple[type[BaseModel] | None, list[Problem]]:
    task = document.values.get("task")
    type_name = task.get("type") if isinstance(task, dict) else None
    # What is wrong with `task:` or its `type` as such is said by JobSpec.
    if params_of is None or not isinstance(type_name, str) or not type_name:
        return None, []
    try:
        return params_of(type_name), []
    except UserError as error:
        sentences = error.problems if isinstance(error, SpecError) else (error.message,)
        place = document.place(("task", "type"))
        return None, [Problem(place, " ".join(sentence.split())) for sentence in sentences]


def _params_problems(values: object, document: Document, params: type[BaseModel], keys: JobKeys) -> list[Problem]:
    assert isinstance(values, dict)
    task = values["task"]
    assert isinstance(task, dict)  # _task_params found the type in it
    given = {key: value for key, value in task.items() if key != "type"}
    try:
        # A model that says nothing about unknown keys would drop them silently.
        params.model_validate(given, extra=None if "extra" in params.model_config else "forbid")
    except ValidationError as error:
        return problems_of(error, document, keys, at=("task",))
    return []


def dump_job(job: JobSpec) -> str:
    """The resolved job, defaults written out, as YAML that `load_job` reads back to an equal job."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 4096  # a path stays on one line, to be found with grep
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(job.model_dump(mode="json"), text)
    return text.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null and text so that people and `load_job` read what was meant."""

    def represent_null(self, _data: None) -> ScalarNode:
        # ruamel leaves nothing after the colon, which reads like a forgotten value.
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_text(self, text: str) -> ScalarNode:
        style = "|" if "\n" in text else None
        if not text.replace("\n", "").isprintable():
            # Only double quotes escape; ruamel 0.19 writes \x85 and control characters bare in the other styles.
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Representer.add_representer(type(None), _Representer.represent_null)
_Representer.add_representer(str, _Representer.represent_text)


def job_schema(params_models: Mapping[str, type[BaseModel]]) -> dict[str, object]:
    """The JSON Schema of job files, for editors.

    Args:
        params_models: The model of the parameters of each task, by the task's name.

    Returns:
        A schema (draft 2020-12) in which `task` is one of the given tasks or one named by import path.
    """
    names = list(params_models)
    (job, *params), defs = definitions([JobSpec, *(params_models[name] for name in names)])
    known = defs["TaskSpec"]
    variants = [_task_variant(name, schema, known) for name, schema in zip(names, params, strict=True)]
    outside = {
        **known,
        "title": "package.module:Task",
        "properties": {"type": {**known["properties"]["type"], "pattern": _IMPORT_PATH}},
    }
    task = {"description": known["description"], "oneOf": [*variants, outside]}
    used = {name: schema for name, schema in defs.items() if name not in ("JobSpec", "TaskSpec")}
    properties = {**job["properties"], "task": task}
    return {"$schema": _DIALECT, **job, "title": "Job file", "properties": properties, "$defs": used}


def _task_variant(name: str, params: Schema, known: Schema) -> Schema:
    described = {"const": name, "type": "string", "description": known["properties"]["type"]["description"]}
    return {
        **params,
        "title": name,
        "properties": {"type": described, **params.get("properties", {})},
        "required": ["type", *params.get("required", [])],
        "additionalProperties": False,
    }
