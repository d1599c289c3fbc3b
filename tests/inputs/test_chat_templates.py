"""What is learned of conversations under the chat templates of well-known models, and which rows they refuse."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import GPT2Config, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launcher.models.chat import CHATML, Writer
from launcher.spec.model import ModelSpec
from launcher.tasks.causal_lm import CausalLM
from launcher.tasks.conversations import CausalParams
from tests.support.chat_templates import GEMMA, LLAMA31, LLAMA32, MISTRAL, QWEN3, QWEN25, SMOLLM2, SMOLLM3
from tests.support.tiny_models import byte_letters, byte_tokenizer

TEMPLATES = {
    "chatml": CHATML, "qwen2.5": QWEN25, "qwen3": QWEN3, "llama3.1": LLAMA31, "llama3.2": LLAMA32, "mistral": MISTRAL,
    "gemma": GEMMA, "smollm2": SMOLLM2, "smollm3": SMOLLM3,
}  # fmt: skip
# What each template writes before and after an answer that is learned.
ENDS = {
    **dict.fromkeys(("chatml", "qwen2.5", "qwen3", "smollm2"), ("", "<|im_end|>\n")),
    **dict.fromkeys(("llama3.1", "llama3.2"), ("", "<|eot_id|>")),
    "mistral": (" ", "</s>"),
    "gemma": ("", "<end_of_turn>\n"),
    "smollm3": ("<|im_start|>assistant\n", "<|im_end|>\n"),
}
MARKED = ("smollm3",)
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = '{"name": "weather", "arguments": {"town": "T"}}'
CHAT = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
CALLING = [("user", "Weather?"), ("function_call", CALL), ("observation", "sunny"), ("assistant", "It is sunny.")]


def _tokenizer(template: str) -> PreTrainedTokenizerBase:
    core = byte_tokenizer([*byte_letters(), "Ġy"], [("Ġ", "y")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(SPECIAL)
    )
    tokenizer.chat_template = template
    return tokenizer


def _writer(template: str, tools: str = "", roles: tuple[str, ...] = ("assistant",)) -> Writer:
    return Writer(_tokenizer(template), "chat", "messages", "", roles, tools=tools)


def _row(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def _parts(writer: Writer, row: dict[str, Any]) -> list[str]:
    """Return the learned parts of a row, after a check that its labels are the tokens of these."""
    written = writer.write(row, True)
    parts = [written.text[begin:end] for begin, end in written.learned]
    _, labels = writer.tokenized(written)
    assert writer.tokenizer.decode([label for label in labels if label != -100]) == "".join(parts)
    return parts


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "qwen3"])
def test_every_answer_and_its_end_are_learned(name: str) -> None:
    before, after = ENDS[name]
    expected = [f"{before}First.{after}", f"{before}Second.{after}"]
    assert _parts(_writer(TEMPLATES[name]), _row(*CHAT)) == expected
    if name != "gemma":
        assert _parts(_writer(TEMPLATES[name]), _row(("system", "Be kind."), *CHAT)) == expected


@pytest.mark.parametrize("name", ["llama3.1", "gemma"])
def test_answers_that_the_template_trims_are_learned_as_it_writes_them(name: str) -> None:
    row = _row(("user", " One?\n"), ("assistant", " First.\n"), ("user", "Two?"), ("assistant", "\nSecond. "))
    assert _parts(_writer(TEMPLATES[name]), row) == [f"First.{ENDS[name][1]}", f"Second.{ENDS[name][1]}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_of_the_template_are_used_where_it_has_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = _writer(TEMPLATES[name])
    renderings = 0
    render = PreTrainedTokenizerBase.apply_chat_template

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal renderings
        renderings += 1
        return render(*arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counted)
    writer.write(_row(*CHAT), True)
    # By prefixes, each of the two answers is rendered up to its beginning and its end.
    assert renderings == (1 if name in MARKED else 5)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("chatml", f"<tool_call>\n{CALL}\n</tool_call><|im_end|>\n"),
        ("qwen2.5", f"<tool_call>\n{CALL}\n</tool_call><|im_end|>\n"),
        ("llama3.1", '{"name": "weather", "parameters": {"town": "T"}}<|eot_id|>'),
        ("mistral", f'[TOOL_CALLS] [{CALL[:-1]}, "id": "call00000"}}]</s>'),
        ("smollm3", f"<|im_start|>assistant\n\n<tool_call>{CALL}</tool_call><|im_end|>\n"),
    ],
)
def test_tool_calls_and_the_answer_after_them_are_learned(name: str, call: str) -> None:
    # Qwen2.5's writes the line break before a call itself, as its prompt ends with one too.
    before, after = ENDS[name]
    row = _row(*CALLING, tools=json.dumps([tool["function"] for tool in TOOLS]))
    assert _parts(_writer(TEMPLATES[name], "tools"), row) == [call, f"{before}It is sunny.{after}"]


def test_ids_of_calls_are_rewritten_where_the_template_demands_it() -> None:
    calls = [{"id": f"call_{town}_0123456789", "type": "function"} for town in "AB"]
    for call in calls:
        call["function"] = {"name": "weather", "arguments": "{}"}
    messages = [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "b", "tool_call_id": calls[1]["id"]}, {"role": "tool", "content": "a"},
        {"role": "assistant", "content": "Fine."},
    ]  # fmt: skip
    text = _writer(MISTRAL).write({"messages": messages}, True).text
    assert '"id": "call00000"}, ' in text and '"id": "call00001"}]' in text
    assert '{"content": "b", "call_id": "call00001"}' in text and '{"content": "a", "call_id": "call00000"}' in text
    calls[0]["id"], calls[1]["id"] = "abcdefgh1", "abcdefgh2"
    messages[2]["tool_call_id"] = "abcdefgh2"
    assert '{"content": "b", "call_id": "abcdefgh2"}' in _writer(MISTRAL).write({"messages": messages}, True).text
    # Any other template gets the ids of the data.
    given = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].id if m.tool_calls }}{% endfor %}"
    assert "abcdefgh1" in _writer(given).write({"messages": messages}, True).text


# Thoughts


def test_qwen3_learns_the_last_answer_of_a_conversation() -> None:
    row = _row(*CHAT)
    assert _parts(_writer(QWEN3), row) == ["<think>\n\n</think>\n\nSecond.<|im_end|>\n"]
    assert _writer(QWEN3).write(row, True).unlearned_answers == 1


@pytest.mark.parametrize("is_key", [True, False], ids=["reasoning_content", "within the content"])
def test_qwen3_learns_the_thoughts_of_the_last_answer(is_key: bool) -> None:
    row = _row(*CHAT)
    for i in (1, 3):
        answer = row["messages"][i]
        content = answer["content"] if is_key else f"<think>\nI think {i}.\n</think>\n\n{answer['content']}"
        row["messages"][i] = {
            **answer,
            "content": content,
            **({"reasoning_content": f"I think {i}."} if is_key else {}),
        }
    written = _writer(QWEN3).write(row, True)
    assert _parts(_writer(QWEN3), row) == ["<think>\nI think 3.\n</think>\n\nSecond.<|im_end|>\n"]
    assert (written.answers, written.unlearned_answers, written.dropped_thoughts) == (2, 1, 0)
    assert "I think 1." not in written.text


def test_qwen3_learns_calls_with_and_without_thoughts() -> None:
    call = f"<tool_call>\n{CALL}\n</tool_call><|im_end|>\n"
    last = "<think>\n\n</think>\n\nIt is sunny.<|im_end|>\n"
    row = _row(*CALLING, tools=TOOLS)
    assert _parts(_writer(QWEN3, "tools"), row) == [call, last]
    assert _parts(_writer(QWEN3, "tools"), _row(*CALLING, *CALLING, tools=TOOLS)) == [call, call, last]
    row["messages"][1]["thinking"] = "Ask."
    assert _parts(_writer(QWEN3, "tools"), row) == [f"<think>\nAsk.\n</think>\n\n{call}", last]


def test_thoughts_that_the_template_does_not_write_are_noted(tmp_path: Path, build: Callable[..., CausalLM]) -> None:
    row = _row(*CHAT)
    row["messages"][1]["reasoning_content"] = "Hm."
    notes = build(QWEN25).remarks(pa.Table.from_pylist([row]))
    assert notes[1:] == (
        "messages: the thoughts (reasoning_content) of 50 % of the answers are not learned (1 of the 2 looked at), as "
        "the chat template does not write them; set task.chat_template to one that does, or put them into the content",
    )
    assert len(build(QWEN25).remarks(pa.Table.from_pylist([_row(*CHAT)]))) == 1


# Refusals


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("gemma", _row(("system", "Be kind."), *CHAT),
         "messages: the chat template refuses it (System role not supported), and task.chat_template may name another"),
        ("gemma", _row(*CHAT, tools=TOOLS),
         'tools: the chat template writes no tools; set task.chat_template to one that does, or task.tools: "" to '
         "leave them out"),
        ("smollm2", _row(*CALLING),
         "messages: the chat template does not write the tool calls of message 1, of assistant; set task.chat_template "
         "to one that does"),
        ("llama3.1", _row(("user", "Weather?"), ("function_call", f"[{CALL}, {CALL}]")),
         "messages: the chat template refuses it (This model only supports single tool-calls at once!), and "
         "task.chat_template may name another"),
    ],
    ids=["system", "tools", "calls", "parallel calls"],
)  # fmt: skip
def test_what_a_template_does_not_take_is_a_bad_row(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as refused:
        _writer(TEMPLATES[name], "tools" if "tools" in row else "").write(row, True)
    assert str(refused.value) == reason


# Marks


def test_an_answer_of_weight_0_that_is_marked_is_not_learned() -> None:
    row = _row(*CHAT)
    row["messages"][1]["weight"] = 0
    assert _parts(_writer(SMOLLM3), row) == ["<|im_start|>assistant\nSecond.<|im_end|>\n"]


def test_marks_say_nothing_of_other_roles() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    )
    row = _row(("system", "Be kind."), *CHAT)
    assert _parts(_writer(template), row) == ["First.", "Second."]
    assert _parts(_writer(template, roles=("user",)), row) == ["[user]One?<end>", "[user]Two?<end>"]


@pytest.mark.parametrize(
    ("template", "how"),
    [
        (
            "{% for m in messages %}{% set text %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}"
            "{% endset %}{{ text }}.{% endfor %}",
            "4 parts, and the conversation has 2",
        ),
        (
            "{% for m in messages %}{% set text %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endset %}{{ text }}.{% endfor %}",
            "2 parts, not all around the answers, and the conversation has 2",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}.{% endfor %}",
            "1 part, and the conversation has 2",
        ),
    ],
    ids=["too many", "elsewhere", "too few"],
)  # fmt: skip
def test_marks_that_do_not_fit_the_answers_are_refused(template: str, how: str) -> None:
    with pytest.raises(ValueError) as refused:
        _writer(template).write(_row(*CHAT), True)
    assert str(refused.value) == (
        f"messages: {{% generation %}} of the chat template marks {how} answers; mark each of them once, or remove the "
        "tag from task.chat_template"
    )


# The date


@pytest.mark.parametrize(("name", "date"), [("llama3.2", "26 Jul 2024"), ("smollm3", "26 July 2024")])
def test_the_date_of_today_is_not_learned(name: str, date: str, build: Callable[..., CausalLM]) -> None:
    writer = _writer(TEMPLATES[name])
    assert f"Today Date: {date}\n" in writer.write(_row(*CHAT), True).text
    assert f"Today Date: {date}\n" in writer.write(_row(*CHAT), False).text
    # The exported model keeps the template as it was.
    assert writer.tokenizer.chat_template == TEMPLATES[name]
    assert build(TEMPLATES[name]).remarks(pa.Table.from_pylist([_row(*CHAT)]))[-1] == (
        "messages: the chat template writes the current date; the run writes 2024-07-26 on every day, so that the loss "
        "curve does not depend on it"
    )


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., CausalLM]:
    """Build the task of a model with a template."""

    def task(template: str, **params: Any) -> CausalLM:
        tokenizer = _tokenizer(template)
        tokenizer.save_pretrained(tmp_path)
        GPT2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
        params = {"messages": "messages", "max_length": 2048, **params}
        return CausalLM(CausalParams.model_validate(params), ModelSpec(name=str(tmp_path)), 0)

    return task


# Real data


@pytest.mark.parametrize(
    ("name", "digest"), [("chatml", "0f56be474f7a"), ("qwen2.5", "fde0ae2beec4"), ("llama3.1", "34218953e75f")]
)
def test_alpaca_has_the_same_tokens_as_before_and_in_both_forms(name: str, digest: str, shared: Path) -> None:
    rows = pq.read_table(shared / "data/instruction-sft/alpaca_en/train.parquet").slice(0, 120).to_pylist()
    tokenizer = _tokenizer(TEMPLATES[name])
    columns = Writer(tokenizer, "answer", "instruction", "output", ("assistant",), input="input")
    for writer in (_writer(TEMPLATES[name]), columns):
        found = hashlib.sha256("".join(json.dumps(writer.tokens(row, True)) for row in rows).encode())
        assert found.hexdigest()[:12] == digest


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "qwen3", "llama3.1", "mistral", "smollm3"])
def test_every_row_of_glaive_is_learned(name: str, shared: Path) -> None:
    rows = pq.read_table(shared / "data/instruction-sft/glaive_toolcall_en/test.parquet").to_pylist()
    writer = _writer(TEMPLATES[name], "tools")
    calls = 0
    for row in rows:
        parts = "".join(_parts(writer, row))
        assert row["messages"][-1]["content"].strip() in parts
        if name != "mistral":  # its tools stand before the last question, so earlier answers are not learned
            called = [json.loads(m["content"])["name"] for m in row["messages"] if m["role"] == "function_call"]
            assert all(f'"name": "{function}"' in parts for function in called)
            calls += len(called)
    assert calls > 10 or name == "mistral"
