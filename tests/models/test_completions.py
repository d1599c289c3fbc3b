"""Rows of preference data as tokens: what is prompt, what is learned, and what is cut."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from launcher.models.completions import CompletionWriter, Tokens, decode_labels, fit


@pytest.fixture
def tokenizer(tiny_models: dict[str, Path]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_models["preference"])


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _written(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """Prompt and completion of each sequence, as text."""
    writer = CompletionWriter(tokenizer, ("chosen", "rejected"), **options)
    sequences = writer.tokens(row)
    prompts = [tokenizer.decode(sequence.ids[: sequence.prompt_length]) for sequence in sequences]
    return list(zip(prompts, decode_labels(tokenizer, [s.labels for s in sequences]), strict=True))


_HEAD = "user : w1 <end> assistant :"
_EXPECTED = [(_HEAD, "w2 <end>"), (_HEAD, "w3 w4 <end>")]


def test_texts_messages_and_whole_conversations_mean_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    user = _message("user", "w1")
    good, bad = _message("assistant", "w2"), _message("assistant", "w3 w4")
    texts = {"prompt": "w1", "chosen": "w2", "rejected": "w3 w4"}
    lists = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    whole = {"prompt": "w1", "chosen": [user, good], "rejected": [user, bad]}
    for row in (texts, lists, {**lists, "prompt": "w1"}, whole):
        assert _written(tokenizer, row, prompt="prompt") == _EXPECTED
    assert _written(tokenizer, whole) == _EXPECTED


def test_only_what_differs_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    before = [_message("user", "w1"), _message("assistant", "w5"), _message("user", "w6")]
    row = {"chosen": [*before, _message("assistant", "w2")], "rejected": [*before, _message("assistant", "w3")]}
    head = "user : w1 <end> assistant : w5 <end> user : w6 <end> assistant :"
    assert _written(tokenizer, row) == [(head, "w2 <end>"), (head, "w3 <end>")]
    assert _written(tokenizer, {"prompt": before, "chosen": "w2", "rejected": "w3"}, prompt="prompt") == [
        (head, "w2 <end>"), (head, "w3 <end>"),
    ]  # fmt: skip


def test_a_single_completion_is_the_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [_message("user", "w1"), _message("assistant", "w5"), _message("user", "w6"), _message("assistant", "w2")]
    writer = CompletionWriter(tokenizer, ("completion",))
    (sequence,) = writer.tokens({"completion": turns})
    assert decode_labels(tokenizer, [sequence.labels]) == ["w2 <end>"]
    assert sequence.ids[: sequence.prompt_length] == writer.prompt_tokens({"completion": turns})


def test_a_system_message_precedes_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "w1", "chosen": "w2", "rejected": "w3", "rules": "w9"}
    (prompt, _), _ = _written(tokenizer, row, prompt="prompt", system="rules")
    assert prompt.endswith(": w9 <end> user : w1 <end> assistant :")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "prompt is null"),
        ({"prompt": ""}, "prompt is empty"),
        ({"rejected": None}, "rejected is null"),
        ({"chosen": ""}, "chosen is empty"),
        ({"chosen": []}, "chosen is empty"),
        ({"chosen": [_message("assistant", " ")]}, "chosen has an empty answer"),
        ({"chosen": [_message("user", "w1")]}, "chosen has no message of assistant after the prompt"),
        ({"chosen": "w3"}, "chosen and rejected are the same, so there is nothing to prefer"),
        ({"chosen": [{"text": "w1"}]}, "chosen: message 0 is {'text': 'w1'}, which is not a {role, content}"),
    ],
)
def test_rows_that_say_nothing_are_bad(
    tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError) as caught:
        _written(tokenizer, {"prompt": "w1", "chosen": "w2", "rejected": "w3", **changes}, prompt="prompt")
    assert str(caught.value) == reason


def test_a_text_needs_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"^chosen is a text, and without task\.prompt"):
        _written(tokenizer, {"chosen": "w2", "rejected": "w3"})


def _sequence(prompt: int, completion: int) -> Tokens:
    ids = [*range(prompt), *range(100, 100 + completion)]
    return Tokens(ids, [-100] * (prompt - 1) + ids[prompt:] + [-100])


def test_the_prompt_is_cut_before_the_completions() -> None:
    short, long = _sequence(10, 3), _sequence(10, 8)
    assert fit([short, long], 18, 4) == [short, long]
    # Three tokens too many: the beginning of the prompt, of both alike.
    first, second = fit([short, long], 15, 4)
    assert (first.ids[0], second.ids[0], len(first.ids), len(second.ids)) == (3, 3, 10, 15)
    assert (first.prompt_length, first.completion) == (7, short.completion)
    # The prompt keeps four tokens, and then the longer completion loses its end.
    first, second = fit([short, long], 9, 4)
    assert (second.prompt_length, first.completion, second.completion) == (4, [100, 101, 102], [*range(100, 106)])


def test_a_mismatched_pair_has_one_prompt_and_the_other_completion() -> None:
    pair = _sequence(5, 3).with_completion_of(_sequence(9, 2))
    assert (pair.ids, pair.prompt_length, pair.completion) == ([0, 1, 2, 3, 4, 100, 101], 5, [100, 101])
