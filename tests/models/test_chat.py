"""Conversations as text, with the places of the answers (`launcher/models/chat.py`)."""

from pathlib import Path

import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.models.chat import CHATML, Writer
from launcher.models.generate import generate
from launcher.spec.model import ModelSpec
from launcher.tasks.causal_lm import CausalLM, CausalParams

_CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


@pytest.fixture
def tokenizer(tiny_models: dict[str, Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_models["causal-lm"])


def _learned(tokenizer: PreTrainedTokenizerBase, tokens: tuple[list[int], list[int]]) -> list[str]:
    return tokenizer.convert_ids_to_tokens([target for target in tokens[1] if target != -100])


def test_only_answers_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    writer = Writer(tokenizer, "chat", "messages", "response", ("assistant",))
    ids, targets = writer.tokens({"messages": _CHAT}, True)
    words = tokenizer.convert_ids_to_tokens(ids)
    assert " ".join(words) == "user : w1 w2 <end> assistant : w3 <end> user : w4 <end> assistant : w5 w6 <end>"
    assert _learned(tokenizer, (ids, targets)) == ["w3", "<end>", "w5", "w6", "<end>"]
    assert [words[i + 1] for i, t in enumerate(targets) if t != -100] == _learned(tokenizer, (ids, targets))
    assert len(ids) == len(targets)


def test_a_prompt_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    writer = Writer(tokenizer, "chat", "messages", "response", ("assistant",))
    ids, _ = writer.tokens({"messages": _CHAT}, False)
    expected = "user : w1 w2 <end> assistant : w3 <end> user : w4 <end> assistant :"
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == expected


def test_only_the_answer_to_a_prompt_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    writer = Writer(tokenizer, "answer", "question", "reply", ("assistant",))
    tokens = writer.tokens({"question": "w1", "reply": "w2 w3"}, True)
    assert _learned(tokenizer, tokens) == ["w2", "w3", "<end>"]
    with pytest.raises(ValueError, match="reply is null"):
        writer.tokens({"question": "w1", "reply": None}, True)
    assert writer.tokens({"question": "w1", "reply": None}, False)[0]


def test_a_text_is_learned_whole_and_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    writer = Writer(tokenizer, "text", "text", "", ())
    ids, targets = writer.tokens({"text": "w1 w2"}, True)
    # This tokenizer splits at spaces, so the end is glued to the last word; a real one knows its end anywhere.
    assert targets[:-1] == ids[1:]
    assert targets[-1] == -100


def test_chatml_for_a_tokenizer_without_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    writer = Writer(tokenizer, "chat", "messages", "response", ("assistant",))
    with pytest.raises(ValueError, match=r"no chat template; set task\.chat_template: chatml"):
        writer.tokens({"messages": _CHAT}, True)
    tokenizer.chat_template = CHATML
    written = writer.write({"messages": _CHAT}, True)
    assert written.text.startswith("<|im_start|>user\nw1 w2<|im_end|>\n<|im_start|>assistant\nw3<|im_end|>\n")
    spans = [written.text[a:b] for a, b in written.learned]
    assert spans == ["w3<|im_end|>\n", "w5 w6<|im_end|>\n"]


def test_a_template_that_rewrites_earlier_messages_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    writer = Writer(tokenizer, "chat", "messages", "response", ("assistant",))
    with pytest.raises(ValueError, match="the chat template renders message 1 differently when others follow"):
        writer.tokens({"messages": _CHAT}, True)


def test_a_conversation_without_an_answer_is_a_bad_row(tiny_models: dict[str, Path]) -> None:
    task = CausalLM(CausalParams(messages="messages", max_length=16), ModelSpec(name=str(tiny_models["causal-lm"])), 0)
    rows = pa.table({"messages": [_CHAT, _CHAT[:1], None]})
    encoded = task.encode(rows, True)
    assert encoded.valid_rows.tolist() == [0]
    assert encoded.weights.tolist() == [4.0]  # of five learned tokens, one is behind the sixteenth
    assert encoded.problems == (
        (1, "messages has no message of assistant (task.answer_roles), only of user"), (2, "messages is null"),
    )  # fmt: skip


def test_generated_text_does_not_depend_on_the_batch(tiny_models: dict[str, Path]) -> None:
    task = CausalLM(CausalParams(max_new_tokens=6), ModelSpec(name=str(tiny_models["causal-lm"])), 0)
    model = task.build_model().eval()
    prompts = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
    together = generate(model, task.processor(), prompts, 6)
    assert together == [generate(model, task.processor(), [prompt], 6)[0] for prompt in prompts]
    assert generate(model, task.processor(), [], 6) == []


def test_an_answer_ends_with_the_positions_of_the_model(tiny_models: dict[str, Path]) -> None:
    task = CausalLM(CausalParams(), ModelSpec(name=str(tiny_models["causal-lm"])), 0)
    model = task.build_model().eval()
    model.generation_config.eos_token_id = None
    prompts = [[10, 11, 12], [5] * 60, [5] * 64]
    texts = generate(model, task.processor(), prompts, 8)
    assert [len(text.split()) for text in texts] == [8, 4, 0]
    assert texts == [generate(model, task.processor(), [prompt], 8)[0] for prompt in prompts]


def test_a_prompt_that_is_too_long_is_a_bad_row(tiny_models: dict[str, Path]) -> None:
    task = CausalLM(CausalParams(messages="messages", max_length=16), ModelSpec(name=str(tiny_models["causal-lm"])), 0)
    long = [{"role": "user", "content": "w1 " * 20}, {"role": "assistant", "content": "w3"}]
    encoded = task.encode(pa.table({"messages": [long, _CHAT]}), False)
    assert encoded.valid_rows.tolist() == [1]
    assert encoded.problems == ((0, "messages has a prompt of 25 tokens, more than task.max_length: 16 (raise it)"),)
