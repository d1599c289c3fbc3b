"""What one column holds, told from its type and some of its values. Pure; read `look.py` for who reads the values."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from launcher.data.files import PICTURE_SUFFIXES
from launcher.models.conversation import Turn, read_turns

Shape = Literal[
    "text", "integer", "number", "flag", "words", "integers", "numbers", "messages", "spans", "structs",
    "picture", "sound", "other",
]  # fmt: skip
"""`words`, `integers`, `numbers`: lists of them. `messages`: lists of {role, content} or {from, value}, or JSON text of
them; `spans`: of {start, end, label}; `structs`: of something else."""

# What the files of a kind begin with; RIFF holds both kinds and tells which at its ninth byte.
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_SOUNDS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3")

# A character of a script without spaces, a word of letters, a number, or a sign on its own.
_PIECES = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af]|[^\W\d_\u2e80-\u9fff\uac00-\ud7af]+|\d+|[^\w\s]|_")
_LONGEST_READ = 20_000

NO_ANSWER = 1 << 30
"""Stands for the opening of a conversation in which nobody answers."""
_LONGEST_WORD = 20


@dataclass(frozen=True)
class Column:
    """What some rows tell about one column."""

    name: str
    type: str
    shape: Shape
    rows: int
    """Rows looked at."""
    nulls: int = 0
    """Of them null, or without content."""
    distinct: int = 0
    """Different values among them; of a list, different items."""
    lengths: tuple[int, ...] = ()
    """Of each row: the number of items of a list."""
    tokens: tuple[int, ...] = ()
    """Of each row: the estimated tokens of a text, a list of words or a conversation."""
    characters: float = 0.0
    """Mean length of a text."""
    spaced: float = 0.0
    """Share of texts that have a space in them."""
    foreign: float = 0.0
    """Share of letters that are not Latin."""
    whole: bool = False
    """Whether all numbers are whole."""
    low: float = 0.0
    high: float = 0.0
    """The smallest and the largest number, of lists of numbers too."""
    keys: tuple[str, ...] = ()
    """Keys of a struct, or of the structs in a list."""
    roles: tuple[str, ...] = ()
    """Who speaks in conversations, the most frequent first."""
    has_calls: bool = False
    """Whether tools are called in conversations."""
    problem: str = ""
    """Why lists of {role, content} are no conversations that can be read."""
    openings: tuple[int, ...] = ()
    """Of each conversation: the estimated tokens before its first answer."""
    class_names: tuple[str, ...] = ()
    """Names of integer classes, from the files' metadata."""
    feature: str = ""
    """What `datasets` says that it is: Image, Audio, Translation, ClassLabel ..."""
    folder: str = ""
    """Directory that holds all files that the cells name."""
    example: str = ""

    @property
    def mean_tokens(self) -> float:
        """Estimated tokens of a row, on average."""
        return sum(self.tokens) / len(self.tokens) if self.tokens else 0.0

    def said(self) -> str:
        """Name and type, for messages."""
        return f"{self.name} ({self.type})"


def describe_column(name: str, values: pa.ChunkedArray, feature: str = "", class_names: tuple[str, ...] = ()) -> Column:
    """The facts of one column.

    Args:
        name: of the column.
        values: some of its values.
        feature: the `_type` that `datasets` gave it, or "".
        class_names: of its integer classes, if they have names.
    """
    cells = values.to_pylist()
    known = [cell for cell in cells if cell is not None and cell != "" and cell != []]
    shape = _shape(values.type, feature, known)
    base = Column(
        name, _type_text(values.type), shape, len(cells), len(cells) - len(known), class_names=class_names,
        feature=feature, keys=_keys(values.type), example=_example(known),
    )  # fmt: skip
    add = _FACTS.get(shape)
    # Lists count for every row, so that those of two columns can be laid side by side.
    rows = [cell or [] for cell in cells] if shape in ("words", "integers", "numbers") else known
    return base if add is None else replace(base, **add(rows))


