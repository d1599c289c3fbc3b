"""Reads a job file and overrides into a `JobSpec`, reporting all problems at once, and writes a job back as YAML.

Runs anywhere. Read `spec/messages.py` next for how problems become sentences; `spec/job.py` is the model.
"""

import io
import os
import re
import stat
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import RoundTripRepresenter

from launcher.errors import SpecError, UserError
from launcher.spec.base import KeyPath
from launcher.spec.job import JobSpec
from launcher.spec.messages import Document, Place, Problem, dotted, one_line, translate_errors
from launcher.spec.schema import JobKeys

_MAX_INTEGER = 2**63 - 1
_UNSTORABLE = "holds a NUL or half of a surrogate pair, which no file can store; remove it"
_SPLITS = ("train", "validation", "test")
_PATHS: tuple[KeyPath, ...] = (
    *(("data", split) for split in _SPLITS), ("data", "files_below"), ("data", "cache", "path"), ("model", "name"),
    ("output", "storage"), ("parallel", "offload_path"), ("logging", "mlflow"),
)  # fmt: skip
# `$NAME` counts only as the first part of a path: elsewhere a $ may belong to a file name or an object's key.
_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}|^\$[A-Za-z_][A-Za-z0-9_]*(?=/|$)")

_TAG = "tag:yaml.org,2002:"
# `=`, `<<` and 2024-01-31 are plain text: a job file has neither merge keys nor dates.
_TEXT_TAGS = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}
_NUMBER_TAGS = {_TAG + kind for kind in ("int", "float", "bool", "null")}
# Nested aliases could expand a few lines to billions of values.
_MAX_REPEATED = 10_000
_OVERRIDE_FORM = "write it as key.path=value, for example train.epochs=3"
_FIX = "check colons, indentation, brackets and quotes there"
# Parts of ruamel's error texts (0.19). Another wording there would only lose the hint.
_FIXES = {
    "'\\t'": "indent with spaces",
    "undefined alias": "put text that starts with * in quotes",
    "another document": "keep one of the parts between ---",
    "repeat more": "write the values out, or fewer of them",
}


class TaskParamsLookup(Protocol):
    """Function that returns the model of a task's parameters. Higher layers pass it in, since they know the tasks."""

    def __call__(self, type_name: str, /) -> type[BaseModel]:
        """Return the pydantic model of the keys of `task:` other than `type`.

        Raises:
            UserError: There is no such task. The text starts with `task.type is ...` (see `messages.not_one_of`).
        """
        ...


def load_job(path: str | Path, overrides: Sequence[str] = (), params_of: TaskParamsLookup | None = None) -> JobSpec:
    """Read a job file, apply overrides and validate the result.

    Args:
        path: YAML 1.2 file.
        overrides: Changes as `key.path=value`, the value in YAML. Missing sections are created; the last change wins.
        params_of: Source of the task's parameter model. None does not validate the parameters.

    Returns:
        Job with `task` as the user wrote it.

    Raises:
        SpecError: The file or the overrides are invalid; one sentence per problem.
    """
    document = read_document(Path(path))
    for position, override in enumerate(overrides):
        apply_override(document, override, position)
    # Nothing is raised before all checks have run, so that the user sees every problem at once.
    params, problems = _resolve_params(document, params_of)
    problems += _find_unstorable(document, document.values)
    problems += _find_variables(document)
    keys = _get_keys(params)
    values = keys.without_false_numbers(document.values)
    job = None
    try:
        job = JobSpec.model_validate(values)
    except ValidationError as error:
        problems += translate_errors(error, document, keys)
    if params is not None:
        problems += _validate_params(values, document, params, keys)
    problems += document.problems
    if job is None or problems:
        # By place: the checks above report in an order that means nothing to the user.
        problems.sort(key=lambda problem: problem.place.order)
        raise SpecError(tuple(str(problem) for problem in problems))
    return job


@lru_cache(maxsize=8)  # building the schema takes tens of milliseconds; a sweep needs the same one for each trial
def _get_keys(params: type[BaseModel] | None) -> JobKeys:
    return JobKeys(params)


