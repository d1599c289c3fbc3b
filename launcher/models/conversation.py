"""Conversations as data sets hold them, made into what chat templates read. Pure; runs wherever rows are read.

OpenAI's messages ({role, content}, parts, tool calls) and ShareGPT's turns ({from, value}), as Arrow structs or as JSON
text. Read `chat.py` next for how they are written.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any  # JSON of others

from launcher.formatting import as_text, show_value

Message = dict[str, Any]

# Names that data sets give to the roles of chat templates.
_SPEAKERS = {
    "human": "user",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "function_call"), "assistant"),
}
USUAL: Mapping[str, tuple[str, ...]] = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}
"""Usual names of the columns beside prompts and conversations, by the task's parameter that names them."""
UNREAD = ("history", "image", "images", "videos", "audios")
"""Usual names of columns that belong to conversations and that no task reads."""

_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        message: Keys that a chat template reads: role, content, and tool_calls where there are any.
        speaker: Role as the data names it.
        is_weighted: Whether it may be learned; OpenAI's files say `weight: 0` of what is not.
    """

    message: Message
    speaker: str
    is_weighted: bool = True

    @property
    def role(self) -> str:
        """Return the role as chat templates name it."""
        return str(self.message["role"])

    @property
    def is_empty(self) -> bool:
        """Return whether it neither says nor calls anything."""
        return not self.message["content"].strip() and "tool_calls" not in self.message


def read_turns(cell: object, column: str, own_roles: Collection[str] = ()) -> list[Turn]:
    """Return the messages of a conversation.

    Args:
        cell: List of messages, or JSON text of one.
        column: Column it is from, for messages.
        own_roles: Roles that the chat template knows by the names that {role, content} give them.

    Raises:
        ValueError: It is none; the text says why.
    """
    found = _parsed(cell) if isinstance(cell, str) else _without_nulls(cell)
    if not isinstance(found, list):
        raise ValueError(f"{column} is {show_value(cell)}, which is no list of messages")
    return [_turn(message, f"{column}: message {i}", own_roles) for i, message in enumerate(found)]


def read_tools(cell: object, column: str) -> list[dict[str, Any]] | None:
    """Return the tools that a conversation may call, as chat templates read them; None where there are none.

    Args:
        cell: List of {name, parameters}, alone or as OpenAI wraps them; each of them, or all, may be JSON text.
        column: Column it is from, for messages.

    Raises:
        ValueError: It is neither; the text says why.
    """
    found = _parsed(cell) if isinstance(cell, str) and cell.strip() else _without_nulls(cell)
    if not found:
        return None
    listed = found if isinstance(found, list) else [found]
    tools = [_parsed(tool) if isinstance(tool, str) else tool for tool in listed]
    wrapped = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'{column} is {show_value(cell)}, which is no list of tools (task.tools: "" reads none)')
        wrapped.append({"type": "function", "function": {k: v for k, v in function.items() if k != "type"}})
    return wrapped


def readable(cell: object) -> str:
    """Return a text as it is, and a conversation turn by turn."""
    try:
        turns = read_turns(cell, "")
    except ValueError:
        return json.dumps(_without_nulls(cell), ensure_ascii=False, default=str) if _is_nested(cell) else str(cell)
    return "\n".join(f"{turn.role}: {_said(turn.message)}" for turn in turns) or str(cell)


def _said(message: Message) -> str:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [f"{f['name']}({json.dumps(f['arguments'], ensure_ascii=False, default=str)})" for f in functions]
    return " ".join(part for part in (message["content"], *calls) if part)


def _is_nested(cell: object) -> bool:
    return isinstance(cell, list | dict)


def _parsed(text: str) -> object:
    """Return what JSON text means; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: object) -> object:
    """Return a value without the nulls that Arrow fills in wherever another row's struct has a key more."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _turn(message: object, where: str, own_roles: Collection[str]) -> Turn:
    known = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    is_turn = "role" not in known and "from" in known
    speaker = known.get("from" if is_turn else "role")
    if speaker is None:
        raise ValueError(f"{where} is {show_value(message)}, which is no {{role, content}}")
    speaker = str(speaker)
    if is_turn:
        role = _SPEAKERS.get(speaker.lower(), speaker.lower())
        rest: Message = {}
        content = _content(known.get("value"), where)
    else:
        role = speaker if speaker in own_roles else _SPEAKERS.get(speaker, speaker)
        rest = {key: value for key, value in known.items() if key not in _REPLACED}
        content = _content(known.get("content"), where)
    given = known.get("tool_calls") or known.get("function_call")
    if speaker == "function_call":  # its content is the call
        given, content = content or "null", None
    found = _parsed(given) if isinstance(given, str) else given or []
    calls = [_call(call, where) for call in (found if isinstance(found, list) else [found])]
    if content is None and not calls:
        raise ValueError(f"{where}, of {speaker}, has no content")
    turn: Message = {"role": role, "content": content or "", **rest, **({"tool_calls": calls} if calls else {})}
    return Turn(turn, speaker, known.get("weight") != 0)


_REPLACED = frozenset(("role", "content", "tool_calls", "function_call", "weight"))


def _content(value: object, where: str) -> str | None:
    """Return the text of a message; its parts, as OpenAI's files have them, on a line each."""
    if isinstance(value, list):
        return "\n".join(_part(part, where) for part in value)
    return None if value is None else as_text(value, f"{where}: its content")


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        what = f"of type {kind!r}" if kind not in _TEXT_PARTS else show_value(part)
        raise ValueError(f"{where} has a part {what}, and only parts of type 'text' are read")
    return text


def _call(call: object, where: str) -> Message:
    """Return a tool call as chat templates read it: with its arguments as an object, whatever the data has."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has a tool call {show_value(call)}, which is no {{name, arguments}}")
    given = function.get("arguments", function.get("parameters"))
    arguments = _parsed(given) if isinstance(given, str) and given.strip() else given or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where} calls {function['name']} with {show_value(given)}, which is no JSON object")
    assert isinstance(call, Mapping)
    named = {"id": call["id"]} if call.get("id") is not None else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
