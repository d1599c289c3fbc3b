"""A job file as plain values that remember their place: file and line, or the override they came from.

Runs anywhere; read `spec/messages.py` next for how a place gets into a message.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from launcher.errors import SpecError
from launcher.spec.text import read_text

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the job file down to one value."""

_TAG = "tag:yaml.org,2002:"
# `=`, `<<` and 2024-01-31 are plain text here: a job file knows neither merge keys nor dates.
_TEXT_TAGS = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}
_NUMBER_TAGS = {_TAG + kind for kind in ("int", "float", "bool", "null")}
_EXAMPLE = "write it as key.path=value, for example train.epochs=3"
_MENDS = {
    "'\\t'": "indent with spaces",
    "undefined alias": "put text that starts with * in quotes",
    "another document": "keep one of the parts between ---",
    "repeat more": "write the values out, or fewer of them",
}
# Aliases of aliases could make billions of values of a few lines.
_MOST_REPEATED = 10_000
_MEND = "check colons, indentation, brackets and quotes there"
_LONGEST_SHOWN = 80


class Place(NamedTuple):
    """Where a value was given."""

    order: tuple[int, int]
    """Sorts problems: file lines first, overrides in their order after them."""

    where: str
    """`jobs/sst2.yaml:14` or `override train.epochs=3`."""

    text: str | None = None
    """A scalar as it was written, so that 1_000 is shown as 1_000."""


class Problem(NamedTuple):
    """One sentence about one place."""

    place: Place
    sentence: str

    def __str__(self) -> str:
        return f"{self.place.where}: {self.sentence}"


@dataclass
class Document:
    """The values of a job file, overrides applied, with the place of each."""

    values: dict[str, object] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """The place of a value, or of the innermost section around it that was given."""
        return next(self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places)

    def shown(self, path: KeyPath, value: object) -> str:
        """A value for a message: as written where that is known, cut to one short line."""
        if value is None:
            return "empty"
        place = self.places.get(path)
        if isinstance(value, str):
            bare = value and not any(char.isspace() or char in ",;:" for char in value)
            return one_line(value) if bare else f'"{one_line(value)}"'
        if isinstance(value, dict | list | tuple):
            return one_line(json.dumps(value, ensure_ascii=False, default=str))
        return one_line(place.text if place and place.text else str(value))


def dotted(path: KeyPath) -> str:
    """`train.optimizer.eps` or `data.train[0]` for a path of keys and indices."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{one_line(key)}" for key in path)
    return text.removeprefix(".")


def one_line(text: str) -> str:
    """Text with line breaks and control characters made visible, cut to a length a message can bear."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def read_document(path: Path) -> Document:
    """Read a job file without judging its keys.

    Args:
        path: A YAML 1.2 file.

    Returns:
        The file's values and their places; duplicate keys and unknown tags are in its problems.

    Raises:
        SpecError: The file cannot be read, is not YAML, or is not a mapping.
    """
    document = Document()
    name = one_line(str(path))

    def place_at(line: int, text: str | None = None) -> Place:
        return Place((0, line), f"{name}:{line}", text)

    text = read_text(path, name)
    reader = _Reader(text, document, place_at)
    try:
        values = reader.read(())
    except _NotYamlError as error:
        line = text.splitlines()[error.line - 1 : error.line]
        if "${" in "".join(line):
            where = f"{name}:{error.line}"
            raise SpecError(
                (f"{where}: a job file replaces no environment variables; write out what ${{...}} stands for",)
            ) from error
        column = f":{error.column}" if error.column else ""
        remedy = next((mend for part, mend in _MENDS.items() if part in error.reason), _MEND)
        sentence = f"not valid YAML: {error.reason}; {remedy}"
        raise SpecError((f"{name}:{error.line}{column}: {sentence}",)) from error
    if document.problems and not isinstance(values, dict):
        raise SpecError(tuple(str(problem) for problem in document.problems))
    if values is None:
        raise SpecError((f"{name}: the job file is empty; it needs at least name, task, model and data",))
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else document.shown((), values)
        raise SpecError((f"{name}: the job file is {kind}, not a mapping; write it as lines of `key: value`",))
    document.values = values
    return document


def apply_override(document: Document, override: str, position: int) -> None:
    """Put one `key.path=value` into a document; what is wrong with it joins the document's problems.

    Args:
        document: Changed in place; missing sections on the way are created.
        override: The value is YAML; nothing after the `=` means null.
        position: The override's index on the command line, for the order of problems.
    """

    def place_at(_line: int, text: str | None = None) -> Place:
        return Place((1, position), f"override {one_line(override)}", text)

    def refuse(sentence: str) -> None:
        document.problems.append(Problem(place_at(1), sentence))

    name, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in name.split("."))
    if not equals:
        return refuse(f"there is no = in it; {_EXAMPLE}")
    if not all(keys):
        return refuse(f"there is an empty key before the =; {_EXAMPLE}")
    section = document.values
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.get(key)
        if inner is not None and not isinstance(inner, dict):
            outer = dotted(keys[:depth])
            shown = document.shown(keys[:depth], inner)
            return refuse(f"{outer} is {shown}, which has no keys of its own; override {outer} as a whole")
        if inner is None:
            inner = section[key] = {}
            document.places[keys[:depth]] = place_at(1)
        section = inner
    for path in [path for path in document.places if path[: len(keys)] == keys]:
        del document.places[path]
    try:
        section[keys[-1]] = _Reader(text, document, place_at).read(keys)
    except _NotYamlError as error:
        refuse(f"the value is not valid YAML: {error.reason}; put the value in quotes")


