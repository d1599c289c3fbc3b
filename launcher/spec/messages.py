"""Problems of a job file as sentences: what, where, value, what is allowed, how to fix it.

Runs anywhere. Translates pydantic's errors, whose own texts name neither the file nor the fix. Read `spec/loader.py`
next, which reads the file and collects the problems.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from launcher.spec.base import KeyPath
from launcher.spec.schema import ANYTHING, JobKeys, Schema, format_value, join_values

_TOP = "the job file"
_MAX_SHOWN = 80


class Place(NamedTuple):
    """Source of a value: a line of the file, or an override."""

    order: tuple[int, int]
    """Sort key of problems: lines of the file first, then the overrides in their order."""

    where: str
    """`jobs/sst2.yaml:14` or `override train.epochs=3`."""

    text: str | None = None
    """Scalar as the user wrote it, so that 1_000 is shown as 1_000."""


class Problem(NamedTuple):
    """One sentence about one place."""

    place: Place
    sentence: str

    def __str__(self) -> str:
        return f"{self.place.where}: {self.sentence}"


@dataclass
class Document:
    """Values of a job file with its overrides applied, and the place of each value."""

    values: dict[str, object] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Return the place of a value, or of the innermost section around it that the user wrote."""
        # The reader records a place for (), the whole file, so the search always ends.
        return next(self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places)

    def value(self, path: KeyPath) -> object:
        """Return the value at a path; None where there is none."""
        value: object = self.values
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value

    def shown(self, path: KeyPath, value: object) -> str:
        """Format a value for a message: as the user wrote it if that is known, shortened to one line."""
        if value is None:
            return "empty"
        place = self.places.get(path)
        if isinstance(value, str):
            needs_quotes = not value or any(char.isspace() or char in ",;:" for char in value)
            return f'"{one_line(value)}"' if needs_quotes else one_line(value)
        if isinstance(value, dict | list | tuple):
            return one_line(json.dumps(value, ensure_ascii=False, default=str))
        return one_line(place.text if place and place.text else str(value))


def dotted(path: KeyPath) -> str:
    """Join a path of keys and indices to `train.optimizer.eps` or `data.train[0]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{one_line(key)}" for key in path)
    return text.removeprefix(".")


def one_line(text: str) -> str:
    """Escape line breaks and control characters, and shorten the text to fit into a message."""
    # Escaped before it is shortened: keys and values may hold sequences that a terminal would act on.
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def translate_errors(error: ValidationError, document: Document, keys: JobKeys, at: KeyPath = ()) -> list[Problem]:
    """Translate pydantic's errors to problems with a place and a sentence.

    Args:
        error: Error from validating the document's values, or one section of them.
        document: Job file that was validated, with the place of each value.
        keys: Keys of the job file and what each may hold.
        at: Path of the validated section; () for the whole file.

    Returns:
        One problem per value to fix. A value that matches no member of a union is one problem.
    """
    problems = []
    for details in error.errors(include_url=False):
        case = _Case.of(details, document, keys, at)
        if (
            case.kind == "too_short"
            and isinstance(case.value, list | tuple)
            and len(case.value) >= case.context["min_length"]
        ):
            continue  # pydantic counts only the valid items; each invalid one has an error of its own
        path, sentence = _make_sentence(case)
        problems.append(Problem(document.place(path), sentence))
    # pydantic reports each member of a union on its own; for us these are one sentence.
    return list(dict.fromkeys(problems))


def not_one_of(key: str, shown: str, choices: Sequence[object]) -> str:
    """Return the sentence for a value that is none of the choices, with a suggestion if one is similar.

    Args:
        key: Dotted key, `parallel.zero`.
        shown: Value as the user wrote it.
        choices: Values that are allowed.
    """
    if len(choices) == 1:
        return f"{key} is {shown}, which is not {join_values(choices)}; write {join_values(choices)}"
    near = nearest(shown, [str(choice) for choice in choices])
    remedy = f"did you mean {near}?" if near else "choose one of them"
    return f"{key} is {shown}, which is not one of {join_values(choices)}; {remedy}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar name, if any; `lr` and `learning` are similar to learning_rate."""
    # Without capitals and dashes, which are slips of their own.
    name = name.lower().replace("-", "_")
    originals = {candidate.lower().replace("-", "_"): candidate for candidate in names}
    compound = [candidate for candidate in originals if "_" in candidate]
    initials = {"".join(word[:1] for word in candidate.split("_")): candidate for candidate in compound}
    matches = [initials[name]] if name in initials else difflib.get_close_matches(name, originals, n=1)
    # difflib misses a short beginning of a long name: its ratio counts the missing letters.
    matches = matches or [candidate for candidate in compound if candidate.startswith(f"{name}_")]
    return originals[matches[0]] if matches else None


