"""Completions of a prompt as tokens: a chosen and a rejected answer, or an answer with a judgement. Data workers.

Prompts and completions are texts, which become messages of the user and the assistant, or lists of messages; a
completion may also be a whole conversation with the prompt in it. Read `chat.py` first for how they are rendered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from launcher.models.chat import IGNORED, Writer
from launcher.models.conversation import Message, Turn, read_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASSISTANT = "assistant"


@dataclass(frozen=True)
class Tokens:
    """Tokens of a prompt and its completion.

    Args:
        ids: Token ids, (T).
        labels: Label at t, the token at t + 1 if it belongs to the completion, else -100, (T).
    """

    ids: list[int]
    labels: list[int]

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first one of the completion."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.ids) - 1) + 1

    @property
    def completion(self) -> list[int]:
        """Tokens of the completion that are labels."""
        return [label for label in self.labels if label != IGNORED]

    def with_completion_of(self, other: "Tokens") -> "Tokens":
        """Return this prompt followed by the completion of another."""
        begin = self.prompt_length
        return Tokens(
            self.ids[:begin] + other.ids[other.prompt_length :],
            [IGNORED] * (begin - 1) + other.labels[other.prompt_length - 1 :],
        )


def decode_labels(tokenizer: "PreTrainedTokenizerBase", labels: Sequence[Sequence[int]]) -> list[str]:
    """Return completions as text, of their labels."""
    texts: list[str] = tokenizer.batch_decode([[t for t in row if t != IGNORED] for row in labels])
    return texts


def fit(sequences: Sequence[Tokens], max_length: int, max_prompt_length: int) -> list[Tokens]:
    """Cut completions of the same prompt to a length: first the beginning of the prompt, then the completions' ends.

    Args:
        sequences: Prompt with each completion.
        max_length: Tokens kept of each.
        max_prompt_length: Tokens that the prompt keeps in any case.
    """
    excess = max(len(sequence.ids) for sequence in sequences) - max_length
    spare = min(sequence.prompt_length for sequence in sequences) - max_prompt_length
    # The same for all completions, which are compared after the same prompt.
    drop = max(0, min(excess, spare))
    end = drop + max_length
    return [Tokens(sequence.ids[drop:end], sequence.labels[drop:end]) for sequence in sequences]


@dataclass(frozen=True)
class CompletionWriter:
    """Conversion of rows to the tokens of a prompt with each of its completions.

    Args:
        tokenizer: Fast tokenizer with a chat template.
        columns: Columns with completions: the chosen and the rejected one, or one column.
        prompt: Column with prompts; "" if the completions are whole conversations.
        system: Column with system messages; "" for none.
    """

    tokenizer: "PreTrainedTokenizerBase"
    columns: tuple[str, ...]
    prompt: str = ""
    system: str = ""

    def tokens(self, row: Mapping[str, object]) -> list[Tokens]:
        """Return the prompt of a row with each of its completions.

        Raises:
            ValueError: The row cannot be used; the text says why.
        """
        prompt = self._prompt_turns(row) if self.prompt else []
        conversations = [self._conversation(prompt, row[column], column) for column in self.columns]
        begin = _completion_begin(conversations, prompt)
        if len(conversations) > 1 and conversations[0] == conversations[1]:
            raise ValueError(f"{' and '.join(self.columns)} are the same, so there is nothing to prefer")
        written = []
        for column, turns in zip(self.columns, conversations, strict=True):
            answers = [turn for turn in turns[begin:] if turn.role == _ASSISTANT]
            if all(turn.is_empty for turn in answers):
                problem = "an empty answer" if answers else f"no message of {_ASSISTANT} after the prompt"
                raise ValueError(f"{column} has {problem}")
            messages = [_as_message(turn, is_learned=i >= begin) for i, turn in enumerate(turns)]
            written.append(Tokens(*self._writers[column].tokens({**row, column: messages}, True)))
        return written

    def prompt_tokens(self, row: Mapping[str, object]) -> list[int]:
        """Return the prompt of a row, which ends where the model answers.

        Raises:
            ValueError: The row cannot be used; the text says why.
        """
        return self._writers[self.prompt or self.columns[0]].tokens(row, False)[0]

    @cached_property
    def _writers(self) -> dict[str, Writer]:
        """Writers by the column that their messages name."""
        roles = (_ASSISTANT,)
        writers = {c: Writer(self.tokenizer, "chat", c, "", roles, system=self.system) for c in self.columns}
        if self.prompt:
            writers[self.prompt] = Writer(self.tokenizer, "answer", self.prompt, "", roles, system=self.system)
        return writers

    def _prompt_turns(self, row: Mapping[str, object]) -> list[Turn]:
        cell = _check_cell(row[self.prompt], self.prompt)
        return [_text_turn("user", cell)] if isinstance(cell, str) else read_turns(cell, self.prompt)

    def _conversation(self, prompt: list[Turn], value: object, column: str) -> list[Turn]:
        """Return a prompt with one completion."""
        cell = _check_cell(value, column)
        if isinstance(cell, str):
            if not prompt:
                raise ValueError(f"{column} is a text, and without task.prompt it should be a list of messages")
            return [*prompt, _text_turn(_ASSISTANT, cell)]
        turns = read_turns(cell, column)
        # A list that does not begin with an answer has the prompt in it (UltraFeedback has it in both places).
        return [*prompt, *turns] if turns and turns[0].role == _ASSISTANT else turns


def _check_cell(value: object, column: str) -> object:
    if not value:
        raise ValueError(f"{column} is {'null' if value is None else 'empty'}")
    return value


def _text_turn(role: str, text: str) -> Turn:
    return Turn({"role": role, "content": text}, role)


def _as_message(turn: Turn, is_learned: bool) -> Message:
    """Return the message of a turn, marked with a weight of 0 if it is an answer that is not learned."""
    is_ignored = turn.role == _ASSISTANT and not (is_learned and turn.is_weighted)
    return {**turn.message, "weight": 0} if is_ignored else turn.message


def _completion_begin(conversations: Sequence[Sequence[Turn]], prompt: Sequence[Turn]) -> int:
    """Return the number of messages of the prompt.

    Two conversations share their prompt; that of a single one is its column's, or what precedes its last answers.
    """
    first = conversations[0]
    if len(conversations) > 1:
        pairs = zip(*conversations, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, conversations)))
    end = len(first)
    while end > len(prompt) and first[end - 1].role == _ASSISTANT:
        end -= 1
    return end