def _resolve_params(
    document: Document, params_of: TaskParamsLookup | None
) -> tuple[type[BaseModel] | None, list[Problem]]:
    task = document.values.get("task")
    type_name = task.get("type") if isinstance(task, dict) else None
    # JobSpec reports a missing or malformed `task:` or `type`.
    if params_of is None or not isinstance(type_name, str) or not type_name:
        return None, []
    try:
        return params_of(type_name), []
    except UserError as error:
        sentences = error.problems if isinstance(error, SpecError) else (error.message,)
        place = document.place(("task", "type"))
        return None, [Problem(place, " ".join(sentence.split())) for sentence in sentences]


def _validate_params(values: object, document: Document, params: type[BaseModel], keys: JobKeys) -> list[Problem]:
    assert isinstance(values, dict)
    task = values["task"]
    assert isinstance(task, dict)  # _resolve_params read the type from it
    parameters = {key: value for key, value in task.items() if key != "type"}
    try:
        # A model without an `extra` setting would silently drop unknown keys.
        params.model_validate(parameters, extra=None if "extra" in params.model_config else "forbid")
    except ValidationError as error:
        return translate_errors(error, document, keys, at=("task",))
    return []


def _find_unstorable(document: Document, value: object, path: KeyPath = ()) -> list[Problem]:
    """Return the values that records and files cannot hold: integers beyond 64 bits, NULs and lone surrogates."""
    if isinstance(value, dict):
        problems = [
            Problem(document.place((*path, key)), f"a key of {dotted(path) or 'the job file'} {_UNSTORABLE}")
            for key in value
            if not _is_storable(key)
        ]
        return problems + [p for key, inner in value.items() for p in _find_unstorable(document, inner, (*path, key))]
    if isinstance(value, list):
        return [p for index, inner in enumerate(value) for p in _find_unstorable(document, inner, (*path, index))]
    if isinstance(value, str) and not _is_storable(value):
        return [Problem(document.place(path), f"{dotted(path)} {_UNSTORABLE}")]
    if isinstance(value, int) and not -_MAX_INTEGER <= value <= _MAX_INTEGER:
        sentence = f"{dotted(path)} is {document.shown(path, value)}, which exceeds 64 bits; give a smaller number"
        return [Problem(document.place(path), sentence)]
    return []


def _is_storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _find_variables(document: Document) -> list[Problem]:
    """Return paths that contain an environment variable: unexpanded, a directory of that name would be created."""
    problems = []
    sources = document.value(("data", "mixture"))
    names = sources if isinstance(sources, dict) else ()
    for path in (*_PATHS, *(("data", "mixture", name, split) for name in names for split in _SPLITS)):
        value = document.value(path)
        for text in value if isinstance(value, list) else [value]:
            match = _VARIABLE.search(text) if isinstance(text, str) else None
            if match:
                sentence = (
                    f"{dotted(path)} contains {match.group()}, and job files do not expand environment variables; "
                    f'write the path, or let the shell expand it: {dotted(path)}="{one_line(str(text))}" as override'
                )
                problems.append(Problem(document.place(path), sentence))
    return problems