@dataclass(frozen=True)
class _Case:
    """One error of pydantic, with everything a sentence may need."""

    kind: str
    loc: KeyPath
    path: KeyPath
    schema: Schema
    in_union: bool
    value: object
    message: str
    context: Mapping[str, Any]  # pydantic's numbers and texts; the keys depend on the kind of error
    document: Document
    keys: JobKeys

    @classmethod
    def of(cls, details: ErrorDetails, document: Document, keys: JobKeys, at: KeyPath) -> "_Case":
        loc = (*at, *details["loc"])
        target = keys.find(loc)
        # Inside a union pydantic's input may be a part of the value; the sentence is about all of it.
        value = document.value(target.path) if target.in_union else details["input"]
        context = details.get("ctx", {})
        # For an exception of ours `msg` has the prefix "Value error, "; the exception itself has not.
        message = str(context.get("error", details["msg"]))
        return cls(details["type"], loc, *target, value, " ".join(message.split()), context, document, keys)

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


def _make_sentence(case: _Case) -> _Sentence:
    if case.in_union:
        return case.path, f"{case.key} is {case.shown}, which matches none of the allowed forms; give {case.allowed}"
    if case.kind in _SENTENCES:
        return _SENTENCES[case.kind](case)
    if case.kind in _NOT_A:
        return _describe_kind(case)
    # Kinds of error that only a task's own model can raise keep pydantic's wording.
    reason = case.message[:1].lower() + case.message[1:]
    return case.path, f"{case.key} is {case.shown}, which is refused ({reason}); give {case.allowed}"


def _describe_unknown_key(case: _Case) -> _Sentence:
    *section, name = case.path
    where = dotted(tuple(section)) or _TOP
    valid = case.keys.keys_at(case.loc[:-1])
    sections = [dotted(path) or "the top of the job file" for path in case.keys.sections_with(str(name))]
    near = nearest(str(name), valid)
    if sections:
        remedy = f"{one_line(str(name))} belongs to {' or '.join(sections)}"
    elif near:
        remedy = f"did you mean {near}?"
    else:
        remedy = f"the keys allowed there: {join_values(valid)}" if valid else "remove it"
    return case.path, f"{case.key} is not a key of {where}; {remedy}"


def _describe_missing(case: _Case) -> _Sentence:
    *section, name = case.path
    where = dotted(tuple(section)) or _TOP
    # A tuple with too few items: pydantic reports the first index that is missing.
    if isinstance(name, int):
        parent = case.keys.find(case.loc[:-1]).schema
        return case.path, f"{where} has too few items; give {case.keys.allowed(parent)}"
    meaning = case.keys.first_clause(case.schema)
    return case.path, f"{case.key} is missing; add {name} to {where}" + (f" ({meaning})" if meaning else "")


def _describe_choice(case: _Case) -> _Sentence:
    choices = case.keys.choices(case.schema)
    if not choices:
        return case.path, f"{case.key} is {case.shown}, which is not allowed; give {case.context['expected']}"
    # "2" in quotes is text, and looks like the choice 2 in a message.
    if isinstance(case.value, str) and case.value in [format_value(choice) for choice in choices]:
        return case.path, f'{case.key} is the text "{case.value}"; write {case.value} without quotes'
    return case.path, not_one_of(case.key, case.shown, choices)


def _describe_tag(case: _Case) -> _Sentence:
    name, tags = case.keys.tags(case.schema)
    path = (*case.path, name)
    return path, not_one_of(dotted(path), case.document.shown(path, case.document.value(path)), tags)


def _describe_missing_tag(case: _Case) -> _Sentence:
    name, tags = case.keys.tags(case.schema)
    return case.path, f"{case.key}.{name} is missing; choose one of {join_values(tags)}"


def _describe_non_section(case: _Case) -> _Sentence:
    name, tags = case.keys.tags(case.schema)
    keys = case.keys.keys_at(case.loc)
    # The tag alone, `schedule: cosine`, is the likely slip.
    if case.value in tags:
        remedy = f"write {{{name}: {case.value}}}"
    elif tags:
        remedy = f"give it the key {name}, one of {join_values(tags)}"
    else:
        remedy = f"give it keys of its own ({join_values(keys)})" if keys else "give it keys of its own"
    if case.value is None and "default" in case.schema:
        remedy += " or remove it"
    return case.path, f"{case.key} is {case.shown}, which is not a section; {remedy}"


