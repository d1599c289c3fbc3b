"""Profile of the user's data: typed facts of each column from a sample of rows.

Runs on the client. Reads footers and at most a few thousand rows. Read `guess.py` next: it chooses the task from these
facts; `labels.py` counts the labels.
"""

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from launcher.data.files import PICTURE_SUFFIXES
from launcher.data.row_sample import sample_rows
from launcher.data.splits import (
    Split,
    hub_features,
    read_file_schema,
    row_bytes,
)
from launcher.errors import DataError
from launcher.models.conversation import Turn, read_turns
from launcher.tasks.params import is_list, item_type

Shape = Literal[
    "text", "integer", "number", "flag", "words", "integers", "numbers", "messages", "spans", "answers", "structs",
    "picture", "sound", "other",
]  # fmt: skip
"""Kind of content. `words`, `integers`, `numbers`: lists of these. `messages`: lists of {role, content} or {from,
value}, or their JSON text. `spans`: lists of {start, end, label}. `answers`: {text, answer_start} of lists, or lists of
{text, start}. `structs`: lists of other structs."""

# First bytes of image and audio files. RIFF contains either (WEBP, WAVE) and names it at byte 8.
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_AUDIO_MAGIC = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3")

# Pieces of a text: a character of a script without spaces, a word, a number, or a single sign.
_PIECES = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af]|[^\W\d_\u2e80-\u9fff\uac00-\ud7af]+|\d+|[^\w\s]|_")
# Characters of a text that are counted; the rest is extrapolated.
_LONGEST_READ = 20_000

NO_ANSWER = 1 << 30
"""Length of the opening of a conversation without an answer: longer than any real one."""
_LONGEST_WORD = 20


@dataclass(frozen=True)
class Column:
    """Facts of one column, from a sample of rows."""

    name: str
    type: str
    shape: Shape
    rows: int
    """Rows in the sample."""
    nulls: int = 0
    """Rows that are null or empty, or hold nothing but nulls."""
    distinct: int = 0
    """Distinct values; for lists, distinct items."""
    lengths: tuple[int, ...] = ()
    """Number of list items in each row."""
    tokens: tuple[int, ...] = ()
    """Estimated tokens of each row: of a text, a list of words or a conversation."""
    characters: float = 0.0
    """Mean length of the texts, in characters."""
    spaced: float = 0.0
    """Fraction of texts that contain a space."""
    foreign: float = 0.0
    """Fraction of letters outside the Latin script."""
    whole: bool = False
    """True if all numbers are integers."""
    low: float = 0.0
    high: float = 0.0
    """Smallest (`low`) and largest (`high`) number, also for lists of numbers."""
    keys: tuple[str, ...] = ()
    """Field names of a struct, or of the structs in a list."""
    roles: tuple[str, ...] = ()
    """Roles in conversations, most frequent first."""
    has_calls: bool = False
    """True if conversations contain tool calls."""
    problem: str = ""
    """Why lists of {role, content} cannot be read as conversations; "" if they can."""
    openings: tuple[int, ...] = ()
    """Estimated tokens before the first answer of each conversation."""
    class_names: tuple[str, ...] = ()
    """Names of integer classes, from the metadata of the files."""
    feature: str = ""
    """Feature type in the metadata of `datasets`: Image, Audio, Translation, ClassLabel ..."""
    folder: str = ""
    """Common directory of all files that the cells name."""
    example: str = ""

    @property
    def mean_tokens(self) -> float:
        """Mean of the estimated tokens per row."""
        return sum(self.tokens) / len(self.tokens) if self.tokens else 0.0

    def describe(self) -> str:
        """Return name and type, for messages."""
        return f"{self.name} ({self.type}{', empty' if self.is_empty else ''})"

    @property
    def is_empty(self) -> bool:
        """True if no row of the sample has a value."""
        return self.nulls == self.rows


def describe_column(name: str, values: pa.ChunkedArray, feature: str = "", class_names: tuple[str, ...] = ()) -> Column:
    """Return the facts of one column.

    Args:
        name: Name of the column.
        values: Sample of its values.
        feature: Type of the feature in the metadata of `datasets`; "" if there is none.
        class_names: Names of integer classes; empty if there are none.
    """
    cells = values.to_pylist()
    known = [cell for cell in cells if not _is_empty(cell)]
    # A column without values may be of any kind, so it is taken for none.
    shape = _shape(values.type, feature, known) if known else "other"
    base = Column(
        name, _type_text(values.type), shape, len(cells), len(cells) - len(known), class_names=class_names,
        feature=feature, keys=_keys(values.type), example=_example(known),
    )  # fmt: skip
    collect = _FACTS.get(shape)
    # Null lists count as empty ones, so that the lengths of two columns (words, tags) can be compared row by row.
    rows = [cell or [] for cell in cells] if shape in ("words", "integers", "numbers") else known
    return base if collect is None else replace(base, **collect(rows))


