"""JSON Schema of the job file: printed for editors, and searched for what an error message says is allowed.

Runs anywhere. Read `spec/messages.py` next, which builds those messages.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from launcher.spec.base import PATTERN_WORDS, KeyPath
from launcher.spec.job import JobSpec

# JSON Schema is free-form JSON: what a key holds depends on the key.
Schema: TypeAlias = Mapping[str, Any]

ANYTHING = "another value"
"""Wording for a value that the schema does not restrict."""

_TYPE_NAMES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
# Sections nest three deep (train.optimizer.beta1). The limit ends the search in a task's recursive model.
_MAX_DEPTH = 5
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_IMPORT_PATH = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"


class SchemaPath(NamedTuple):
    """Location of a pydantic error, translated to the job file, with its schema."""

    path: KeyPath
    """Keys of the job file, without the names that pydantic adds for members of a union."""

    schema: Schema
    """Schema of the value; empty if there is none."""

    in_union: bool = False
    """Whether the error is about one of several forms that the value may have."""


def definitions(models: Sequence[type[BaseModel]]) -> tuple[list[Schema], dict[str, Schema]]:
    """Return the schemas of some models over one shared set of `$defs`, in which no two names clash."""
    # Several tasks may share one model, which pydantic should define once.
    unique = list(dict.fromkeys(models))
    references, schema = models_json_schema([(model, "validation") for model in unique])
    defs: dict[str, Schema] = schema.get("$defs", {})
    return [_resolve(references[(model, "validation")], defs) for model in models], defs


def _resolve(schema: Schema, defs: Mapping[str, Schema]) -> Schema:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    # Keys next to a $ref (description, default) belong to this use of the definition and override it.
    return {**defs[reference.removeprefix("#/$defs/")], **{key: schema[key] for key in schema if key != "$ref"}}


class JobKeys:
    """Lookup of the job file's keys and allowed values, including the parameters of its task if they are known."""

    def __init__(self, params: type[BaseModel] | None) -> None:
        models: list[type[BaseModel]] = [JobSpec] if params is None else [JobSpec, params]
        (job, *tasks), self._defs = definitions(models)
        self._root = job
        for task in tasks:
            known = self._unwrap(job["properties"]["task"])
            merged = {**task, "properties": {**known["properties"], **task.get("properties", {})}}
            self._root = {**job, "properties": {**job["properties"], "task": merged}}

    def find(self, loc: KeyPath) -> SchemaPath:
        """Translate the location of a pydantic error to keys of the job file."""
        schema: Schema = self._root
        path: KeyPath = ()
        for key in loc:
            schema = self._unwrap(schema)
            if "discriminator" in schema:  # pydantic names the variant before the key inside it
                schema = self._get_variants(schema).get(str(key), {})
                continue
            inner = self._get_child(schema, key)
            # A union without a tag: pydantic's next part names a member (`int`, `literal['auto']`), which is no key.
            if inner is None and "anyOf" in schema:
                return SchemaPath(path, schema, in_union=True)
            if key == "[key]":  # pydantic's mark for the key of a mapping, which the schema does not describe
                return SchemaPath(path, {})
            path = (*path, key)
            schema = inner or {}
        return SchemaPath(path, schema)

    def keys_at(self, loc: KeyPath) -> list[str]:
        """Return the valid keys of the section at the location of a pydantic error."""
        return list(self._unwrap(self.find(loc).schema).get("properties", {}))

    def tags(self, schema: Schema) -> tuple[str, list[str]]:
        """Return the key that selects the variant of a section, and its values; ("", []) without variants."""
        schema = self._unwrap(schema)
        return schema.get("discriminator", {}).get("propertyName", ""), list(self._get_variants(schema))

    def choices(self, schema: Schema) -> list[object]:
        """Return the values of a choice; [] if the schema is not one."""
        return _get_choices(self._unwrap(schema))

    def without_false_numbers(self, values: object) -> object:
        """Return the job file's values with true and false as text where only a number is allowed.

        Python and pydantic accept true as 1. As text it is rejected in the same words as any other wrong value.
        """
        return self._replace_false_numbers(values, self._root)

    def _replace_false_numbers(self, value: object, schema: Schema) -> object:
        schema = self._unwrap(schema)
        if isinstance(value, bool):
            return format_value(value) if _excludes_bool(schema) else value
        if isinstance(value, dict):
            name, _ = self.tags(schema)
            schema = self._get_variants(schema).get(str(value.get(name)), {}) if name else schema
            inner = {key: self._get_child(schema, key) or {} for key in value}
            return {key: self._replace_false_numbers(value[key], inner[key]) for key in value}
        if isinstance(value, list):
            items = [self._get_child(schema, index) or {} for index in range(len(value))]
            return [self._replace_false_numbers(item, inner) for item, inner in zip(value, items, strict=True)]
        return value

    def pattern_words(self, schema: Schema) -> str:
        """Return the explanation for text that does not match its pattern; "" if the field has none."""
        return str(self._unwrap(schema).get(PATTERN_WORDS, ""))

    def sections_with(self, key: str) -> list[KeyPath]:
        """Return the paths of all sections that have a key of this name."""
        paths = (path for path, schema in self._walk_sections(self._root, ()) if key in schema["properties"])
        return list(dict.fromkeys(paths))

    def allowed(self, schema: Schema) -> str:
        """Describe the values that a schema allows: `a whole number of at least 1, or null`."""
        schema = _resolve(schema, self._defs)
        # Resolved but not unwrapped, which would drop the null.
        if "anyOf" in schema:
            forms = [self.allowed(form) for form in schema["anyOf"] if form.get("type") != "null"]
            return " or ".join(forms) + (", or null" if len(forms) < len(schema["anyOf"]) else "")
        choices = self.choices(schema)
        if choices:
            return join_values(choices) if len(choices) == 1 else f"one of {join_values(choices)}"
        kind = schema.get("type", "")
        if kind == "array":
            return self._describe_list(schema)
        if kind == "object" or "discriminator" in schema:
            keys = list(schema.get("properties", {}))
            return f"a section with the keys {join_values(keys)}" if keys else "a section"
        bounds = [f"{words} {format_value(schema[bound])}" for bound, words in _BOUNDS.items() if bound in schema]
        limits = " and ".join(bounds)
        if limits.startswith("at"):
            limits = f"of {limits}"
        if schema.get("minLength") == 1:
            limits = "that is not empty"
        name = f"a {schema['format']}" if "format" in schema else _TYPE_NAMES.get(kind, ANYTHING)
        return f"{name} {limits}".strip()

    def _describe_list(self, schema: Schema) -> str:
        if "prefixItems" in schema:
            fixed = [self.allowed(item) for item in schema["prefixItems"]]
            return f"a list of {len(fixed)}: {', '.join(fixed)}"
        items = f"a list, each item {self.allowed(schema['items'])}" if schema.get("items") else "a list"
        return f"{items}, at least {schema['minItems']} of them" if "minItems" in schema else items

    def _unwrap(self, schema: Schema) -> Schema:
        """Resolve a schema's `$ref` and drop `or null`."""
        schema = _resolve(schema, self._defs)
        forms = [form for form in schema.get("anyOf", []) if form.get("type") != "null"]
        return self._unwrap(forms[0]) if len(forms) == 1 else schema

    def first_clause(self, schema: Schema) -> str:
        """Return the first clause of a field's or section's docstring, short enough for a one-sentence message."""
        # A section's docstring begins with its key in backquotes, which the message has already.
        text = str(_resolve(schema, self._defs).get("description", ""))
        return re.split(r"[;.](?:\s|$)", re.sub(r"^`[\w.]+:` ", "", text))[0]

    def _get_variants(self, schema: Schema) -> dict[str, Schema]:
        # pydantic sorts the mapping by name; oneOf keeps the order in which the variants are declared.
        mapping = schema.get("discriminator", {}).get("mapping", {})
        order = [form.get("$ref") for form in schema.get("oneOf", [])]
        tags = sorted(mapping, key=lambda tag: order.index(mapping[tag]))
        return {tag: _resolve({"$ref": mapping[tag]}, self._defs) for tag in tags}

    def _get_child(self, schema: Schema, key: str | int) -> Schema | None:
        for form in schema.get("anyOf", []):
            inner = self._get_child(self._unwrap(form), key)
            if inner is not None:
                return inner
        if isinstance(key, int):
            fixed: list[Schema] = schema.get("prefixItems", [])
            items: Schema | None = fixed[key] if key < len(fixed) else schema.get("items")
            return items
        inner = schema.get("properties", {}).get(key)
        others = schema.get("additionalProperties")
        return others if inner is None and isinstance(others, dict) else inner

    def _walk_sections(self, schema: Schema, path: KeyPath) -> Iterator[tuple[KeyPath, Schema]]:
        schema = self._unwrap(schema)
        # All variants: the misplaced key may belong to one that the user did not choose.
        for variant in self._get_variants(schema).values():
            yield from self._walk_sections(variant, path)
        if "properties" in schema and len(path) < _MAX_DEPTH:
            yield path, schema
            for key, inner in schema["properties"].items():
                yield from self._walk_sections(inner, (*path, key))


