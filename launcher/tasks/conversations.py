"""Parameters of causal language modelling: which columns hold texts, prompts or conversations. Runs anywhere.

Read `causal_lm.py` for the task and `models/conversation.py` for what the cells may hold.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from launcher.formatting import format_percent
from launcher.models.chat import DATE, IGNORED, Writer, Written
from launcher.models.conversation import UNREAD, USUAL
from launcher.tasks.base import truncation_note
from launcher.tasks.params import PackedParams, SmoothedParams, TrainingColumns, is_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT_KEYS = tuple(USUAL)
"""Parameters that name a column read in addition to prompts or conversations; null takes the column of that name."""


class CausalParams(SmoothedParams, PackedParams):
    """`task:` with `type: causal-lm`."""

    text: str | None = None
    """Column with texts that are learned whole; the column `text` if no other is named."""
    messages: str | None = None
    """Column with conversations, lists of {role, content} or {from, value} or JSON text of them; only the answers are
    learned."""
    prompt: str | None = None
    """Column with a question each, as text or as a conversation; its answer, in the column `response`, is learned."""
    response: str = "response"
    """Column with the answers, as texts or as the rest of the conversations."""
    input: str | None = None
    """Column with the input of each prompt, added to it on a new line; null reads the column `input` where the training
    data has one in addition to the prompts, "" none."""
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
    """Tokens kept of each row, and the length of a packed sequence; the rest is cut off. `predict` refuses longer
    prompts (`data.on_bad_row`)."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Most tokens that `predict`, and the samples in the report, generate; fewer where the model's positions end."""

    one_of: ClassVar = ("text", "messages", "prompt")

    @model_validator(mode="after")
    def _check_context(self) -> "CausalParams":
        # "" is falsy on purpose: it says that no column is read, which fits every form.
        if self.input and not self.prompt:
            raise ValueError(f"input: {self.input} would be added to a prompt, and no prompt is given; name its column")
        for key in ("system", "tools"):
            if getattr(self, key) and not self.has_turns:
                raise ValueError(f"{key}: is for conversations; name their column by messages, or prompts by prompt")
        return self

    @property
    def has_turns(self) -> bool:
        """Return True if rows are conversations or prompts, and not texts."""
        return bool(self.messages or self.prompt)

    @property
    def main_column(self) -> str:
        """Column with the texts, conversations or prompts."""
        return self.messages or self.prompt or self.text or "text"

    @property
    def context_columns(self) -> tuple[str, ...]:
        """Columns that are read in addition to the prompts or conversations."""
        return tuple(dict.fromkeys(column for key in _CONTEXT_KEYS if (column := getattr(self, key))))

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that are read in addition to prompts or conversations if the training data has them."""
        return tuple(key for key in self._usable_keys if getattr(self, key) is None) if self.has_turns else ()

    def unread(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return remarks on columns whose names say that they belong to the conversations, but that are not read."""
        if not self.has_turns:
            return ()
        keys = {name: key for key in self._usable_keys if not getattr(self, key) for name in USUAL[key]}
        remedies = {name: f"task.{key}: {name} reads it" for name, key in keys.items()}
        remedies |= dict.fromkeys(UNREAD, "put it into the prompts or conversations if it matters")
        return tuple(f"column {name} is not read; {remedies[name]}" for name in names if name in remedies)

    @property
    def _usable_keys(self) -> tuple[str, ...]:
        # An input is added to a prompt, and a conversation has none to add it to.
        return _CONTEXT_KEYS if self.prompt else ("system", "tools")

    def with_columns(self, data: TrainingColumns) -> "CausalParams":
        """Return the parameters with each context column that is null set to the one of its name, or to "" for none."""
        taken = (self.messages, self.prompt, self.response)
        inferred = {}
        for key in self.optional_columns:
            is_read = key in data.names and key not in taken and _is_context(key, data.type_of(key))
            # "" and not null for a missing column: null would be inferred again, and `infer_params` must keep its own
            # result.
            inferred[key] = key if is_read else ""
        return self.model_copy(update=inferred)

    def writer(self, tokenizer: "PreTrainedTokenizerBase") -> Writer:
        """Return what turns rows into tokens."""
        form: Literal["text", "chat", "answer"] = "chat" if self.messages else "answer" if self.prompt else "text"
        context = {key: getattr(self, key) or "" for key in _CONTEXT_KEYS}
        return Writer(tokenizer, form, self.main_column, self.response, self.answer_roles, **context)


