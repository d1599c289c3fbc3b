"""Problems of a job file as sentences: what, where, given value, what is allowed, remedy.

Runs anywhere; translates pydantic's errors, whose own texts name neither file nor remedy. Read `spec/loader.py` next.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from launcher.spec.document import Document, KeyPath, Problem, dotted, one_line
from launcher.spec.schema import ANYTHING, JobKeys, Schema, listed, to_plain_schema

_TOP = "the job file"


def problems_of(error: ValidationError, document: Document, keys: JobKeys, at: KeyPath = ()) -> list[Problem]:
    """Say in sentences what pydantic found.

    Args:
        error: From validating the document's values, or one section of them.
        document: Knows the place of each value.
        keys: Knows what may stand where.
        at: The section that was validated; () for the whole file.

    Returns:
        One problem per thing to mend; a value that fits no member of a union is one problem.
    """
    problems = []
    for details in error.errors(include_url=False):
        case = _Case.of(details, document, keys, at)
        if (
            case.kind == "too_short"
            and isinstance(case.value, list | tuple)
            and len(case.value) >= case.context["min_length"]
        ):
            continue  # pydantic did not count the wrong items, each of which has its own error
        path, sentence = _sentence(case)
        problems.append(Problem(document.place(path), sentence))
    return list(dict.fromkeys(problems))


def not_one_of(key: str, shown: str, choices: Sequence[object]) -> str:
    """The sentence for a value that is none of the choices, with the nearest of them if one is near.

    Args:
        key: Dotted key, `parallel.zero`.
        shown: The value as the user wrote it.
        choices: Everything that is allowed.
    """
    if len(choices) == 1:
        return f"{key} is {shown}, which is not {listed(choices)}; write {listed(choices)}"
    near = nearest(shown, [str(choice) for choice in choices])
    remedy = f"did you mean {near}?" if near else "choose one of them"
    return f"{key} is {shown}, which is not one of {listed(choices)}; {remedy}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name somebody most likely meant, if one is near; `lr` and `learning` are near to learning_rate."""
    name = name.lower().replace("-", "_")
    originals = {candidate.lower().replace("-", "_"): candidate for candidate in names}
    compound = [candidate for candidate in originals if "_" in candidate]
    initials = {"".join(word[:1] for word in candidate.split("_")): candidate for candidate in compound}
    found = [initials[name]] if name in initials else difflib.get_close_matches(name, originals, n=1)
    found = found or [candidate for candidate in compound if candidate.startswith(f"{name}_")]
    return originals[found[0]] if found else None


@dataclass(frozen=True)
class _Case:
    """One error of pydantic, with all a sentence may need."""

    kind: str
    loc: KeyPath
    path: KeyPath
    schema: Schema
    in_union: bool
    value: object
    message: str
    context: Mapping[str, Any]  # pydantic's numbers and texts; what a key holds depends on the kind
    document: Document
    keys: JobKeys

    @classmethod
    def of(cls, details: ErrorDetails, document: Document, keys: JobKeys, at: KeyPath) -> "_Case":
        loc = (*at, *details["loc"])
        spot = keys.find(loc)
        value = _value_at(document.values, spot.path) if spot.in_union else details["input"]
        context = details.get("ctx", {})
        message = str(context.get("error", details["msg"]))
        return cls(details["type"], loc, *spot, value, " ".join(message.split()), context, document, keys)

    @property
    def key(self) -> str:
        return dotted(self.path) or _TOP

    @property
    def shown(self) -> str:
        return self.document.shown(self.path, self.value)

    @property
    def allowed(self) -> str:
        return self.keys.allowed(self.schema)


_Sentence = tuple[KeyPath, str]


def _sentence(case: _Case) -> _Sentence:
    if case.in_union:
        return case.path, f"{case.key} is {case.shown}, which fits none of the forms allowed; give {case.allowed}"
    if case.kind in _SENTENCES:
        return _SENTENCES[case.kind](case)
    if case.kind in _NOT_A:
        return _wrong_kind(case)
    # Anything our own models do not use: pydantic's words, in our frame.
    reason = case.message[:1].lower() + case.message[1:]
    return case.path, f"{case.key} is {case.shown}, which is refused ({reason}); give {case.allowed}"


def _unknown_key(case: _Case) -> _Sentence:
    *section, name = case.path
    where = dotted(tuple(section)) or _TOP
    valid = case.keys.keys_at(case.loc[:-1])
    homes = [dotted(home) or "the top of the job file" for home in case.keys.sections_with(str(name))]
    near = nearest(str(name), valid)
    if homes:
        remedy = f"{one_line(str(name))} belongs to {' or '.join(homes)}"
    elif near:
        remedy = f"did you mean {near}?"
    else:
        remedy = f"the keys allowed there: {listed(valid)}" if valid else "remove it"
    return case.path, f"{case.key} is not a key of {where}; {remedy}"


def _missing(case: _Case) -> _Sentence:
    *section, name = case.path
    where = dotted(tuple(section)) or _TOP
    if isinstance(name, int):
        parent = case.keys.find(case.loc[:-1]).schema
        return case.path, f"{where} has too few items; give {case.keys.allowed(parent)}"
    meaning = case.keys.described(case.schema)
    return case.path, f"{case.key} is missing; add {name} to {where}" + (f" ({meaning})" if meaning else "")


