"""Conversations in the formats of public data sets, converted to the messages of chat templates. Pure; runs anywhere.

Reads OpenAI's messages ({role, content}, content parts, tool calls) and ShareGPT's turns ({from, value}), as Arrow
structs or as JSON text. Read `chat.py` next for how they become text.
"""

import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any  # JSON of any shape

from launcher.formatting import as_text, show_value

Message = dict[str, Any]

# Roles whose content is a call, as in LLaMA-Factory's and ms-swift's files.
_CALLS = ("function_call", "tool_call")
# Role of a chat template by the name that data sets give it.
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", *_CALLS), "assistant"),
}
USUAL: Mapping[str, tuple[str, ...]] = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}
"""Usual names of the columns that are read with prompts and conversations, by the task parameter that names them."""
UNREAD = ("history", "image", "images", "videos", "audios")
"""Usual names of columns that belong to conversations and that no task reads."""

# Names of thoughts in public data; transformers 5.23 gives a template those that it reads.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class Turn:
    """Message of a conversation.

    Args:
        message: Keys that a chat template reads: `role`, `content` ("" for none), and `tool_calls` if there are any.
        speaker: Role as the data names it.
        is_weighted: True if the message may be learned; OpenAI's files mark others with `weight: 0`.
    """

    message: Message
    speaker: str
    is_weighted: bool = True

    @property
    def role(self) -> str:
        """Role as chat templates name it."""
        return str(self.message["role"])

    @property
    def is_empty(self) -> bool:
        """Return True if the message has neither content nor tool calls."""
        return not self.message["content"].strip() and "tool_calls" not in self.message


def read_turns(cell: object, column: str, own_roles: Collection[str] = ()) -> list[Turn]:
    """Return the messages of a conversation.

    Args:
        cell: List of messages, or JSON text of one.
        column: Column of the cell, for messages.
        own_roles: Role names of {role, content} that are passed to the chat template as they are.

    Raises:
        ValueError: The cell is not a conversation; the text says why.
    """
    # Nulls are removed from Arrow structs only: in JSON text a null was written by the author.
    messages = _parse_json(cell) if isinstance(cell, str) else _without_nulls(cell)
    if not isinstance(messages, list):
        raise ValueError(f"{column} is {show_value(cell)}, which is not a list of messages")
    return [_turn(message, f"{column}: message {i}", own_roles) for i, message in enumerate(messages)]


def read_tools(cell: object, column: str) -> list[dict[str, Any]] | None:
    """Return the tools that a conversation may call, in OpenAI's form; None if there are none.

    Args:
        cell: List of {name, parameters}, or of {type, function} as OpenAI wraps them; each, or all, may be JSON text.
        column: Column of the cell, for messages.

    Raises:
        ValueError: The cell does not hold tools.
    """
    value = _parse_json(cell) if isinstance(cell, str) and cell.strip() else _without_nulls(cell)
    if not value:
        return None
    wrapped = []
    for entry in value if isinstance(value, list) else [value]:
        tool = _parse_json(entry) if isinstance(entry, str) else entry
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            remedy = 'task.tools: "" reads none'
            raise ValueError(f"{column} is {show_value(cell)}, which is not a list of tools ({remedy})")
        # OpenAI's form for all: templates read `tool.function`, or pass the tool on as it is.
        wrapped.append({"type": "function", "function": {k: v for k, v in function.items() if k != "type"}})
    return wrapped


def thoughts_of(message: Message) -> str:
    """Return the thoughts of an answer; "" for none."""
    return str(next((message[key] for key in _THOUGHTS if message.get(key)), "")).strip()


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Return messages with the arguments of their tool calls as JSON text."""
    converted = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        converted.append({**message, "tool_calls": calls} if calls else message)
    return converted


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose tool calls have ids of nine letters and digits, which the results that follow name."""
    converted = []
    # Numbered from the beginning, so that the form of a message does not depend on those after it.
    numbered = (f"call{number:05d}" for number in itertools.count())
    short: dict[str, str] = {}
    unanswered: list[str] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            given = str(call.get("id", ""))
            new = given if re.fullmatch("[A-Za-z0-9]{9}", given) else next(numbered)
            short[given] = new
            unanswered.append(new)
            calls.append({**call, "id": new})
        if calls:
            converted.append({**message, "tool_calls": calls})
        elif message["role"] == "tool" and unanswered:
            # Results without an id (ShareGPT's) come in the order of the calls.
            given = str(message.get("tool_call_id", ""))
            new = short[given] if given and given in short else unanswered[0]
            unanswered = [name for name in unanswered if name != new]
            converted.append({**message, "tool_call_id": new})
        else:
            converted.append(message)
    return converted


