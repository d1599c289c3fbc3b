"""Conversations as text, with the places of the answers. Runs in data workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.arrays import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a tokenizer that brings no template of its own (ChatML, as OpenAI published it in 2023).
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

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


def write_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], roles: Sequence[str]) -> Written:
    """A conversation by the tokenizer's chat template; the messages of `roles` are learned.

    Raises:
        ValueError: the template refuses the messages, or writes earlier ones anew when more follow.
    """
    text, learned = _render(tokenizer, messages, False), []
    for i, message in enumerate(messages):
        if message["role"] not in roles:
            continue
        before = _render(tokenizer, messages[:i], True) if i else ""
        until = _render(tokenizer, messages[: i + 1], False)
        if not (text.startswith(before) and text.startswith(until)):
            raise ValueError(
                f"message {i} changes with what follows it, by the chat template; split the conversation behind it, or "
                "set task.chat_template"
            )
        # Where a template opens other roles than the assistant's, the header is learned with the message.
        learned.append((len(before) if len(before) < len(until) else len(until), len(until)))
    return Written(text, tuple(learned))


def write_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], roles: Sequence[str]) -> str:
    """A conversation up to where the model is to answer: its last messages of `roles` are left out."""
    end = len(messages)
    while end and messages[end - 1]["role"] in roles:
        end -= 1
    return _render(tokenizer, messages[:end], True)


def next_tokens(tokenizer: "PreTrainedTokenizerBase", written: Written, chat: bool) -> tuple[list[int], list[int]]:
    """Token ids, and at each the token that follows it if that one is learned, else -100.

    Args:
        tokenizer: a fast one.
        written: the text.
        chat: whether a template wrote the special tokens already.
    """
    found = tokenizer(written.text, add_special_tokens=not chat, return_offsets_mapping=True, truncation=False)
    ids = found["input_ids"]
    learned = [any(a <= start < b for a, b in written.learned) for start, _ in found["offset_mapping"]]
    targets = [token if on else IGNORED for token, on in zip(ids[1:], learned[1:], strict=True)]
    return ids, [*targets, IGNORED][: len(ids)]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages ({error})") from error
    assert isinstance(text, str)
    return text
