"""Columns of texts, prompts and conversations that a causal language model reads. Runs anywhere.

Read `causal_lm.py` for the task, `models/conversation.py` for what the cells may hold.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar

import pyarrow as pa
from pydantic import Field, model_validator

from launcher.formatting import format_percent
from launcher.models.chat import Writer
from launcher.models.conversation import UNREAD, USUAL
from launcher.tasks.base import SmoothedParams, TrainingColumns, truncation_note

BESIDE = tuple(USUAL)
"""Parameters that name a column beside the prompts or conversations; null takes the column of that name."""


class CausalParams(SmoothedParams):
    """`task:` with `type: causal-lm`."""

    text: str | None = None
    """Column with texts that are learned whole; the column `text` if no other is named."""
    messages: str | None = None
    """Column with conversations, lists of {role, content} or {from, value}; only the answers are learned."""
    prompt: str | None = None
    """Column with a question each; its answer, in the column `response`, is learned."""
    response: str = "response"
    """Column with the answers."""
    input: str | None = None
    """Column with what a prompt is about, which is set on a new line behind it; null reads the column `input` where the
    training data has one beside the prompts, "" none."""
    system: str | None = None
    """Column with the system message of each prompt or conversation; null and "" as for `input`."""
    tools: str | None = None
    """Column with the tools that each conversation may call, lists of {name, parameters} or JSON text of them; null and
    "" as for `input`."""
    answer_roles: tuple[str, ...] = Field(default=("assistant",), min_length=1)
    """Roles whose messages are learned."""
    chat_template: str | None = None
    """Jinja template of conversations; `chatml` for that one; null takes the tokenizer's own."""
    max_length: int = Field(default=512, ge=8)
    """Tokens kept of each row, and the length of a packed sequence; the rest is cut off."""
    packing: bool = True
    """Put several samples into one sequence, with the same loss curve; off where the model lets them see each other."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens that `predict`, and the samples in the report, write at most."""

    one_of: ClassVar = ("text", "messages", "prompt")

    @model_validator(mode="after")
    def _beside(self) -> "CausalParams":
        if self.input and not self.prompt:
            raise ValueError(
                f"input: {self.input} would stand behind a prompt, and no prompt is given; name its column"
            )
        for key in ("system", "tools"):
            if getattr(self, key) and not (self.prompt or self.messages):
                raise ValueError(f"{key}: is for conversations; name their column by messages, or prompts by prompt")
        return self

    @property
    def beside(self) -> tuple[str, ...]:
        """Columns that are read beside the prompt or the conversation."""
        return tuple(dict.fromkeys(name for key in BESIDE if (name := getattr(self, key))))

    @property
    def looked_for(self) -> tuple[str, ...]:
        """Columns that are read beside prompts or conversations if the training data has them."""
        return tuple(key for key in self._keys if getattr(self, key) is None) if self.messages or self.prompt else ()

    def unread(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return remarks on columns that belong to prompts or conversations by their names, and that are not read."""
        if not (self.messages or self.prompt):
            return ()
        keys = {name: key for key in self._keys if not getattr(self, key) for name in USUAL[key]}
        said = {name: f"task.{key}: {name} reads it" for name, key in keys.items()}
        said |= dict.fromkeys(UNREAD, "put it into the prompts or conversations if it matters")
        return tuple(f"column {name} is not read; {said[name]}" for name in names if name in said)

    @property
    def _keys(self) -> tuple[str, ...]:
        """Parameters among `BESIDE` that are of use."""
        return BESIDE if self.prompt else ("system", "tools")

    def with_columns(self, data: TrainingColumns) -> "CausalParams":
        """Return the parameters with the columns that the training data has beside prompts or conversations."""
        if not (self.messages or self.prompt):
            return self
        taken = (self.messages, self.prompt, self.response)
        found = {}
        for key in self._keys:
            if getattr(self, key) is None:
                is_there = key in data.names and key not in taken and _may_stand_beside(key, data.type_of(key))
                found[key] = key if is_there else ""
        return self.model_copy(update=found)


def remarks(writer: Writer, rows: Sequence[Mapping[str, object]], max_length: int) -> tuple[str, ...]:
    """Return what is not learned of some rows, though they can be used."""
    written = []
    for row in rows:
        with suppress(ValueError):  # a bad row, which `judge` reports
            written.append(writer.write(row, True))
    found = truncation_note([len(writer.tokenized(row)[0]) for row in written], max_length)
    answers = sum(row.answers for row in written)
    empty, unlearned = sum(row.empty_answers for row in written), sum(row.unlearned_answers for row in written)
    if empty:
        found += (
            f"{writer.column}: {format_percent(empty / answers)} of the answers are empty ({empty} of the {answers} "
            "looked at), so only their end is learned; fill them, or leave such rows out",
        )
    if unlearned:
        found += (
            f"{writer.column}: {format_percent(unlearned / answers)} of the answers are not learned ({unlearned} of "
            f"the {answers} looked at), as the chat template writes them in another way once others follow; split "
            "conversations behind each answer, or set task.chat_template",
        )
    return found


def _may_stand_beside(key: str, kind: pa.DataType) -> bool:
    """Return whether a column that has the name of a parameter is likely to be meant by it."""
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text or (key == "tools" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)))
