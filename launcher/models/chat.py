"""Conversations as text, with the places of the answers. Runs in data workers.

Read `conversation.py` first for what the data may hold.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import ModelError
from launcher.formatting import as_text, list_names
from launcher.models.conversation import Message, Turn, read_tools, read_turns
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that has no loss, as in torch and transformers."""

# For a tokenizer that brings no template of its own: ChatML, as OpenAI published it in 2023; tools and their calls as
# Hermes and Qwen2.5 write them. transformers drops a line break that stands behind a block, hence those in {{ }}.
CHATML = (
    "{% set first = messages and messages[0]['role'] == 'system' %}"
    "{% if tools %}<|im_start|>system\n{% if first %}{{ messages[0]['content'] }}\n\n{% endif %}"
    "You may call functions. They are described within <tools></tools>:\n<tools>"
    "{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}{{ '\n</tools>\n' }}"
    "For each call, write JSON of its name and arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}{% if not (tools and first and loop.first) %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
    "{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# A template is a program: what goes wrong in it may be a row's doing.
_ROWS_TELL = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

_Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Written:
    """A text, and which of its characters are to be learned.

    Args:
        text: What the model reads.
        learned: (first, one past the last) of each part the loss counts.
        answers: Answers of the row that are in the data.
        empty_answers: Those of them without content, of which only the end is learned.
        unlearned_answers: Those of them that the chat template writes otherwise than when they are the last message.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    answers: int = 0
    empty_answers: int = 0
    unlearned_answers: int = 0


@dataclass(frozen=True)
class Writer:
    """Rows as what a language model reads.

    Args:
        tokenizer: A fast one.
        form: `text` is learned whole; of a `chat` the messages of `roles`; of an `answer` to a prompt the answer.
        column: Column with texts, conversations or prompts.
        response: Column with answers.
        roles: Roles whose messages are learned.
        input: Column with what a prompt is about; "" for none.
        system: Column with system messages; "" for none.
        tools: Column with tools that may be called; "" for none.
    """

    tokenizer: "PreTrainedTokenizerBase"
    form: Literal["text", "chat", "answer"]
    column: str
    response: str
    roles: tuple[str, ...]
    input: str = ""
    system: str = ""
    tools: str = ""

    def tokens(self, row: Mapping[str, object], with_targets: bool) -> tuple[list[int], list[int]]:
        """Return token ids, and at each the token that follows it if that one is learned, else -100.

        Args:
            row: Cell of each column.
            with_targets: Whether to write what the model is to learn.

        Raises:
            ValueError: The row cannot be written; the text says why.
        """
        return self.tokenized(self.write(row, with_targets))

    def tokenized(self, written: Written) -> tuple[list[int], list[int]]:
        """Return what `tokens` does, of a row that is written."""
        # A chat template writes the special tokens itself.
        plain = self.form == "text"
        found = self.tokenizer(written.text, add_special_tokens=plain, return_offsets_mapping=True, truncation=False)
        ids = found["input_ids"]
        # The first token of an answer may hold the space before it; special tokens have no width.
        learned = [
            any(begin < max(stop, start + 1) and start < end for begin, end in written.learned)
            for start, stop in found["offset_mapping"]
        ]
        targets = [token if on else IGNORED for token, on in zip(ids[1:], learned[1:], strict=True)]
        return ids, [*targets, IGNORED][: len(ids)]

    def write(self, row: Mapping[str, object], with_targets: bool) -> Written:
        """Return a row as text.

        Raises:
            ValueError: The row cannot be written; the text says why.
        """
        for name in (self.column, self.response) if self.form == "answer" and with_targets else (self.column,):
            if not row[name]:
                raise ValueError(f"{name} is {'null' if row[name] is None else 'empty'}")
        if self.form == "text":
            text = f"{as_text(row[self.column], self.column)}{self._end if with_targets else ''}"
            return Written(text, ((0, len(text)),))
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; set task.chat_template: chatml, or one of your own")
        turns = self._turns(row)
        tools = read_tools(row[self.tools], self.tools) if self.tools else None
        if not with_targets:
            return Written(self._prompt(turns, tools), ())
        if self.form == "answer":
            answer = as_text(row[self.response], self.response)
            turns.append(Turn({"role": self.roles[0], "content": answer}, self.roles[0]))
        return self._chat(turns, tools)

    @cached_property
    def _end(self) -> str:
        """What ends a text, unless the tokenizer puts it there itself."""
        end = self.tokenizer.eos_token_id
        return "" if end is None or self.tokenizer("a")["input_ids"][-1] == end else str(self.tokenizer.eos_token)

    def _turns(self, row: Mapping[str, object]) -> list[Turn]:
        content = row[self.column]
        more = row[self.input] if self.input else None
        if self.form == "chat" or isinstance(content, list):
            turns = read_turns(content, self.column, self.roles)
            if more:
                raise ValueError(f"{self.input} cannot stand behind {self.column}, which is a conversation")
        else:
            texts = [as_text(content, self.column), *([as_text(more, self.input)] if more else [])]
            turns = [Turn({"role": "user", "content": "\n".join(texts)}, "user")]
        system = row[self.system] if self.system else None
        if system and turns and turns[0].role == "system":
            what = f"{self.column} begins with a system message, and {self.system} is another"
            raise ValueError(f'{what}; keep one, or set task.system: ""')
        if system:
            turns.insert(0, Turn({"role": "system", "content": as_text(system, self.system)}, "system"))
        return turns

    def _is_answer(self, turn: Turn) -> bool:
        return turn.role in self.roles or turn.speaker in self.roles

    def _chat(self, turns: Sequence[Turn], tools: _Tools) -> Written:
        """Return a conversation as the template writes it, and the places of the messages that are learned.

        Templates of models that think write an answer in another way once a user's message follows. Such an answer is
        not learned, as the model would learn to write what the template does not ask it for.
        """
        answers = [i for i, turn in enumerate(turns) if self._is_answer(turn)]
        if not answers:
            roles = list_names(sorted({turn.speaker for turn in turns})) or "nobody"
            raise ValueError(
                f"{self.column} has no message of {list_names(self.roles)} (task.answer_roles), only of {roles}"
            )
        messages = self._messages(turns)
        text = self._render(messages, tools, False)
        self._check_written(messages, tools, text)
        learned, problems = [], []
        for i in answers:
            if not turns[i].is_weighted:
                continue
            before = self._render(messages[:i], tools, True) if i else ""
            until = self._render(messages[: i + 1], tools, False)
            if not text.startswith(until):
                problems.append(f"writes message {i} anew when others follow; split the conversation behind it")
            elif not text.startswith(before):
                problems.append(f"begins an answer otherwise than message {i}, of {turns[i].speaker}; write it alike")
            else:
                learned.append((min(len(before), len(until)), len(until)))
        if problems and not learned:
            raise ValueError(f"{self.column}: the chat template {problems[0]}, or set task.chat_template")
        if not learned:
            raise ValueError(f"{self.column}: all its answers have the weight 0")
        empty = sum(turns[i].is_empty for i in answers)
        return Written(text, tuple(learned), len(answers), empty, len(problems))

    def _prompt(self, turns: Sequence[Turn], tools: _Tools) -> str:
        """Return a conversation up to where the model is to answer: its last messages of `roles` are left out."""
        end = len(turns)
        while end and self._is_answer(turns[end - 1]):
            end -= 1
        messages = self._messages(turns[:end])
        text = self._render(messages, tools, True)
        self._check_written(messages, tools, text, True)
        return text

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        messages = [turn.message for turn in turns]
        called = any("tool_calls" in message for message in messages)
        return [_with_text_arguments(m) for m in messages] if called and self._wants_text_arguments else messages

    @cached_property
    def _wants_text_arguments(self) -> bool:
        """Whether the template fails on arguments that are objects, and takes them as JSON text."""
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "a", "arguments": {"b": "c"}}}
        probe: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        if self._rendered_otherwise(probe, None, False) is not None:
            return False
        return self._rendered_otherwise([*map(_with_text_arguments, probe)], None, False) is not None

    def _check_written(self, messages: Sequence[Message], tools: _Tools, text: str, prompt: bool = False) -> None:
        """Refuse a conversation of which the template leaves something out without a word.

        Args:
            messages: Conversation.
            tools: Tools beside it.
            text: What the template made of them.
            prompt: Whether it ends where the model is to answer.

        Raises:
            ValueError: It does, which shows where the text is the same without.
        """
        if tools and self._rendered_otherwise(messages, None, prompt) == text:
            raise ValueError(
                f"{self.tools}: the chat template writes no tools; set task.chat_template to one that does, or "
                'task.tools: "" to leave them out'
            )
        for i, message in enumerate(messages):
            without: dict[str, Message] = {}
            if "tool_calls" in message:
                without["tool calls"] = {key: value for key, value in message.items() if key != "tool_calls"}
            if message["content"].strip() and message["content"].strip() not in text:  # escaped, or left out
                without["content"] = {**message, "content": ""}
            for what, other in without.items():
                if self._rendered_otherwise([*messages[:i], other, *messages[i + 1 :]], tools, prompt) == text:
                    raise ValueError(
                        f"{self.column}: the chat template does not write the {what} of message {i}, of "
                        f"{message['role']}; set task.chat_template to one that does"
                    )

    def _rendered_otherwise(self, messages: Sequence[Message], tools: _Tools, prompt: bool) -> str | None:
        """Return what the template makes of other messages than the row's; None where it refuses them."""
        try:
            return self._render(messages, tools, prompt)
        except ValueError:
            return None

    def _render(self, messages: Sequence[Message], tools: _Tools, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=[*tools] if tools else None, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, *_ROWS_TELL) as error:
            raise ValueError(f"{self.column}: the chat template refuses it ({error})") from error
        assert isinstance(text, str)
        return text


def _with_text_arguments(message: Message) -> Message:
    """Return a message whose tool calls have their arguments as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


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