class _NotYamlError(Exception):
    """The text is not YAML: why, and where (1-based; column 0 where it is not known)."""

    def __init__(self, reason: str, line: int, column: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column


class _Reader:
    """Turns YAML into plain values and notes the place of every key.

    It reads ruamel's nodes, not its constructed values: those keep lines too, but stop at the first duplicate
    key, turn dates and tags into objects, and lose how a number was written.
    """

    def __init__(self, text: str, document: Document, place_at: Callable[[int, str | None], Place]) -> None:
        self._text = text
        self._document = document
        self._place_at = place_at
        self._yaml = YAML(typ="safe", pure=True)
        # Giving an anchor twice is legal YAML; ruamel warns about it on stderr.
        self._yaml.composer.warn_double_anchors = False
        self._open: set[int] = set()
        self._seen: set[int] = set()
        self._repeated = 0

    def read(self, path: KeyPath) -> object:
        """The value of the whole text, which stands at `path` of the document; None for an empty text."""
        try:
            root = self._yaml.compose(self._text)
            line = root.start_mark.line + 1 if root is not None else 1
            text = root.value if isinstance(root, ScalarNode) else None
            self._document.places[path] = self._place_at(line, text)
            return None if root is None else self._value(root, path)
        except RecursionError as error:
            raise _NotYamlError("it is nested too deeply", 1) from error
        except ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise _NotYamlError(f"character #x{error.character:04x} is not allowed", line) from error
        except MarkedYAMLError as error:
            # The context says what was being read ("while scanning..."), which helps only if it began elsewhere.
            mark, began = error.problem_mark, error.context_mark
            reason = one_line(" ".join(error.problem.split())).removeprefix("but ")
            if began is not None and began.line != mark.line:
                reason += f" ({one_line(error.context)} that began on line {began.line + 1})"
            raise _NotYamlError(reason, mark.line + 1, mark.column + 1) from error
        except YAMLError as error:
            raise _NotYamlError(one_line(str(error)), 1) from error

    def _value(self, node: Node, path: KeyPath) -> object:
        if id(node) in self._open:
            self._refuse(node, f"{dotted(path)} contains itself; write it without the alias")
            return None
        self._repeated += id(node) in self._seen
        self._seen.add(id(node))
        if self._repeated > _MOST_REPEATED:
            raise _NotYamlError(f"its aliases repeat more than {_MOST_REPEATED} values", node.start_mark.line + 1)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self._open.add(id(node))
        value: object = None
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            value = self._mapping(node, path)
        elif isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            value = [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            self._refuse_tag(node, path)
        self._open.discard(id(node))
        return value

    def _item(self, node: Node, path: KeyPath) -> object:
        self._note(path, node, node)
        return self._value(node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                where = dotted(path) or "the job file"
                self._refuse(key_node, f"a key of {where} is not text; write it as `key: value`")
                continue
            # A key is its text, also 0 and true: JSON, overrides and messages know no other keys.
            key = key_node.value
            inner = (*path, key)
            if key_node.tag == f"{_TAG}merge" and not isinstance(value_node, ScalarNode):
                where = dotted(path) or "the job file"
                self._refuse(
                    key_node, f"{where} has a merge key <<, which a job file does not know; write its keys out"
                )
                continue
            if key in values:
                self._refuse(key_node, f"{dotted(inner)} is given twice, first on line {lines[key]}; keep one of them")
                continue
            lines[key] = key_node.start_mark.line + 1
            self._note(inner, key_node, value_node)
            values[key] = self._value(value_node, inner)
        return values

    def _scalar(self, node: ScalarNode, path: KeyPath) -> object:
        if node.tag in _NUMBER_TAGS:
            try:
                return self._yaml.constructor.construct_object(node)
            except (ValueError, KeyError):
                # Looks like a number and is none (`-_`, `!!int abc`, 5000 digits): the field's own check will say so.
                return node.value
        if node.tag not in _TEXT_TAGS:
            self._refuse_tag(node, path)
        return node.value

    def _note(self, path: KeyPath, at: Node, value: Node) -> None:
        text = value.value if isinstance(value, ScalarNode) else None
        self._document.places[path] = self._place_at(at.start_mark.line + 1, text)

    def _refuse_tag(self, node: Node, path: KeyPath) -> None:
        where, tag = dotted(path) or "the job file", one_line(str(node.tag).replace(_TAG, "!!"))
        self._refuse(node, f"{where} has the YAML tag {tag}, which is not known; remove the tag")

    def _refuse(self, node: Node, sentence: str) -> None:
        self._document.problems.append(Problem(self._place_at(node.start_mark.line + 1, None), sentence))