def to_display_text(cell: object) -> str:
    """Return a text as it is, and a conversation as a line for each message, for the report."""
    try:
        turns = read_turns(cell, "")
    except ValueError:
        is_nested = isinstance(cell, list | dict)
        return json.dumps(_without_nulls(cell), ensure_ascii=False, default=str) if is_nested else str(cell)
    return "\n".join(f"{turn.role}: {_message_text(turn.message)}" for turn in turns) or str(cell)


def _message_text(message: Message) -> str:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [f"{f['name']}({json.dumps(f['arguments'], ensure_ascii=False, default=str)})" for f in functions]
    return " ".join(part for part in (message["content"], *calls) if part)


def _parse_json(text: str) -> object:
    """Return the value of JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: object) -> object:
    """Return a value without null entries: Arrow gives all structs of a column the keys of all rows, as nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _turn(message: object, where: str, own_roles: Collection[str]) -> Turn:
    entries = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    # After nulls are dropped: in a column of both forms Arrow gives every message all keys.
    is_sharegpt = "role" not in entries and "from" in entries
    speaker = entries.get("from" if is_sharegpt else "role")
    if speaker is None:
        raise ValueError(f"{where} is {show_value(message)}, which is not a {{role, content}}")
    speaker = str(speaker)
    if is_sharegpt:
        role = _ROLES.get(speaker.lower(), speaker.lower())
        rest: Message = {}
        content = _content(entries.get("value"), where)
    else:
        # A role that the job names stays: `answer_roles: [model]` means the template's own word.
        role = speaker if speaker in own_roles else _ROLES.get(speaker, speaker)
        # Other keys stay: templates read some of them, such as `name` or `tool_call_id`.
        rest = {key: value for key, value in entries.items() if key not in _REPLACED}
        content = _content(entries.get("content"), where)
    raw_calls = entries.get("tool_calls") or entries.get("function_call")
    if speaker in _CALLS:
        raw_calls = content or "null"
        content = None
    parsed = _parse_json(raw_calls) if isinstance(raw_calls, str) else raw_calls or []
    calls = [_call(call, where) for call in (parsed if isinstance(parsed, list) else [parsed])]
    if content is None and not calls:
        raise ValueError(f"{where}, of {speaker}, has no content")
    turn: Message = {"role": role, "content": content or "", **rest, **({"tool_calls": calls} if calls else {})}
    return Turn(turn, speaker, entries.get("weight") != 0)


_REPLACED = frozenset(("role", "content", "tool_calls", "function_call", "weight"))


def _content(value: object, where: str) -> str | None:
    """Return the text of a message, with content parts (OpenAI's lists of {type, text}) on a line each."""
    if isinstance(value, list):
        return "\n".join(_part(part, where) for part in value)
    return None if value is None else as_text(value, f"{where}: its content")


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        shown = f"of type {kind!r}" if kind not in _TEXT_PARTS else show_value(part)
        raise ValueError(f"{where} has a part {shown}, and only parts of type 'text' are read")
    return text


def _call(call: object, where: str) -> Message:
    """Return a tool call in OpenAI's form, with its arguments as an object even if the data has JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has a tool call {show_value(call)}, which is not a {{name, arguments}}")
    raw_arguments = function.get("arguments", function.get("parameters"))
    is_text = isinstance(raw_arguments, str) and raw_arguments.strip()
    # As an object: most templates write it as JSON, and JSON text would be encoded twice.
    arguments = _parse_json(raw_arguments) if is_text else raw_arguments or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where} calls {function['name']} with {show_value(raw_arguments)}, not a JSON object")
    assert isinstance(call, Mapping)
    named = {"id": call["id"]} if call.get("id") is not None else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
