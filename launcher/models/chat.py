"""Texts, prompts and conversations as tokens, with the answers that are learned. Runs in data workers.

A conversation is rendered by the tokenizer's chat template. What is learned of it:

- the parts that the template marks by `{% generation %}`, if it has this tag;
- otherwise the conversation is rendered again up to the beginning and the end of each answer: where both texts are
  prefixes of the whole text, what is between them is learned. It ends with what the template writes after the answer.

An answer with neither is not learned, and a row without any other is refused. Read `conversation.py` first for what the
data may hold.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import ModelError
from launcher.formatting import as_text, list_names
from launcher.models.conversation import (
    Message,
    Turn,
    read_tools,
    read_turns,
    thoughts_of,
    with_short_ids,
    with_text_arguments,
)
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token without a loss, as in torch and transformers (`ignore_index`)."""

# ChatML as OpenAI published it in 2023, with tools and their calls as Hermes and Qwen2.5 write them, for a tokenizer
# without a template. transformers renders with `trim_blocks`, which drops a line break after a block: hence {{ '\n' }}.
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

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")
DATE = datetime(2024, 7, 26)
"""Date that templates write in place of the current one; Llama 3 has it where there is no clock."""

# A template is a program that indexes and concatenates: what it raises may depend on the row.
_ROW_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

_Tools = list[dict[str, Any]] | None
_Part = tuple[int, int]
_CallForm = Callable[[Sequence[Message]], list[Message]]