def read_document(path: Path) -> Document:
    """Read a job file without validating its keys.

    Args:
        path: YAML 1.2 file.

    Returns:
        Values of the file and their places. Its problems are duplicate keys and unknown tags.

    Raises:
        SpecError: The file cannot be read, is not YAML, or is not a mapping.
    """
    document = Document()
    name = one_line(str(path))
    text = _read_text(path, name)
    try:
        values = _Reader(text, document, lambda line, scalar: Place((0, line), f"{name}:{line}", scalar)).read(())
    except _NotYamlError as error:
        # A slice, because ruamel may blame the line behind the last one.
        line = text.splitlines()[error.line - 1 : error.line]
        if "${" in "".join(line):
            sentence = "job files do not expand environment variables; write out what ${...} stands for"
            raise SpecError((f"{name}:{error.line}: {sentence}",)) from error
        column = f":{error.column}" if error.column else ""
        remedy = next((fix for part, fix in _FIXES.items() if part in error.reason), _FIX)
        raise SpecError((f"{name}:{error.line}{column}: not valid YAML: {error.reason}; {remedy}",)) from error
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
    """Apply one `key.path=value` to a document; errors are added to the document's problems.

    Args:
        document: Job file, changed in place. Missing sections on the way are created.
        override: Change with the value in YAML; nothing after the `=` means null.
        position: Index of the override on the command line, which orders the problems.
    """
    place = Place((1, position), f"override {one_line(override)}")

    def refuse(sentence: str) -> None:
        document.problems.append(Problem(place, sentence))

    # At the first `=`: a value may hold more of them, as in a query of a URI.
    name, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in name.split("."))
    if not equals:
        return refuse(f"there is no = in it; {_OVERRIDE_FORM}")
    if not all(keys):
        return refuse(f"there is an empty key before the =; {_OVERRIDE_FORM}")
    section = document.values
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.get(key)
        if inner is not None and not isinstance(inner, dict):
            outer = dotted(keys[:depth])
            shown = document.shown(keys[:depth], inner)
            return refuse(f"{outer} is {shown}, which has no keys of its own; override {outer} as a whole")
        if inner is None:
            inner = section[key] = {}
            document.places[keys[:depth]] = place
        section = inner
    # The places of the replaced value must not be blamed for problems of the new one.
    for path in [path for path in document.places if path[: len(keys)] == keys]:
        del document.places[path]
    try:
        section[keys[-1]] = _Reader(text, document, lambda _line, scalar: place._replace(text=scalar)).read(keys)
    except _NotYamlError as error:
        refuse(f"the value is not valid YAML: {error.reason}; put the value in quotes")


def _read_text(path: Path, name: str) -> str:
    """Read the job file as text; `name` is the path as messages show it."""
    try:
        mode = path.stat().st_mode
        # A pipe without a writer would block for ever, and /dev/zero never ends. `<(...)` of a shell is allowed.
        is_piped = stat.S_ISFIFO(mode) and os.path.realpath(path).startswith(("/proc/", "/dev/"))
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_piped):
            raise SpecError((f"{name}: this is a device or a pipe, not a job file; name a YAML file",))
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise SpecError((f"{name}: there is no such file; check the path of the job file",)) from error
    except IsADirectoryError as error:
        raise SpecError((f"{name}: this is a directory, not a job file; name a YAML file in it",)) from error
    except OSError as error:
        raise SpecError((f"{name}: the job file cannot be read ({error.strerror}); check the path",)) from error
    try:
        # -sig drops the byte order mark that editors on Windows write.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise SpecError((f"{name}:{line}: {reason}; save the job file as UTF-8",)) from error