def estimate_tokens(text: str) -> int:
    """How many tokens a subword tokenizer makes of a text, roughly: no tokenizer is loaded for it."""
    pieces = _PIECES.findall(text[:_LONGEST_READ])
    count = sum(1 + (len(p) - 1) // (3 if p[0].isdigit() or len(p) > _LONGEST_WORD else 7) for p in pieces)
    return int(count * max(1.0, len(text) / _LONGEST_READ))


def _shape(kind: pa.DataType, feature: str, known: Sequence[object]) -> Shape:
    if pa.types.is_dictionary(kind):
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
        return "picture" if _are_paths(known) else "messages" if _are_conversations(known) else "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
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
        return "messages" if not known or any(map(_turns_of, known[:100])) else "structs"
    spans = {"start", "end", "label"} <= set(types)
    return "spans" if spans and _is_text(types["label"]) and pa.types.is_integer(types["start"]) else "structs"


def _content_shape(kind: pa.DataType, feature: str, known: Sequence[object]) -> Shape:
    """Files in a column: their content, or {bytes, path}."""
    holds = _is_binary(kind) or (pa.types.is_struct(kind) and {"bytes", "path"} <= set(_keys(kind)))
    if not holds:
        return "other"
    first = next((c for cell in known if isinstance(c := _content(cell), bytes) and c), b"")
    paths = [path for cell in known if isinstance(cell, dict) and (path := cell.get("path"))]
    riff = first[8:12] if first.startswith(b"RIFF") else b""
    if riff == b"WAVE" or first.startswith(_SOUNDS):
        return "sound"
    if feature == "Image" or riff == b"WEBP" or first.startswith(_PICTURES) or (not first and _are_paths(paths)):
        return "picture"
    return "other"


def _content(cell: object) -> object:
    return cell.get("bytes") if isinstance(cell, dict) else cell


def _is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_binary(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def is_heavy(kind: pa.DataType) -> bool:
    """Whether cells of a type may hold whole files, so that few of them should be read."""
    if pa.types.is_struct(kind):
        return any(is_heavy(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_heavy(kind.value_type)
    return _is_binary(kind)


def _are_paths(known: Sequence[object]) -> bool:
    return bool(known) and all(str(value).lower().endswith(PICTURE_SUFFIXES) for value in known[:100])


def _are_conversations(known: Sequence[object]) -> bool:
    """Return whether texts are JSON of conversations."""
    return bool(known) and all(str(cell).lstrip().startswith("[") and _turns_of(cell) for cell in known[:100])


def _turns_of(cell: object) -> list[Turn]:
    """Return the messages of a conversation; none of one that cannot be read."""
    try:
        return read_turns(cell, "")
    except ValueError:
        return []


def _keys(kind: pa.DataType) -> tuple[str, ...]:
    item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return tuple(field.name for field in item) if pa.types.is_struct(item) else ()


def _type_text(kind: pa.DataType) -> str:
    """A type as people name it: what `datasets` and pandas wrap around it says nothing here."""
    if pa.types.is_dictionary(kind):
        return str(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list of {_type_text(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(field.name for field in kind) + "}"
    return str(kind).removeprefix("large_")


def _texts(known: list[str]) -> dict[str, Any]:
    sizes = tuple(map(estimate_tokens, known))
    count = max(1, len(known))
    letters = [c for text in known[:200] for c in text[:500] if c.isalpha()]
    return {
        "distinct": len(set(known)), "tokens": sizes,
        "characters": sum(map(len, known)) / count,
        "spaced": sum(" " in text.strip() for text in known) / count,
        "foreign": sum(ord(c) > 0x24F for c in letters) / max(1, len(letters)),
    }  # fmt: skip


def _numbers(known: list[float]) -> dict[str, Any]:
    values = [float(value) for value in known if value == value]  # without NaN, which no comparison survives
    return {
        "distinct": len(set(values)), "whole": all(value.is_integer() for value in values),
        "low": min(values, default=0.0), "high": max(values, default=0.0),
    }  # fmt: skip


def _lists(known: list[list[object]]) -> dict[str, Any]:
    items = [item for row in known for item in row if item is not None]
    facts: dict[str, Any] = {"distinct": len({str(item) for item in items}), "lengths": tuple(map(len, known))}
    numbers = [float(item) for item in items if isinstance(item, int | float)]
    if numbers:
        return facts | {"low": min(numbers), "high": max(numbers)}
    words = [[str(item) for item in row if item is not None] for row in known]
    letters = [c for row in words[:200] for word in row for c in word if c.isalpha()]
    foreign = sum(ord(c) > 0x24F for c in letters) / max(1, len(letters))
    return facts | {"tokens": tuple(sum(map(estimate_tokens, row)) for row in words), "foreign": foreign}


def _conversations(known: list[object]) -> dict[str, Any]:
    conversations = [turns for cell in known if (turns := _turns_of(cell))]
    turns = [turn for conversation in conversations for turn in conversation]
    roles = Counter(turn.role for turn in turns)
    texts = _texts([turn.message["content"] for turn in turns[:2000]])
    return {
        "tokens": tuple(sum(map(_size, conversation)) for conversation in conversations),
        "openings": tuple(map(_opening, conversations)),
        "roles": tuple(sorted(roles, key=lambda role: (-roles[role], role))),
        "has_calls": any("tool_calls" in turn.message for turn in turns),
        "foreign": texts["foreign"],
    }


def _size(turn: Turn) -> int:
    """Return the estimated tokens of a message; a few of the template go with each."""
    calls = turn.message.get("tool_calls")
    return (
        5 + estimate_tokens(turn.message["content"]) + (estimate_tokens(json.dumps(calls, default=str)) if calls else 0)
    )


def _opening(conversation: list[Turn]) -> int:
    size = 0
    for turn in conversation:
        if turn.role == "assistant":
            return size
        size += _size(turn)
    return NO_ANSWER


def _structs(known: list[list[dict[str, object]]]) -> dict[str, Any]:
    problem = ""
    try:
        read_turns(known[0] if known else [], "row 0")
    except ValueError as error:
        problem = str(error) if known[0] and known[0][0].get("role") else ""
    return {"tokens": tuple(estimate_tokens(json.dumps(cell, default=str)) for cell in known), "problem": problem}


_Facts = Callable[[list[Any]], dict[str, Any]]  # of whatever the shape holds, fields of Column
_FACTS: dict[str, _Facts] = {
    "text": _texts,
    "integer": _numbers,
    "number": _numbers,
    "flag": lambda known: {"distinct": len(set(known)), "high": 1.0, "whole": True},
    "words": _lists,
    "integers": _lists,
    "numbers": _lists,
    "spans": lambda known: {"lengths": tuple(map(len, known))},
    "messages": _conversations,
    "structs": _structs,
    "picture": lambda known: {"folder": _folder(known)},
}


def _folder(known: Sequence[object]) -> str:
    cells = (cell if isinstance(cell, str) else _path_of(cell) for cell in known)
    folders = [cell.rpartition("/")[0] for cell in cells if cell]
    parts = zip(*(folder.split("/") for folder in folders), strict=False)
    levels = itertools.takewhile(lambda names: len(set(names)) == 1, parts)
    return "/".join(names[0] for names in levels)


def _path_of(cell: object) -> str:
    """Return the path in a struct that has no content."""
    path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else None
    return path if isinstance(path, str) else ""


def _example(known: Sequence[object]) -> str:
    """The first value, short and on one line; of a file its size."""
    value = next(iter(known), "")
    content = _content(value)
    if isinstance(content, bytes):
        return f"{len(content):,} bytes"
    if isinstance(value, list):
        value = ", ".join(str(item.get("content", item)) if isinstance(item, dict) else str(item) for item in value[:8])
    text = " ".join(str(value)[:400].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 60 else text[:57] + "..."