def _is_context(key: str, arrow_type: pa.DataType) -> bool:
    """Return whether a column with the name of a parameter also has a type that the parameter reads."""
    # A name alone proves little: a column `input` of numbers or of pictures has nothing to do with the prompts.
    is_text = pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)
    return is_text or (key == "tools" and is_list(arrow_type))


def learning_notes(writer: Writer, rows: pa.Table, max_length: int) -> tuple[str, ...]:
    """Return remarks on what is not learned of rows, although they can be used.

    Args:
        writer: Writer of the task.
        rows: Rows of the training data, bad ones among them.
        max_length: Tokens kept of each row.
    """
    written = []
    for row in rows.to_pylist():
        # Bad rows are reported elsewhere (`data.on_bad_row`).
        with suppress(ValueError):
            written.append(writer.write(row, True))
    # Tokenized without truncation, or nothing could be said of what is cut off.
    tokenized = [writer.tokenized(row) for row in written]
    notes = truncation_note([len(tokens) for tokens, _ in tokenized], max_length)
    labels = [label for _, targets in tokenized for label in targets[:max_length]]
    if writer.form != "text" and labels:
        share = sum(label != IGNORED for label in labels) / len(labels)
        notes += (f"{writer.column}: {format_percent(share)} of the tokens are learned, those of the answers",)
    return notes + _answer_notes(writer, written)


def _answer_notes(writer: Writer, written: Sequence[Written]) -> tuple[str, ...]:
    """Return remarks on answers that are empty, not learned or without their thoughts, and on a fixed date."""
    answers = sum(row.answers for row in written)
    notes: tuple[str, ...] = ()
    empty = sum(row.empty_answers for row in written)
    if empty:
        notes += (
            f"{writer.column}: {format_percent(empty / answers)} of the answers are empty ({empty} of the {answers} "
            "looked at), so only their end is learned; fill them, or remove such rows",
        )
    unlearned = sum(row.unlearned_answers for row in written)
    if unlearned:
        notes += (
            f"{writer.column}: {format_percent(unlearned / answers)} of the answers are not learned ({unlearned} of "
            f"the {answers} looked at), as the chat template writes them differently once other messages follow; split "
            "conversations after each answer, or set task.chat_template (chatml writes them alike)",
        )
    dropped = sum(row.dropped_thoughts for row in written)
    if dropped:
        notes += (
            f"{writer.column}: the thoughts (reasoning_content) of {format_percent(dropped / answers)} of the answers "
            f"are not learned ({dropped} of the {answers} looked at), as the chat template does not write them; set "
            "task.chat_template to one that does, or put them into the content",
        )
    if writer.writes_date:
        notes += (
            f"{writer.column}: the chat template writes the current date; the run writes {DATE:%Y-%m-%d} on every day, "
            "so that the loss curve does not depend on it",
        )
    return notes


def check_lengths(tokens: Sequence[int], targets: Sequence[int] | None, max_length: int, column: str) -> None:
    """Check that a row has something to learn among its first tokens, or that a prompt is not too long.

    Args:
        tokens: Token ids of the row.
        targets: Labels of a training row; None for a prompt.
        max_length: Tokens kept of each row.
        column: Column of the row, for messages.

    Raises:
        ValueError: It has not, or it is.
    """
    # Cutting a prompt would drop its system message and tools, and the answer would be to something else.
    if targets is None and len(tokens) > max_length:
        raise ValueError(
            f"{column} has a prompt of {len(tokens)} tokens, more than task.max_length: {max_length} (raise it)"
        )
    # `IGNORED` is below every token id: the largest label is `IGNORED` only if none of them is learned.
    if targets is not None and max(targets[:max_length], default=IGNORED) == IGNORED:
        reason = f"nothing to learn among its first {max_length} of {len(tokens)} tokens (task.max_length)"
        raise ValueError(f"{column} has {reason}")