def _wrong_choice(case: _Case) -> _Sentence:
    choices = case.keys.choices(case.schema)
    if not choices:
        return case.path, f"{case.key} is {case.shown}, which is not allowed; give {case.context['expected']}"
    if isinstance(case.value, str) and case.value in [to_plain_schema(choice) for choice in choices]:
        return case.path, f'{case.key} is the text "{case.value}"; write {case.value} without quotes'
    return case.path, not_one_of(case.key, case.shown, choices)


def _wrong_tag(case: _Case) -> _Sentence:
    name, tags = case.keys.tags(case.schema)
    path = (*case.path, name)
    tag = _value_at(case.document.values, path)
    return path, not_one_of(dotted(path), case.document.shown(path, tag), tags)


def _missing_tag(case: _Case) -> _Sentence:
    name, tags = case.keys.tags(case.schema)
    return case.path, f"{case.key}.{name} is missing; choose one of {listed(tags)}"


def _not_a_section(case: _Case) -> _Sentence:
    name, tags = case.keys.tags(case.schema)
    keys = case.keys.keys_at(case.loc)
    if case.value in tags:
        remedy = f"write {{{name}: {case.value}}}"
    elif tags:
        remedy = f"give it the key {name}, one of {listed(tags)}"
    else:
        remedy = f"give it keys of its own ({listed(keys)})" if keys else "give it keys of its own"
    if case.value is None and "default" in case.schema:
        remedy += " or remove it"
    return case.path, f"{case.key} is {case.shown}, which is not a section; {remedy}"


def _out_of_bounds(case: _Case) -> _Sentence:
    bounds = {"ge": "is below", "gt": "is not above", "le": "is above", "lt": "is not below"}
    wrong = next(
        f"{words} {to_plain_schema(case.context[bound])}" for bound, words in bounds.items() if bound in case.context
    )
    return case.path, f"{case.key} is {case.shown}, which {wrong}; give {case.allowed}"


def _wrong_pattern(case: _Case) -> _Sentence:
    pattern = str(case.context["pattern"])
    near = _fitting(str(case.value), pattern)
    remedy = f"did you mean {near}?" if near else "write it so"
    words = case.keys.pattern_words(case.schema) or f"not of the pattern {pattern}"
    return case.path, f"{case.key} is {case.shown}, which is {words}; {remedy}"


def _fitting(value: str, pattern: str) -> str | None:
    """The value with what is no letter or digit replaced, if that fits the pattern: `my run` -> `my-run`."""
    for filler in "-_":
        candidate = re.sub(r"[^A-Za-z0-9]+", filler, value).strip(filler)
        try:
            if candidate and re.search(pattern, candidate):
                return candidate
        except re.error:  # pydantic's patterns are Rust's, which Python may not know
            return None
    return None


def _wrong_length(case: _Case) -> _Sentence:
    context = case.context
    limit, wrong = (context["min_length"], "fewer") if "min_length" in context else (context["max_length"], "more")
    unit = ("character" if case.kind.startswith("string") else "item") + ("" if limit == 1 else "s")
    return case.path, f"{case.key} is {case.shown}, which has {wrong} than {limit} {unit}; give {case.allowed}"


def _wrong_kind(case: _Case) -> _Sentence:
    if case.value is None:
        return case.path, f"{case.key} is empty; give {case.allowed}"
    needed = _NOT_A[case.kind]
    if case.kind == "string_type" and not isinstance(case.value, dict | list):
        remedy = "put it in quotes"
    elif case.allowed in (needed, ANYTHING) and needed != "text":
        remedy = "choose one of them" if " or " in needed else "give one"
    else:
        remedy = f"give {case.allowed}"
    return case.path, f"{case.key} is {case.shown}, which is not {needed}; {remedy}"


def _own_words(case: _Case) -> _Sentence:
    """A validator's text is a sentence already; it starts with the name of a key, or gets the section's."""
    place, culprit = case.path, _culprit(case)
    first = case.message.split(maxsplit=1)[0].rstrip(":,") if case.message else ""
    if first in case.keys.keys_at(case.loc):
        return culprit, f"{dotted((*place, '')) if place else ''}{case.message}"
    if place and first == place[-1]:
        return culprit, dotted((*place[:-1], case.message))
    return culprit, f"{case.key}: {case.message}"


def _culprit(case: _Case) -> KeyPath:
    """Of the keys a validator's text names, one that an override gave, else the first that was given at all."""
    places = case.document.places
    words = re.findall(r"\w+", case.message)
    named = [path for path in ((*case.path, word) for word in words) if path in places]
    overridden = [path for path in named if places[path].order[0] == 1]
    return next(iter(overridden + named), case.path)


def _value_at(value: object, path: KeyPath) -> object:
    for key in path:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value


_SENTENCES: dict[str, Callable[[_Case], _Sentence]] = {
    "extra_forbidden": _unknown_key,
    "missing": _missing,
    "literal_error": _wrong_choice,
    "enum": _wrong_choice,
    "union_tag_invalid": _wrong_tag,
    "union_tag_not_found": _missing_tag,
    "model_type": _not_a_section,
    "model_attributes_type": _not_a_section,
    "dataclass_type": _not_a_section,
    "greater_than": _out_of_bounds,
    "greater_than_equal": _out_of_bounds,
    "less_than": _out_of_bounds,
    "less_than_equal": _out_of_bounds,
    "string_pattern_mismatch": _wrong_pattern,
    "too_short": _wrong_length,
    "too_long": _wrong_length,
    "string_too_short": _wrong_length,
    "string_too_long": _wrong_length,
    "value_error": _own_words,
    "assertion_error": _own_words,
}

_NOT_A = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), "text"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type"), "a mapping"),
    "finite_number": "a finite number",
    "path_type": "a path",
}