def _describe_bounds(case: _Case) -> _Sentence:
    bounds = {"ge": "is below", "gt": "is not above", "le": "is above", "lt": "is not below"}
    wrong = next(
        f"{words} {format_value(case.context[bound])}" for bound, words in bounds.items() if bound in case.context
    )
    return case.path, f"{case.key} is {case.shown}, which {wrong}; give {case.allowed}"


def _describe_pattern(case: _Case) -> _Sentence:
    pattern = str(case.context["pattern"])
    near = _find_match(str(case.value), pattern)
    remedy = f"did you mean {near}?" if near else "choose another"
    words = case.keys.pattern_words(case.schema) or f"not of the pattern {pattern}"
    return case.path, f"{case.key} is {case.shown}, which is {words}; {remedy}"


def _find_match(value: str, pattern: str) -> str | None:
    """Replace everything but letters and digits, if the result matches the pattern: `my run` -> `my-run`."""
    for filler in "-_":
        candidate = re.sub(r"[^A-Za-z0-9]+", filler, value).strip(filler)
        try:
            if candidate and re.search(pattern, candidate):
                return candidate
        except re.error:  # pydantic matches with Rust's regex syntax, which Python may not parse
            return None
    return None


def _describe_length(case: _Case) -> _Sentence:
    context = case.context
    limit, wrong = (context["min_length"], "fewer") if "min_length" in context else (context["max_length"], "more")
    unit = ("character" if case.kind.startswith("string") else "item") + ("" if limit == 1 else "s")
    return case.path, f"{case.key} is {case.shown}, which has {wrong} than {limit} {unit}; give {case.allowed}"


def _describe_kind(case: _Case) -> _Sentence:
    if case.value is None:
        return case.path, f"{case.key} is empty; give {case.allowed}"
    needed = _NOT_A[case.kind]
    # A number, true or null: in YAML quotes make it text.
    if case.kind == "string_type" and not isinstance(case.value, dict | list):
        remedy = "put it in quotes"
    elif case.allowed in (needed, ANYTHING) and needed != "text":
        remedy = "choose one of them" if " or " in needed else "give one"
    else:
        remedy = f"give {case.allowed}"
    return case.path, f"{case.key} is {case.shown}, which is not {needed}; {remedy}"


def _complete_sentence(case: _Case) -> _Sentence:
    """Complete the sentence of a validator of ours: it starts with a key of the section, or gets the section's name."""
    section = case.path
    blamed = _find_blamed_key(case)
    first = case.message.split(maxsplit=1)[0].rstrip(":,") if case.message else ""
    if first in case.keys.keys_at(case.loc):
        return blamed, f"{dotted((*section, '')) if section else ''}{case.message}"
    if section and first == section[-1]:
        return blamed, dotted((*section[:-1], case.message))
    return blamed, f"{case.key}: {case.message}"


def _find_blamed_key(case: _Case) -> KeyPath:
    """Pick one of the keys that a validator's text names: one from an override, else the first that the user wrote."""
    places = case.document.places
    words = re.findall(r"\w+", case.message)
    named = [path for path in ((*case.path, word) for word in words) if path in places]
    overridden = [path for path in named if places[path].order[0] == 1]
    return next(iter(overridden + named), case.path)


_SENTENCES: dict[str, Callable[[_Case], _Sentence]] = {
    "extra_forbidden": _describe_unknown_key,
    "missing": _describe_missing,
    "literal_error": _describe_choice,
    "enum": _describe_choice,
    "union_tag_invalid": _describe_tag,
    "union_tag_not_found": _describe_missing_tag,
    "model_type": _describe_non_section,
    "model_attributes_type": _describe_non_section,
    "dataclass_type": _describe_non_section,
    "greater_than": _describe_bounds,
    "greater_than_equal": _describe_bounds,
    "less_than": _describe_bounds,
    "less_than_equal": _describe_bounds,
    "string_pattern_mismatch": _describe_pattern,
    "too_short": _describe_length,
    "too_long": _describe_length,
    "string_too_short": _describe_length,
    "string_too_long": _describe_length,
    "value_error": _complete_sentence,
    "assertion_error": _complete_sentence,
}

# pydantic-core's names of errors. A kind that neither table has, such as one of a task's own model, gets pydantic's
# wording.
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
