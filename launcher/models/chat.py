"""Conversations as text, with the places of the answers. Runs in data workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from launcher.arrays import IGNORED, as_text, shown
from launcher.errors import ModelError
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a tokenizer that brings no template of its own (ChatML, as OpenAI published it in 2023).
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# A template is a program: what goes wrong in it may be a row's doing.
_ROWS_TELL = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

Message = dict[str, str]


@dataclass(frozen=True)
class Written:
    """A text, and which of its characters are to be learned.

    Args:
        text: what the model reads.
        learned: (first, one past the last) of each part the loss counts.
    """

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Writer:
    """Rows as what a language model reads.

    Args:
        tokenizer: a fast one.
        form: `text` is learned whole; of a `chat` the messages of `roles`; of an `answer` to a prompt the answer.
        column: with texts, conversations or prompts.
        response: column with answers.
        roles: whose messages are learned.
    """

    tokenizer: "PreTrainedTokenizerBase"
    form: Literal["text", "chat", "answer"]
    column: str
    response: str
    roles: tuple[str, ...]

    def tokens(self, row: Mapping[str, object], with_targets: bool) -> tuple[list[int], list[int]]:
        """Token ids, and at each the token that follows it if that one is learned, else -100.

        Args:
            row: the columns.
            with_targets: False leaves out what the model is to write.

        Raises:
            ValueError: the row cannot be written; the text says why.
        """
        written = self._write(row, with_targets)
        # A chat template writes the special tokens itself.
        plain = self.form == "text"
        found = self.tokenizer(written.text, add_special_tokens=plain, return_offsets_mapping=True, truncation=False)
        ids = found["input_ids"]
        learned = [any(a <= start < b for a, b in written.learned) for start, _ in found["offset_mapping"]]
        targets = [token if on else IGNORED for token, on in zip(ids[1:], learned[1:], strict=True)]
        return ids, [*targets, IGNORED][: len(ids)]

    def opening(self, cell: object) -> object:
        """What the model is to go on from: a prompt as it is, of a text the first words."""
        return " ".join(str(cell).split()[:4]) if self.form == "text" and cell else cell

    def _write(self, row: Mapping[str, object], with_targets: bool) -> Written:
        for name in (self.column, self.response) if self.form == "answer" and with_targets else (self.column,):
            if not row[name]:
                raise ValueError(f"{name} is {'null' if row[name] is None else 'empty'}")
        content = row[self.column]
        if self.form == "text":
            text = f"{as_text(content, self.column)}{self._end if with_targets else ''}"
            return Written(text, ((0, len(text)),))
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; set task.chat_template: chatml, or one of your own")
        if self.form == "chat" or isinstance(content, list):
            messages = self._checked(content)
        else:
            messages = [{"role": "user", "content": as_text(content, self.column)}]
        if not with_targets:
            return Written(self._prompt(messages), ())
        if self.form == "answer":
            messages = [*messages, {"role": self.roles[0], "content": as_text(row[self.response], self.response)}]
        return self._chat(messages)

    def _checked(self, content: object) -> list[Message]:
        if not isinstance(content, list):
            raise ValueError(f"{self.column} is {shown(content)}, which is no list of messages")
        for i, message in enumerate(content):
            if not isinstance(message, dict) or message.get("role") is None or "content" not in message:
                raise ValueError(f"{self.column}: message {i} is {shown(message)}, which is no {{role, content}}")
        return content

    @cached_property
    def _end(self) -> str:
        """What ends a text, unless the tokenizer puts it there itself."""
        end = self.tokenizer.eos_token_id
        return "" if end is None or self.tokenizer("a")["input_ids"][-1] == end else str(self.tokenizer.eos_token)

    def _chat(self, messages: Sequence[Message]) -> Written:
        """A conversation by the tokenizer's template, and the places of the messages that are learned."""
        text, learned = self._render(messages, False), []
        for i, message in enumerate(messages):
            if message["role"] not in self.roles:
                continue
            before = self._render(messages[:i], True) if i else ""
            until = self._render(messages[: i + 1], False)
            if not (text.startswith(before) and text.startswith(until)):
                raise ValueError(
                    f"{self.column}: the chat template writes message {i} anew when others follow; split the "
                    "conversation behind it, or set task.chat_template"
                )
            learned.append((min(len(before), len(until)), len(until)))
        return Written(text, tuple(learned))

    def _prompt(self, messages: Sequence[Message]) -> str:
        """A conversation up to where the model is to answer: its last messages of `roles` are left out."""
        end = len(messages)
        while end and messages[end - 1]["role"] in self.roles:
            end -= 1
        return self._render(messages[:end], True)

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, *_ROWS_TELL) as error:
            raise ValueError(f"{self.column}: the chat template refuses it ({error})") from error
        assert isinstance(text, str)
        return text


def load_chat_tokenizer(model: ModelSpec, template: str | None, required: bool) -> "PreTrainedTokenizerBase":
    """A tokenizer with the job's chat template, or its own.

    Args:
        model: whose.
        template: of the job file; `chatml` for that one.
        required: whether rows are conversations, which cannot be written without one.

    Raises:
        ModelError: there is no tokenizer, or no template where one is required.
    """
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = CHATML if template == "chatml" else template or tokenizer.chat_template
    return _with_template(tokenizer, model.name) if required else tokenizer


def _with_template(tokenizer: "PreTrainedTokenizerBase", model: str) -> "PreTrainedTokenizerBase":
    """The same tokenizer, if it can write conversations.

    Args:
        tokenizer: with the job's template, or its own.
        model: whose it is, for the message.

    Raises:
        ModelError: it has no template, or one that is not Jinja.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    if tokenizer.chat_template is None:
        raise ModelError(
            f"task.chat_template: missing, and the tokenizer of {model} has none; set chatml, or one of your own"
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"task.chat_template: line {error.lineno} is not Jinja ({error.message}); mend the template"
        ) from error
    except (TemplateError, *_ROWS_TELL):
        return tokenizer  # it may want other messages than this one: rows will tell
    return tokenizer


def readable(cell: object) -> str:
    """A text as it is, a conversation turn by turn."""
    turns = cell if isinstance(cell, list) else []
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) or str(cell)