def _excludes_bool(schema: Schema) -> bool:
    """Return whether a schema takes numbers but neither true nor false."""
    choices = _get_choices(schema)
    # Before the numbers: in Python a bool is an int.
    if any(isinstance(choice, bool) for choice in choices):
        return False
    return schema.get("type") in ("integer", "number") or any(isinstance(choice, int | float) for choice in choices)


def _get_choices(schema: Schema) -> list[object]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


def join_values(values: Sequence[object]) -> str:
    """Join values with commas, as a job file writes them."""
    return ", ".join(format_value(value) for value in values)


def format_value(value: object) -> str:
    """Format a choice or a limit as a job file writes it: null, true, and 1 for 1.0."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def job_schema(params_models: Mapping[str, type[BaseModel]]) -> dict[str, object]:
    """Return the JSON Schema of job files, for editors.

    Args:
        params_models: Model of each task's parameters, by the task's name.

    Returns:
        Schema (draft 2020-12) whose `task` is one of these tasks, or a task outside the launcher by import path.
    """
    names = list(params_models)
    (job, *params), defs = definitions([JobSpec, *(params_models[name] for name in names)])
    known = defs["TaskSpec"]
    variants = [_make_task_variant(name, schema, known) for name, schema in zip(names, params, strict=True)]
    outside = {
        **known,
        "title": "package.module:Task",
        # The pattern excludes the built-in names: under oneOf, a task that also matches here would be invalid.
        "properties": {"type": {**known["properties"]["type"], "pattern": _IMPORT_PATH}},
    }
    task = {"description": known["description"], "oneOf": [*variants, outside]}
    # JobSpec is the root itself, and TaskSpec is replaced by the variants: nothing refers to them any more.
    used = {name: schema for name, schema in defs.items() if name not in ("JobSpec", "TaskSpec")}
    properties = {**job["properties"], "task": task}
    return {"$schema": _DIALECT, **job, "title": "Job file", "properties": properties, "$defs": used}


def _make_task_variant(name: str, params: Schema, known: Schema) -> Schema:
    type_key = {"const": name, "type": "string", "description": known["properties"]["type"]["description"]}
    return {
        **params,
        "title": name,
        "properties": {"type": type_key, **params.get("properties", {})},
        "required": ["type", *params.get("required", [])],
        "additionalProperties": False,
    }