def _is_empty(cell: object) -> bool:
    """Return True if a cell has no value: null, an empty text, or a list or struct of nothing but nulls."""
    if isinstance(cell, dict):
        return all(value is None for value in cell.values())
    return cell is None or cell == "" or (isinstance(cell, list) and all(item is None for item in cell))


def estimate_tokens(text: str) -> int:
    """Estimate the number of subword tokens of a text without a tokenizer, from its words, numbers and signs."""
    pieces = _PIECES.findall(text[:_LONGEST_READ])
    # Rough on purpose, as a tokenizer would have to be downloaded. Strings longer than words (hashes, sequences) are
    # cut into pieces as short as those of numbers.
    count = sum(1 + (len(p) - 1) // (3 if p[0].isdigit() or len(p) > _LONGEST_WORD else 7) for p in pieces)
    return int(count * max(1.0, len(text) / _LONGEST_READ))


def _shape(kind: pa.DataType, feature: str, known: Sequence[object]) -> Shape:
    if pa.types.is_dictionary(kind):
        # pandas writes categories as dictionaries: what counts is the type of their values.
        kind = kind.value_type
    if feature == "Audio":
        return "sound"
    if pa.types.is_boolean(kind):
        return "flag"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if _is_text(kind):
        # Content decides, as all three are strings: that of the first 100 values.
        return "picture" if _are_paths(known) else _json_shape(known)
    if is_list(kind):
        return _list_shape(kind.value_type, known)
    return _content_shape(kind, feature, known)


def _list_shape(item: pa.DataType, known: Sequence[object]) -> Shape:
    if _is_text(item):
        return "words"
    if pa.types.is_integer(item) or pa.types.is_boolean(item):
        return "integers"
    if pa.types.is_floating(item):
        return "numbers"
    if not pa.types.is_struct(item):
        return "other"
    types = {field.name: field.type for field in item}
    if {"role", "content"} <= set(types) or {"from", "value"} <= set(types):
        # One readable conversation is enough: a run reports the others, with their rows.
        return "messages" if any(map(_turns_of, known[:100])) else "structs"
    if "text" in types and "label" not in types and not {"start", "answer_start"}.isdisjoint(types):
        return "answers"
    spans = {"start", "end", "label"} <= set(types)
    return "spans" if spans and _is_text(types["label"]) and pa.types.is_integer(types["start"]) else "structs"


def _content_shape(kind: pa.DataType, feature: str, known: Sequence[object]) -> Shape:
    """Return the shape of a column of structs, or of files: binary content, or structs {bytes, path}."""
    if {"text", "answer_start"} <= set(_keys(kind)):
        return "answers"
    if not _is_binary(kind) and not (pa.types.is_struct(kind) and {"bytes", "path"} <= set(_keys(kind))):
        return "other"
    contents = map(_content, known)
    # The first bytes tell more than metadata, which many Parquet files do not have.
    first = next((content for content in contents if isinstance(content, bytes) and content), b"")
    paths = [cell["path"] for cell in known if isinstance(cell, dict) and cell.get("path")]
    riff = first[8:12] if first.startswith(b"RIFF") else b""
    if riff == b"WAVE" or first.startswith(_AUDIO_MAGIC):
        return "sound"
    if feature == "Image" or riff == b"WEBP" or first.startswith(_IMAGE_MAGIC) or (not first and _are_paths(paths)):
        return "picture"
    return "other"


def _content(cell: object) -> object:
    return cell.get("bytes") if isinstance(cell, dict) else cell


def _is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_binary(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def is_heavy(kind: pa.DataType) -> bool:
    """Return True if cells of a type may contain whole files, so that only few should be read."""
    if pa.types.is_struct(kind):
        return any(is_heavy(field.type) for field in kind)
    if is_list(kind):
        return is_heavy(kind.value_type)
    return _is_binary(kind)


def _are_paths(known: Sequence[object]) -> bool:
    return bool(known) and all(str(value).lower().endswith(PICTURE_SUFFIXES) for value in known[:100])


def _json_shape(known: Sequence[object]) -> Shape:
    """Return the shape of texts: `messages` for conversations as JSON, `structs` if none of these can be read."""
    lists = [_parse_list(str(cell)) for cell in known[:100]]
    is_chat = all(items and {"role", "from"} & set(items[0]) for items in lists)
    return "text" if not is_chat else "messages" if any(map(_turns_of, known[:100])) else "structs"


def _parse_list(text: str) -> list[dict[str, object]]:
    """Return the objects of a JSON list; empty for another text."""
    try:
        items = json.loads(text) if text.lstrip().startswith("[") else []
    except (ValueError, RecursionError):
        return []
    return items if all(isinstance(item, dict) for item in items) else []


def _turns_of(cell: object) -> list[Turn]:
    """Return the messages of a conversation; empty if it cannot be read."""
    try:
        return read_turns(cell, "")
    except ValueError:
        return []


def _keys(kind: pa.DataType) -> tuple[str, ...]:
    item = item_type(kind)
    return tuple(field.name for field in item) if pa.types.is_struct(item) else ()


def _type_text(kind: pa.DataType) -> str:
    """Return a type in short form, without the wrappers that `datasets` and pandas add."""
    if pa.types.is_dictionary(kind):
        return str(kind.value_type)
    if is_list(kind):
        return f"list of {_type_text(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(field.name for field in kind) + "}"
    return str(kind).removeprefix("large_")


def _text_facts(known: list[str]) -> dict[str, Any]:
    return {
        "distinct": len(set(known)), "tokens": tuple(map(estimate_tokens, known)),
        "characters": sum(map(len, known)) / len(known),
        "spaced": sum(" " in text.strip() for text in known) / len(known), "foreign": _foreign_fraction(known[:200]),
    }  # fmt: skip


def _foreign_fraction(texts: Iterable[str]) -> float:
    """Return the fraction of letters outside the Latin script, which ends with U+024F (Latin Extended-B)."""
    # The beginnings alone, as this loop runs over single characters in Python.
    letters = [c for text in texts for c in text[:500] if c.isalpha()]
    return sum(ord(c) > 0x24F for c in letters) / max(1, len(letters))


def _number_facts(known: list[float]) -> dict[str, Any]:
    # Without NaN, which breaks `min` and `max`.
    values = [float(value) for value in known if value == value]
    return {
        "distinct": len(set(values)), "whole": all(value.is_integer() for value in values),
        "low": min(values, default=0.0), "high": max(values, default=0.0),
    }  # fmt: skip


def _list_facts(known: list[list[object]]) -> dict[str, Any]:
    items = [item for row in known for item in row if item is not None]
    facts: dict[str, Any] = {"distinct": len({str(item) for item in items}), "lengths": tuple(map(len, known))}
    numbers = [float(item) for item in items if isinstance(item, int | float)]
    if numbers:
        return facts | {"low": min(numbers), "high": max(numbers)}
    words = [[str(item) for item in row if item is not None] for row in known]
    foreign = _foreign_fraction(word for row in words[:200] for word in row)
    return facts | {"tokens": tuple(sum(map(estimate_tokens, row)) for row in words), "foreign": foreign}


def _conversation_facts(known: list[object]) -> dict[str, Any]:
    conversations = [turns for turns in map(_turns_of, known) if turns]
    turns = [turn for conversation in conversations for turn in conversation]
    roles = Counter(turn.role for turn in turns)
    return {
        "tokens": tuple(sum(map(_turn_tokens, conversation)) for conversation in conversations),
        "openings": tuple(map(_opening_tokens, conversations)),
        "roles": tuple(sorted(roles, key=lambda role: (-roles[role], role))),
        "has_calls": any("tool_calls" in turn.message for turn in turns),
        "foreign": _foreign_fraction(turn.message["content"] for turn in turns[:200]),
    }


def _turn_tokens(turn: Turn) -> int:
    """Return the estimated tokens of a message, with five for the template."""
    calls = turn.message.get("tool_calls")
    call_tokens = estimate_tokens(json.dumps(calls, default=str)) if calls else 0
    return 5 + estimate_tokens(turn.message["content"]) + call_tokens


def _opening_tokens(conversation: list[Turn]) -> int:
    """Return the estimated tokens before the first answer."""
    opening = list(itertools.takewhile(lambda turn: turn.role != "assistant", conversation))
    return sum(map(_turn_tokens, opening)) if len(opening) < len(conversation) else NO_ANSWER


def _struct_facts(known: list[list[dict[str, object] | None] | str]) -> dict[str, Any]:
    problem = ""
    try:
        read_turns(known[0], "row 0")
    except ValueError as error:
        first = _parse_list(known[0]) if isinstance(known[0], str) else known[0]
        is_chat = bool(first) and any(message and message.get("role") for message in first)
        problem = str(error) if is_chat else ""
    return {"tokens": tuple(estimate_tokens(json.dumps(cell, default=str)) for cell in known), "problem": problem}


_Facts = Callable[[list[Any]], dict[str, Any]]  # cells of one shape -> fields of Column
_FACTS: dict[str, _Facts] = {
    "text": _text_facts,
    "integer": _number_facts,
    "number": _number_facts,
    "flag": lambda known: {"distinct": len(set(known)), "high": 1.0, "whole": True},
    "words": _list_facts,
    "integers": _list_facts,
    "numbers": _list_facts,
    "spans": lambda known: {"lengths": tuple(map(len, known))},
    "messages": _conversation_facts,
    "structs": _struct_facts,
    "picture": lambda known: {"folder": _common_folder(known)},
}


def _common_folder(known: Sequence[object]) -> str:
    cells = (cell if isinstance(cell, str) else _path_of(cell) for cell in known)
    folders = [cell.split("/")[:-1] for cell in cells if cell]
    levels = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    return "/".join(names[0] for names in levels)


def _path_of(cell: object) -> str:
    """Return the path in a struct without content; "" if there is none."""
    path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else None
    return path if isinstance(path, str) else ""


def _example(known: Sequence[object]) -> str:
    """Return the first value on one short line; for a file its size."""
    value = next(iter(known), "")
    content = _content(value)
    if isinstance(content, bytes):
        return f"{len(content):,} bytes"
    if isinstance(value, list):
        value = ", ".join(str(item.get("content", item)) if isinstance(item, dict) else str(item) for item in value[:8])
    text = " ".join(str(value)[:400].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 60 else text[:57] + "..."


_SAMPLE_ROWS = 2000
_SAMPLE_BYTES = 64 << 20
_HEAVY_ROWS = 16
_MAX_LISTED = 12


@dataclass(frozen=True)
class DataProfile:
    """Facts of a split."""

    where: str
    """Location, as the user wrote it."""
    rows: int
    columns: tuple[Column, ...]
    row_bytes: float = 0.0
    """Mean uncompressed size of a row."""

    def column(self, name: str, flag: str = "--text") -> Column:
        """Return a column by its name.

        Args:
            name: Name of the column.
            flag: Option with which the user named it, for the error.

        Raises:
            DataError: There is no such column.
        """
        by_name = {column.name: column for column in self.columns}
        if name in by_name:
            return by_name[name]
        names = list(by_name)
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:_MAX_LISTED])}"
        raise DataError(f"{flag} {name}: {self.where} has no such column; {hint}")

    def parse_names(self, text: str) -> tuple[str, ...]:
        """Return the column names in an option: one name, or several separated by commas. A name may contain commas."""
        is_name = any(column.name == text for column in self.columns)
        return (text,) if is_name else tuple(name.strip() for name in text.split(",") if name.strip())

    def describe_columns(self) -> str:
        """Return the columns with their types, for messages."""
        more = f" and {len(self.columns) - _MAX_LISTED} more" if len(self.columns) > _MAX_LISTED else ""
        return ", ".join(column.describe() for column in self.columns[:_MAX_LISTED]) + more


def profile_data(split: Split, where: str) -> DataProfile:
    """Read a sample of a split and describe its columns. `where` names the data in messages."""
    names = split.schema.names
    metadata = hub_features(read_file_schema(split)).items()
    features = {name: str(value["_type"]) for name, value in metadata if isinstance(value, dict) and "_type" in value}
    classes = dict(split.class_names)
    heavy = [name for name in names if is_heavy(split.schema.field(name).type)]
    size = row_bytes(split)
    # Files (images, audio) are read from a few rows only; without them, wide rows still limit the sample to 64 MiB.
    rows = min(split.rows, _SAMPLE_ROWS if heavy else max(32, min(_SAMPLE_ROWS, int(_SAMPLE_BYTES / size))))
    # Two reads, as one would fetch the heavy columns for all rows of the sample.
    light = sample_rows(split, [name for name in names if name not in heavy], rows)
    content = sample_rows(split, heavy, min(split.rows, _HEAVY_ROWS))
    columns = [
        describe_column(
            name, (content if name in heavy else light).column(name), features.get(name, ""), classes.get(name, ())
        )
        for name in names
    ]
    return DataProfile(where, split.rows, tuple(columns), size)