class _NotYamlError(Exception):
    """YAML syntax error with its reason and position (1-based; column 0 if unknown)."""

    def __init__(self, reason: str, line: int, column: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.column = column


class _Reader:
    """Converts YAML to plain values and records the place of each.

    It walks ruamel's nodes. The values that ruamel 0.19 constructs know their lines too (`.lc`), but constructing stops
    at the first duplicate key, turns dates and tags into objects, and cannot return `1_000` as the user wrote it.
    """

    def __init__(self, text: str, document: Document, place_at: Callable[[int, str | None], Place]) -> None:
        self._text = text
        self._document = document
        self._place_at = place_at
        # `pure`: the Python parser, so that error texts do not depend on whether ruamel.yaml.clib is installed.
        self._yaml = YAML(typ="safe", pure=True)
        # YAML allows an anchor to be defined twice; ruamel warns about it on stderr.
        self._yaml.composer.warn_double_anchors = False
        self._open: set[int] = set()
        self._seen: set[int] = set()
        self._num_repeated = 0

    def read(self, path: KeyPath) -> object:
        """Return the value of the whole text, which belongs at `path` of the document; None for an empty text."""
        try:
            root = self._yaml.compose(self._text)
            if root is None:
                self._document.places[path] = self._place_at(1, None)
                return None
            return self._convert(root, path, root)
        except RecursionError as error:
            raise _NotYamlError("it is nested too deeply", 1) from error
        except ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise _NotYamlError(f"character #x{error.character:04x} is not allowed", line) from error
        except MarkedYAMLError as error:
            # The context ("while scanning...") helps only if it began on another line.
            mark = error.problem_mark
            context_mark = error.context_mark
            reason = one_line(" ".join(error.problem.split())).removeprefix("but ")
            if context_mark is not None and context_mark.line != mark.line:
                reason += f" ({one_line(error.context)} that began on line {context_mark.line + 1})"
            raise _NotYamlError(reason, mark.line + 1, mark.column + 1) from error
        except YAMLError as error:
            raise _NotYamlError(one_line(str(error)), 1) from error

    def _convert(self, node: Node, path: KeyPath, placed_at: Node) -> object:
        """Convert a node. Its place is the line of `placed_at`: the key in a mapping, else the node itself."""
        scalar = node.value if isinstance(node, ScalarNode) else None
        self._document.places[path] = self._place_at(placed_at.start_mark.line + 1, scalar)
        if id(node) in self._open:
            self._refuse(node, f"{dotted(path)} contains itself; write it without the alias")
            return None
        self._num_repeated += id(node) in self._seen
        self._seen.add(id(node))
        if self._num_repeated > _MAX_REPEATED:
            # Raised and not recorded: to continue is what would fill the memory.
            raise _NotYamlError(f"its aliases repeat more than {_MAX_REPEATED} values", node.start_mark.line + 1)
        if isinstance(node, ScalarNode):
            return self._convert_scalar(node, path)
        # ruamel returns one node object for an anchor and all its aliases, so `id` finds loops and repetitions.
        self._open.add(id(node))
        value: object = None
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            value = self._convert_mapping(node, path)
        elif isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            value = [self._convert(item, (*path, index), item) for index, item in enumerate(node.value)]
        else:
            self._refuse_tag(node, path)
        self._open.discard(id(node))
        return value

    def _convert_mapping(self, node: MappingNode, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        lines: dict[str, int] = {}
        where = dotted(path) or "the job file"
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._refuse(key_node, f"a key of {where} is not text; write it as `key: value`")
                continue
            # Keys are text, including 0 and true: JSON, overrides and messages have no other keys.
            key = key_node.value
            inner = (*path, key)
            if key_node.tag == f"{_TAG}merge" and not isinstance(value_node, ScalarNode):
                self._refuse(
                    key_node, f"{where} has a merge key <<, which job files do not support; write its keys out"
                )
            elif key in values:
                self._refuse(key_node, f"{dotted(inner)} is given twice, first on line {lines[key]}; keep one of them")
            else:
                lines[key] = key_node.start_mark.line + 1
                values[key] = self._convert(value_node, inner, key_node)
        return values

    def _convert_scalar(self, node: ScalarNode, path: KeyPath) -> object:
        if node.tag in _NUMBER_TAGS:
            try:
                return self._yaml.constructor.construct_object(node)
            except (ValueError, KeyError):
                # Tagged as a number but not one (`-_`, `!!int abc`, 5000 digits): the field's validation reports it.
                return node.value
        if node.tag not in _TEXT_TAGS:
            self._refuse_tag(node, path)
        return node.value

    def _refuse_tag(self, node: Node, path: KeyPath) -> None:
        where = dotted(path) or "the job file"
        tag = one_line(str(node.tag).replace(_TAG, "!!"))
        self._refuse(node, f"{where} has the YAML tag {tag}, which is not known; remove the tag")

    def _refuse(self, node: Node, sentence: str) -> None:
        self._document.problems.append(Problem(self._place_at(node.start_mark.line + 1, None), sentence))


def dump_job(job: JobSpec) -> str:
    """Write a resolved job with all defaults as YAML that `load_job` reads back to an equal job."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 4096  # keeps a path on one line, so that grep finds it
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(job.model_dump(mode="json"), text)
    return text.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null and text so that both people and `load_job` read the intended value."""

    def represent_null(self, _data: None) -> ScalarNode:
        # ruamel writes nothing after the colon, which looks like a forgotten value.
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_text(self, text: str) -> ScalarNode:
        style = "|" if "\n" in text else None
        if not text.replace("\n", "").isprintable():
            # Only double quotes escape; ruamel 0.19 writes \x85 and control characters unescaped in the other styles.
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Representer.add_representer(type(None), _Representer.represent_null)
_Representer.add_representer(str, _Representer.represent_text)
