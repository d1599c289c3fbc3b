"""What may stand where in a job file, in words: looked up in the JSON Schema that pydantic writes.

Runs anywhere; read `spec/messages.py` next, which puts these words into messages.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from launcher.spec.base import PATTERN_WORDS
from launcher.spec.document import KeyPath
from launcher.spec.job import JobSpec

# JSON Schema is free-form JSON: what a key holds depends on the key.
Schema: TypeAlias = Mapping[str, Any]

ANYTHING = "another value"
"""What is allowed where the schema says nothing."""

_TYPE_NAMES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
# Sections nest three deep (train.optimizer.beta1); the limit keeps a task's recursive model finite.
_DEEPEST = 5


class SchemaPath(NamedTuple):
    """What the schema knows about one place that pydantic named."""

    path: KeyPath
    """The place as keys of the job file, without the names pydantic adds for members of a union."""

    schema: Schema
    """What is allowed there; empty where the schema knows nothing."""

    in_union: bool = False
    """The value had a choice of forms and pydantic speaks about one of them."""


def definitions(models: Sequence[type[BaseModel]]) -> tuple[list[Schema], dict[str, Schema]]:
    """The schemas of some models over one set of `$defs`, in which no two names clash."""
    unique = list(dict.fromkeys(models))
    references, schema = models_json_schema([(model, "validation") for model in unique])
    defs: dict[str, Schema] = schema.get("$defs", {})
    return [_resolved(references[(model, "validation")], defs) for model in models], defs


def _resolved(schema: Schema, defs: Mapping[str, Schema]) -> Schema:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    # What stands beside a $ref (description, default) is about this use of the definition and wins.
    return {**defs[reference.removeprefix("#/$defs/")], **{key: schema[key] for key in schema if key != "$ref"}}


class JobKeys:
    """The keys of a job file and what each may hold, the parameters of its task included where they are known."""

    def __init__(self, params: type[BaseModel] | None) -> None:
        models: list[type[BaseModel]] = [JobSpec] if params is None else [JobSpec, params]
        (job, *tasks), self._defs = definitions(models)
        self._root = job
        for task in tasks:
            known = self._unwrapped(job["properties"]["task"])
            merged = {**task, "properties": {**known["properties"], **task.get("properties", {})}}
            self._root = {**job, "properties": {**job["properties"], "task": merged}}

    def find(self, loc: KeyPath) -> SchemaPath:
        """Translate a location of a pydantic error."""
        schema: Schema = self._root
        path: KeyPath = ()
        for key in loc:
            schema = self._unwrapped(schema)
            if "discriminator" in schema:  # pydantic names the variant before the key inside it
                schema = self._variants(schema).get(str(key), {})
                continue
            inner = self._child(schema, key)
            if inner is None and "anyOf" in schema:
                return SchemaPath(path, schema, in_union=True)
            if key == "[key]":  # pydantic's mark for the key of a mapping, of which the schema says nothing
                return SchemaPath(path, {})
            path = (*path, key)
            schema = inner or {}
        return SchemaPath(path, schema)

    def keys_at(self, loc: KeyPath) -> list[str]:
        """The valid keys of the section at a location of a pydantic error."""
        return list(self._unwrapped(self.find(loc).schema).get("properties", {}))

    def tags(self, schema: Schema) -> tuple[str, list[str]]:
        """The key that tells the variants of a section apart, and its values; ("", []) for any other value."""
        schema = self._unwrapped(schema)
        return schema.get("discriminator", {}).get("propertyName", ""), list(self._variants(schema))

    def choices(self, schema: Schema) -> list[object]:
        """The values of a choice; [] for anything that is none."""
        schema = self._unwrapped(schema)
        return [schema["const"]] if "const" in schema else list(schema.get("enum", []))

    def without_false_numbers(self, values: object) -> object:
        """The values of a job file with true and false as texts where only a number may stand.

        Python takes true for 1, and so does pydantic; a text it refuses in the same words as any other.
        """
        return self._without_false_numbers(values, self._root)

    def _without_false_numbers(self, value: object, schema: Schema) -> object:
        schema = self._unwrapped(schema)
        if isinstance(value, bool):
            return to_plain_schema(value) if _never_bool(schema) else value
        if isinstance(value, dict):
            name, _ = self.tags(schema)
            schema = self._variants(schema).get(str(value.get(name)), {}) if name else schema
            inner = {key: self._child(schema, key) or {} for key in value}
            return {key: self._without_false_numbers(value[key], inner[key]) for key in value}
        if isinstance(value, list):
            items = [self._child(schema, index) or {} for index in range(len(value))]
            return [self._without_false_numbers(item, inner) for item, inner in zip(value, items, strict=True)]
        return value

    def pattern_words(self, schema: Schema) -> str:
        """What a text that does not fit its pattern is, in words; "" where nobody wrote them."""
        return str(self._unwrapped(schema).get(PATTERN_WORDS, ""))

    def sections_with(self, key: str) -> list[KeyPath]:
        """All sections that have a key of this name."""
        found = [path for path, schema in self._sections(self._root, ()) if key in schema["properties"]]
        return list(dict.fromkeys(found))

    def allowed(self, schema: Schema) -> str:
        """What may stand somewhere: `a whole number of at least 1, or null`."""
        schema = _resolved(schema, self._defs)
        if "anyOf" in schema:
            forms = [self.allowed(form) for form in schema["anyOf"] if form.get("type") != "null"]
            return " or ".join(forms) + (", or null" if len(forms) < len(schema["anyOf"]) else "")
        choices = self.choices(schema)
        if choices:
            return listed(choices) if len(choices) == 1 else f"one of {listed(choices)}"
        kind = schema.get("type", "")
        if kind == "array":
            return self._allowed_list(schema)
        if kind == "object" or "discriminator" in schema:
            keys = list(schema.get("properties", {}))
            return f"a section with the keys {listed(keys)}" if keys else "a section"
        bounds = [f"{words} {to_plain_schema(schema[bound])}" for bound, words in _BOUNDS.items() if bound in schema]
        limits = " and ".join(bounds)
        if limits.startswith("at"):
            limits = f"of {limits}"
        if schema.get("minLength") == 1:
            limits = "that is not empty"
        name = f"a {schema['format']}" if "format" in schema else _TYPE_NAMES.get(kind, ANYTHING)
        return f"{name} {limits}".strip()

    def _allowed_list(self, schema: Schema) -> str:
        if "prefixItems" in schema:
            fixed = [self.allowed(item) for item in schema["prefixItems"]]
            return f"a list of {len(fixed)}: {', '.join(fixed)}"
        items = f"a list, each item {self.allowed(schema['items'])}" if schema.get("items") else "a list"
        return f"{items}, at least {schema['minItems']} of them" if "minItems" in schema else items

    def _unwrapped(self, schema: Schema) -> Schema:
        """A schema without its `$ref` and without `or null`."""
        schema = _resolved(schema, self._defs)
        forms = [form for form in schema.get("anyOf", []) if form.get("type") != "null"]
        return self._unwrapped(forms[0]) if len(forms) == 1 else schema

    def described(self, schema: Schema) -> str:
        """The first clause of the docstring of a field or section; the rest would make a message two sentences."""
        text = str(_resolved(schema, self._defs).get("description", ""))
        return re.split(r"[;.](?:\s|$)", re.sub(r"^`\w+:` ", "", text))[0]

    def _variants(self, schema: Schema) -> dict[str, Schema]:
        # The mapping is sorted by name, oneOf has the order in which the variants were written.
        mapping = schema.get("discriminator", {}).get("mapping", {})
        order = [form.get("$ref") for form in schema.get("oneOf", [])]
        tags = sorted(mapping, key=lambda tag: order.index(mapping[tag]))
        return {tag: _resolved({"$ref": mapping[tag]}, self._defs) for tag in tags}

    def _child(self, schema: Schema, key: str | int) -> Schema | None:
        for form in schema.get("anyOf", []):
            inner = self._child(self._unwrapped(form), key)
            if inner is not None:
                return inner
        if isinstance(key, int):
            fixed: list[Schema] = schema.get("prefixItems", [])
            items: Schema | None = fixed[key] if key < len(fixed) else schema.get("items")
            return items
        inner = schema.get("properties", {}).get(key)
        others = schema.get("additionalProperties")
        return others if inner is None and isinstance(others, dict) else inner

    def _sections(self, schema: Schema, path: KeyPath) -> Iterator[tuple[KeyPath, Schema]]:
        schema = self._unwrapped(schema)
        for variant in self._variants(schema).values():
            yield from self._sections(variant, path)
        if "properties" in schema and len(path) < _DEEPEST:
            yield path, schema
            for key, inner in schema["properties"].items():
                yield from self._sections(inner, (*path, key))


def _never_bool(schema: Schema) -> bool:
    """Whether neither true nor false may stand somewhere, and Python's 1 might pass for them."""
    choices = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if any(isinstance(choice, bool) for choice in choices):
        return False
    return schema.get("type") in ("integer", "number") or any(isinstance(choice, int | float) for choice in choices)


def listed(values: Sequence[object]) -> str:
    """`a, b, c`."""
    return ", ".join(to_plain_schema(value) for value in values)


def to_plain_schema(value: object) -> str:
    """A choice or a limit as it is written in a job file: null, true, and 1 for 1.0."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