@dataclass(frozen=True)
class Written:
    """Row as text, with the characters that are learned.

    Args:
        text: Text that the model reads.
        learned: Pairs (first, one past the last) of characters of the parts that have a loss.
        answers: Number of answers in the row.
        empty_answers: Number of answers without content, of which only the end token is learned.
        unlearned_answers: Number of answers that the chat template renders differently when other messages follow.
        dropped_thoughts: Number of learned answers whose thoughts (`reasoning_content`) are not in the text.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    answers: int = 0
    empty_answers: int = 0
    unlearned_answers: int = 0
    dropped_thoughts: int = 0


@dataclass(frozen=True)
class Writer:
    """Conversion of rows to tokens and labels.

    Args:
        tokenizer: Fast tokenizer, as character offsets are needed.
        form: Part that is learned: a `text` whole, of a `chat` the messages of `roles`, of an `answer` the response.
        column: Column with texts, conversations or prompts.
        response: Column with answers, as texts or conversations.
        roles: Roles whose messages are learned.
        input: Column with the input of each prompt; "" for none.
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
        """Return the token ids of a row and their labels, both (T).

        Labels are shifted: the label at t is the token at t + 1 if that one is learned, else -100.

        Args:
            row: Cell of each column.
            with_targets: True for training; False for a prompt, which ends where the model answers.

        Raises:
            ValueError: The row cannot be rendered; the text says why.
        """
        return self.tokenized(self.write(row, with_targets))

    def tokenized(self, written: Written) -> tuple[list[int], list[int]]:
        """Return the token ids and labels of a rendered row, as `tokens` does."""
        # A chat template writes them itself; a second BOS would be a token that inference never sees.
        has_special_tokens = self.form == "text"
        encoding = self.tokenizer(
            written.text, add_special_tokens=has_special_tokens, return_offsets_mapping=True, truncation=False
        )
        ids = encoding["input_ids"]
        # A token is learned if it overlaps a learned part: byte-level BPE merges the space before an answer into its
        # first token. Special tokens that the tokenizer adds have no width, hence `start + 1`.
        is_learned = [
            any(begin < max(stop, start + 1) and start < end for begin, end in written.learned)
            for start, stop in encoding["offset_mapping"]
        ]
        labels = [token if learned else IGNORED for token, learned in zip(ids[1:], is_learned[1:], strict=True)]
        # Shifted here, not in the loss: the last token of a sample has no label, so in a packed sequence no sample
        # learns to predict the first token of the next one.
        return ids, [*labels, IGNORED][: len(ids)]

    def write(self, row: Mapping[str, object], with_targets: bool) -> Written:
        """Render a row as text. Arguments and errors are those of `tokens`."""
        for name in (self.column, self.response) if self.form == "answer" and with_targets else (self.column,):
            # An empty answer is a bad row here, while an empty message of a conversation is only remarked on.
            if not row[name]:
                raise ValueError(f"{name} is {'null' if row[name] is None else 'empty'}")
        if self.form == "text":
            # No end token in a prompt: the model would begin a new text instead of continuing this one.
            text = f"{as_text(row[self.column], self.column)}{self._end if with_targets else ''}"
            return Written(text, ((0, len(text)),))
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; set task.chat_template: chatml, or one of your own")
        turns = self._turns(row)
        tools = read_tools(row[self.tools], self.tools) if self.tools else None
        if not with_targets:
            return Written(self._prompt(turns, tools), ())
        if self.form == "answer":
            answer = row[self.response]
            # Answers within the prompt are context, as the names of the columns say.
            turns = [replace(turn, is_weighted=False) for turn in turns]
            if isinstance(answer, list) and isinstance(answer[0], dict):
                turns += read_turns(answer, self.response, self.roles)
            else:
                turns.append(Turn({"role": self.roles[0], "content": as_text(answer, self.response)}, self.roles[0]))
        return self._chat(turns, tools)

    @cached_property
    def _end(self) -> str:
        """End token of a text; "" for a tokenizer that appends it itself (T5's does, GPT-2's and Llama's do not)."""
        end = self.tokenizer.eos_token_id
        return "" if end is None or self.tokenizer("a")["input_ids"][-1] == end else str(self.tokenizer.eos_token)

    def _turns(self, row: Mapping[str, object]) -> list[Turn]:
        content = row[self.column]
        prompt_input = row[self.input] if self.input else None
        if self.form == "chat" or isinstance(content, list):
            turns = read_turns(content, self.column, self.roles)
            if prompt_input:
                raise ValueError(f"{self.input} cannot be added to {self.column}, which is a conversation")
        else:
            texts = [as_text(content, self.column), *([as_text(prompt_input, self.input)] if prompt_input else [])]
            turns = [Turn({"role": "user", "content": "\n".join(texts)}, "user")]
        system = row[self.system] if self.system else None
        if system and turns and turns[0].role == "system":
            problem = f"{self.column} begins with a system message, and {self.system} is another"
            raise ValueError(f'{problem}; keep one, or set task.system: ""')
        if system:
            turns.insert(0, Turn({"role": "system", "content": as_text(system, self.system)}, "system"))
        return turns

    def _is_answer(self, turn: Turn) -> bool:
        return turn.role in self.roles or turn.speaker in self.roles

    def _chat(self, turns: Sequence[Turn], tools: _Tools) -> Written:
        """Render a conversation and find the parts of it that are learned."""
        answers = [i for i, turn in enumerate(turns) if self._is_answer(turn)]
        if not answers:
            roles = list_names(sorted({turn.speaker for turn in turns})) or "nobody"
            raise ValueError(
                f"{self.column} has no message of {list_names(self.roles)} (task.answer_roles), only of {roles}"
            )
        weighted = [i for i in answers if turns[i].is_weighted]
        if not weighted:
            raise ValueError(f"{self.column}: all its answers have the weight 0")
        messages = self._messages(turns)
        text = self._render(messages, tools, False)
        # Renders once more for tools, tool calls and content that is not found, and never for a plain conversation.
        self._check_written(messages, tools, text)
        assistants = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        # The tag marks the assistant's messages; of other roles that the job names it says nothing.
        if set(answers) <= set(assistants) and _MARK.search(self._template(tools)):
            marked = dict(zip(assistants, self._marked_parts(messages, tools, assistants), strict=True))
            learned = {i: marked[i] for i in weighted}
        else:
            learned = self._stable_parts(messages, tools, text, weighted)
        return Written(
            text,
            tuple(learned.values()),
            answers=len(answers),
            empty_answers=sum(turns[i].is_empty for i in answers),
            unlearned_answers=len(weighted) - len(learned),
            dropped_thoughts=sum(thoughts_of(messages[i]) not in text for i in learned),
        )

    def _marked_parts(self, messages: Sequence[Message], tools: _Tools, assistants: Sequence[int]) -> list[_Part]:
        """Return the part of each assistant's message that the template marks by `{% generation %}`.

        Raises:
            ValueError: The template does not mark each of these messages once.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map}
        with self._template_errors():
            rendered: Any = render_jinja_template(
                [list(messages)], [*tools] if tools else None, chat_template=self._template(tools),
                return_assistant_tokens_mask=True, **variables,
            )  # fmt: skip
        (text,), (parts,) = rendered
        contents = [messages[i]["content"].rpartition("</think>")[2].strip() for i in assistants]
        # transformers 5.23 counts the characters written so far: a mark within a macro or a `set` block is elsewhere
        # than it says. Content that the template escapes is not found in the text, and proves nothing.
        is_misplaced = len(parts) == len(assistants) and any(
            content in text and content not in text[begin:end]
            for content, (begin, end) in zip(contents, parts, strict=True)
        )
        if len(parts) != len(assistants) or is_misplaced:
            marked = f"{len(parts)} part{'s' * (len(parts) != 1)}{', not all around the answers' * is_misplaced}"
            raise ValueError(
                f"{self.column}: {{% generation %}} of the chat template marks {marked}, and the conversation has "
                f"{len(assistants)} answers; mark each of them once, or remove the tag from task.chat_template"
            )
        return [(begin, end) for begin, end in parts]

    def _stable_parts(
        self, messages: Sequence[Message], tools: _Tools, text: str, answers: Sequence[int]
    ) -> dict[int, _Part]:
        """Return the part of each answer that the template renders alike whether or not other messages follow.

        Templates of reasoning models (Qwen3) render an answer differently once a user's message follows: they drop its
        thoughts. Such an answer is not learned: the prompt that precedes it in inference is not a prefix of this text.
        A tool call without thoughts is: all later prompts have it as this text does.

        Raises:
            ValueError: There is no such answer.
        """
        learned, problems = {}, []
        for i in answers:
            # Two renderings for each answer, so a conversation of n answers costs 2 n + 1.
            prompt = self._render(messages[:i], tools, True) if i else ""
            with_answer = self._render(messages[: i + 1], tools, False)
            is_stable = text.startswith(with_answer)
            opening = 0 if is_stable else _call_opening(messages[i], prompt, with_answer, text)
            if opening:
                learned[i] = (len(prompt), len(with_answer) - opening)
            elif not is_stable:
                problems.append(f"renders message {i} differently when others follow; split the conversation after it")
            elif not text.startswith(prompt):
                role = messages[i]["role"]
                problems.append(f"begins an answer differently from message {i}, of {role}; write it alike")
            else:
                learned[i] = (min(len(prompt), len(with_answer)), len(with_answer))
        # A row with at least one learned answer is used; the others are counted as unlearned.
        if not learned:
            raise ValueError(f"{self.column}: the chat template {problems[0]}, or set task.chat_template")
        return learned

    def _prompt(self, turns: Sequence[Turn], tools: _Tools) -> str:
        """Render a conversation up to where the model answers, without its last messages of `roles`."""
        end = len(turns)
        while end and self._is_answer(turns[end - 1]):
            end -= 1
        messages = self._messages(turns[:end])
        text = self._render(messages, tools, True)
        self._check_written(messages, tools, text, True)
        return text

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        messages = [turn.message for turn in turns]
        return self._call_form(messages) if any("tool_calls" in message for message in messages) else messages

    @cached_property
    def _call_form(self) -> _CallForm:
        """Conversion of tool calls to the form that the template takes; the first one if it takes none.

        Arguments are objects for most templates, whose `tojson` would quote JSON text, and text for DeepSeek's. Ids are
        those of the data, or none, for most; Mistral's refuses all but nine letters and digits.
        """
        call = {"type": "function", "id": "call_0123456789", "function": {"name": "a", "arguments": {"b": "c"}}}
        probe: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        forms: tuple[_CallForm, ...] = (
            list,
            with_text_arguments,
            with_short_ids,
            lambda messages: with_text_arguments(with_short_ids(messages)),
        )
        return next((form for form in forms if self._try_render(form(probe), None, False) is not None), list)

    def _check_written(self, messages: Sequence[Message], tools: _Tools, text: str, prompt: bool = False) -> None:
        """Refuse a conversation of which the template silently drops something.

        Something is dropped if the text is the same without it.

        Args:
            messages: Messages of the conversation.
            tools: Tools that it may call.
            text: Rendered conversation.
            prompt: True if the text ends where the model answers.

        Raises:
            ValueError: Tools, tool calls or content are dropped.
        """
        if tools and self._try_render(messages, None, prompt) == text:
            raise ValueError(
                f"{self.tools}: the chat template writes no tools; set task.chat_template to one that does, or "
                'task.tools: "" to leave them out'
            )
        for i, message in enumerate(messages):
            without: dict[str, Message] = {}
            if "tool_calls" in message:
                without["tool calls"] = {key: value for key, value in message.items() if key != "tool_calls"}
            # Not found as it is: escaped, or dropped.
            if message["content"].strip() and message["content"].strip() not in text:
                without["content"] = {**message, "content": ""}
            for part, reduced in without.items():
                if self._try_render([*messages[:i], reduced, *messages[i + 1 :]], tools, prompt) == text:
                    raise ValueError(
                        f"{self.column}: the chat template does not write the {part} of message {i}, of "
                        f"{message['role']}; set task.chat_template to one that does"
                    )

    def _try_render(self, messages: Sequence[Message], tools: _Tools, prompt: bool) -> str | None:
        """Return the rendered messages, or None if the template refuses them."""
        try:
            return self._render(messages, tools, prompt)
        except ValueError:
            return None

    def _render(self, messages: Sequence[Message], tools: _Tools, prompt: bool) -> str:
        with self._template_errors():
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=[*tools] if tools else None, chat_template=self._template(tools),
                tokenize=False, add_generation_prompt=prompt,
            )  # fmt: skip
        assert isinstance(text, str)
        return text

    def _template(self, tools: _Tools) -> str:
        """Return the template of a conversation; a tokenizer may have another one for tools."""
        return _fix_date(self.tokenizer.get_chat_template(tools=tools))

    @property
    def writes_date(self) -> bool:
        """Return True if the chat template writes the current date, which `DATE` replaces."""
        return self.form != "text" and "strftime_now(" in str(self.tokenizer.chat_template)

    @contextmanager
    def _template_errors(self) -> Iterator[None]:
        """Turn what a template raises into the reason why a row is bad."""
        from jinja2 import TemplateError

        try:
            yield
        except (TemplateError, *_ROW_ERRORS) as error:
            reason = f"the chat template refuses it ({error}), and task.chat_template may name another"
            raise ValueError(f"{self.column}: {reason}") from error


@lru_cache
def _fix_date(template: str) -> str:
    """Return a template that writes `DATE` in place of the current date.

    With the current date, the tokens of a run would depend on the day, and those of a resumed run change at midnight.
    """
    return _CLOCK.sub(lambda call: json.dumps(DATE.strftime(call[2])), template)


def _call_opening(message: Message, prompt: str, with_answer: str, text: str) -> int:
    """Return the number of characters before a tool call that the template writes only while no message follows.

    Qwen3's writes an empty block of thoughts there. 0 if there is none, or if more than that differs.

    Args:
        message: Message that may hold calls.
        prompt: Rendered messages before it, up to where the model answers.
        with_answer: Rendered messages up to this one.
        text: Rendered conversation.
    """
    is_candidate = "tool_calls" in message and not thoughts_of(message) and "</think>" not in message["content"]
    if not is_candidate or not with_answer.startswith(prompt) or not text.startswith(prompt):
        return 0
    own = message["content"].strip() or message["tool_calls"][0]["function"]["name"]
    begin, latest = len(prompt), with_answer.find(own, len(prompt))
    return next((i - begin for i in range(begin, latest + 1) if text.startswith(with_answer[i:], begin)), 0)


def load_chat_tokenizer(model: ModelSpec, template: str | None, required: bool) -> "PreTrainedTokenizerBase":
    """Load a tokenizer with the job's chat template, or its own.

    Args:
        model: Model section of the job.
        template: Jinja template of the job file; `chatml` is `CHATML`; None keeps the tokenizer's own.
        required: True if rows are conversations or prompts, which need a template.

    Raises:
        ModelError: There is no tokenizer; or a template is required, and it is missing or not Jinja.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    tokenizer = load_tokenizer(model)
    # Set even where no template is required: the export saves the tokenizer with the job's template.
    tokenizer.chat_template = CHATML if template == "chatml" else template or tokenizer.chat_template
    if not required:
        return tokenizer
    if tokenizer.chat_template is None:
        raise ModelError(
            f"task.chat_template: missing, and the tokenizer of {model.name} has none; set chatml, or one of your own"
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"task.chat_template: line {error.lineno} is not Jinja ({error.message}); fix the template"
        ) from error
    except (TemplateError, *_ROW_ERRORS):
        # The template may require other messages than this one; rows that it refuses are reported one by one.
        pass
    return tokenizer
