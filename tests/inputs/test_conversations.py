"""Conversations and prompts in the formats of public files: what is learned of them, and what is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launcher.models.chat import CHATML
from launcher.models.conversation import Turn, read_tools, read_turns, to_display_text
from launcher.spec.model import ModelSpec
from launcher.tasks.causal_lm import CausalLM
from launcher.tasks.conversations import CausalParams
from tests.support.data_files import open_data
from tests.support.jobs import Columns
from tests.support.tiny_models import byte_letters, byte_tokenizer

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# The last answer has a block of thoughts, earlier ones do not (as in Qwen3's).
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Tools in the first user's message, one call alone and without content, answers of tools as JSON (as Llama 3.1's).
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' and loop.first and tools %}<user>"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ m.content }}<eot>{% elif 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single calls') }}{% endif %}"
    '<assistant>{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<eot>'
    "{% elif m.role == 'tool' %}<ipython>{{ m.content | tojson }}<eot>{% else %}<{{ m.role }}>{{ m.content }}<eot>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Arguments are concatenated with strings (as in DeepSeek's).
TEXT_ARGUMENTS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + '(' + c.function.arguments + ')' }}{% endfor %}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Messages of unknown roles are dropped (as in Zephyr's).
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'system', 'assistant') %}<{{ m.role }}>{{ m.content }}<eot>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

TOWN = {"type": "object", "properties": {"town": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": TOWN}}


def _tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    """Make a tokenizer of bytes, and of one token that begins with a space (" y")."""
    core = byte_tokenizer([*byte_letters(), "Ġy", "<|endoftext|>"], [("Ġ", "y")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def _task(folder: Path, template: str | None, table: pa.Table | None = None, **params: Any) -> CausalLM:
    """Build a task as a run does, with parameters inferred from the training data."""
    tokenizer = _tokenizer(template)
    tokenizer.save_pretrained(folder)
    GPT2Config(vocab_size=len(tokenizer)).save_pretrained(folder)
    task = CausalLM(CausalParams.model_validate({"max_length": 2048, **params}), ModelSpec(name=str(folder)), 0)
    return task if table is None else CausalLM(task.infer_params(Columns(table)), task.model, 0)


def _lines(*rows: dict[str, Any]) -> pa.Table:
    """Read rows from JSON Lines: Arrow gives structs the keys of all rows, null where a row has none."""
    return pa.json.read_json(io.BytesIO("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture
def learned(tmp_path: Path) -> Callable[..., list[str]]:
    """Encode rows and return what is learned of each, or why it is refused."""

    def encode(template: str | None, *rows: dict[str, Any], **params: Any) -> list[str]:
        table = _lines(*rows)
        task = _task(tmp_path, template, table, **params)
        encoded = task.encode(table.select(list(task.input_columns + task.target_columns)), True)
        texts = dict(encoded.problems)
        for position, labels in zip(
            encoded.valid_rows.tolist(), encoded.samples.column("labels").to_pylist(), strict=True
        ):
            texts[position] = task.processor().decode([label for label in labels if label != -100])
        return [texts[i] for i in range(len(rows))]

    return encode


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., list[str]]:
    """Encode rows as `predict` does and return what the model is given."""

    def encode(template: str | None, *rows: dict[str, Any], **params: Any) -> list[str]:
        table = _lines(*rows)
        task = _task(tmp_path, template, table, **params)
        encoded = task.encode(table.select(list(task.input_columns)), False)
        assert encoded.problems == ()
        return [task.processor().decode(ids) for ids in encoded.samples.column("input_ids").to_pylist()]

    return encode


def _chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _calling(town: str = "T0", arguments: Any = None, content: str | None = None) -> dict[str, Any]:
    """Make a conversation with a tool call in OpenAI's form, and its tools."""
    call_arguments = json.dumps({"town": town}) if arguments is None else arguments
    call = {"id": "c0", "type": "function", "function": {"name": "weather", "arguments": call_arguments}}
    messages = [
        {"role": "user", "content": f"Weather in {town}?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c0"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    return {"messages": messages, "tools": [TOOL]}


# Content parts


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_text_parts_are_learned_as_text(template: str, learned: Callable[..., list[str]]) -> None:
    row = _chat(("system", _parts("Be kind.")), ("user", _parts("1+1?")), ("assistant", _parts("It is", "2.")))
    (text,) = learned(template, row, messages="messages")
    assert text == ("It is\n2.<|im_end|>\n" if template == CHATML else "It is\n2.<end>")


def test_text_parts_are_prompts(prompts: Callable[..., list[str]]) -> None:
    row = _chat(("user", _parts("1+1?", "Say.")), ("assistant", _parts("2")))
    assert prompts(PLAIN, row, messages="messages") == ["[user]1+1?\nSay.<end>[assistant]"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "refusal"])
def test_a_part_other_than_text_is_a_bad_row(kind: str, learned: Callable[..., list[str]]) -> None:
    bad = _chat(("user", [{"type": "text", "text": "See."}, {"type": kind, kind: "x"}]), ("assistant", _parts("No.")))
    good = _chat(("user", _parts("Hi.")), ("assistant", _parts("Yes.")))
    assert learned(PLAIN, bad, good, messages="messages") == [
        f"messages: message 0 has a part of type '{kind}', and only parts of type 'text' are read", "Yes.<end>",
    ]  # fmt: skip


def test_text_and_parts_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    rows = [_chat(("user", _parts("hi")), ("assistant", "yo")), _chat(("user", "hi"), ("assistant", _parts("yo", "!")))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = open_data(tmp_path / "a.jsonl", cache=tmp_path / "cache", kinds={"messages": "text"})
    cells = split.read(np.arange(2), ["messages"]).column(0).to_pylist()
    contents = [[turn.message["content"] for turn in read_turns(cell, "m")] for cell in cells]
    assert contents == [["hi", "yo"], ["hi", "yo\n!"]]


def test_null_content_is_a_bad_row(learned: Callable[..., list[str]]) -> None:
    row = _chat(("user", "Hi."), ("assistant", None))
    other = _chat(("user", None), ("assistant", "No."))
    uncalled = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]}
    assert learned(PLAIN, row, other, uncalled, messages="messages") == [
        "messages: message 1, of assistant, has no content", "messages: message 0, of user, has no content",
        "messages: message 1, of assistant, has no content",
    ]  # fmt: skip


# Tool calls


def test_chatml_renders_tools_and_calls(learned: Callable[..., list[str]], prompts: Callable[..., list[str]]) -> None:
    (text,) = learned("x", _calling(), messages="messages", chat_template="chatml")
    call = '<tool_call>\n{"name": "weather", "arguments": {"town": "T0"}}\n</tool_call><|im_end|>\n'
    assert text == f"{call}It is sunny.<|im_end|>\n"
    (prompt,) = prompts("x", _calling(), messages="messages", chat_template="chatml")
    assert prompt.startswith("<|im_start|>system\n") and json.dumps(TOOL) in prompt
    assert prompt.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")
    assert call in prompt


def test_chatml_joins_tools_and_system_and_renders_every_call(
    learned: Callable[..., list[str]], prompts: Callable[..., list[str]]
) -> None:
    row = _calling(content="Let me see.")
    row["messages"][1]["tool_calls"] *= 2
    row["messages"].insert(0, {"role": "system", "content": "Be kind."})
    (prompt,) = prompts(CHATML, row, messages="messages")
    assert prompt.startswith("<|im_start|>system\nBe kind.\n\n") and prompt.count("<|im_start|>system") == 1
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>\nFor each call" in prompt
    assert "</tool_call><|im_end|>\n<|im_start|>user\nWeather in T0?" in prompt
    call = '<tool_call>\n{"name": "weather", "arguments": {"town": "T0"}}\n</tool_call>'
    (text,) = learned(CHATML, row, messages="messages")
    assert text == f"Let me see.\n{call}\n{call}<|im_end|>\nIt is sunny.<|im_end|>\n"


@pytest.mark.parametrize(
    "arguments", ['{"town": "T0"}', {"town": "T0"}], ids=["arguments as JSON text", "arguments as an object"]
)
def test_arguments_reach_the_template_as_objects(arguments: Any, learned: Callable[..., list[str]]) -> None:
    (text,) = learned(LLAMA, _calling(arguments=arguments), messages="messages")
    assert text == '{"name": "weather", "parameters": {"town": "T0"}}<eot>It is sunny.<eot>'


def test_a_template_that_takes_arguments_as_text_gets_text(learned: Callable[..., list[str]]) -> None:
    (text,) = learned(TEXT_ARGUMENTS, _calling(), messages="messages", tools="")
    assert text == 'weather({"town": "T0"})<eot>It is sunny.<eot>'


def test_nulls_of_arrow_reach_no_template(learned: Callable[..., list[str]]) -> None:
    other = _calling(arguments={"zone": "Z"})
    other["tools"] = [{"type": "function", "function": {"name": "clock", "strict": True, "parameters": {"z": 1}}}]
    texts = learned(LLAMA, _calling(arguments={"town": "T0"}), other, messages="messages")
    assert [json.loads(text.split("<eot>")[0])["parameters"] for text in texts] == [{"town": "T0"}, {"zone": "Z"}]


def test_tools_reach_the_prompt_of_predict_without_nulls(prompts: Callable[..., list[str]]) -> None:
    other = {**_calling(), "tools": [{"type": "function", "function": {"name": "clock", "strict": True}}]}
    first, second = prompts(LLAMA, _calling(), other, messages="messages")
    assert json.dumps(TOOL) in first and "null" not in first
    assert '{"type": "function", "function": {"name": "clock", "strict": true}}' in second


@pytest.mark.parametrize(
    "tools",
    [
        json.dumps([TOOL]), json.dumps([TOOL["function"]]), [json.dumps(TOOL)], [TOOL["function"]],
        [{"type": "function", **TOOL["function"]}],
    ],
    ids=["JSON text", "JSON text of functions", "list of JSON texts", "functions", "functions with their type"],
)  # fmt: skip
def test_tools_are_read_in_each_form(tools: Any, prompts: Callable[..., list[str]]) -> None:
    (prompt,) = prompts(LLAMA, {**_calling(), "tools": tools}, messages="messages")
    assert f"<user>{json.dumps(TOOL)}Weather" in prompt


@pytest.mark.parametrize("tools", [None, "", "[]", []], ids=repr)
def test_rows_without_tools_are_learned(tools: Any, learned: Callable[..., list[str]]) -> None:
    rows = [{**_chat(("user", "Hi."), ("assistant", "Yes.")), "tools": t} for t in (tools, tools)]
    table = pa.Table.from_pylist(rows)
    if table.schema.field("tools").type == pa.null() or pa.types.is_list(table.schema.field("tools").type):
        rows[1]["tools"] = [TOOL]  # gives the column a type
    assert learned(CHATML, *rows, messages="messages")[0] == "Yes.<|im_end|>\n"


def test_a_row_of_which_the_template_drops_a_part_is_bad(learned: Callable[..., list[str]]) -> None:
    no_tools = 'tools: the chat template writes no tools; set task.chat_template to one that does, or task.tools: "" '
    assert learned(PLAIN, _calling(), messages="messages") == [f"{no_tools}to leave them out"]
    no_calls = "messages: the chat template does not write the tool calls of message 1, of assistant; set "
    assert learned(PLAIN, _calling(), messages="messages", tools="") == [
        f"{no_calls}task.chat_template to one that does"
    ]
    no_content = "messages: the chat template does not write the content of message 1, of assistant; set "
    assert learned(LLAMA, _calling(content="Let me see."), messages="messages") == [
        f"{no_content}task.chat_template to one that does"
    ]
    row = _chat(("user", "Hi."), ("tool", "sunny"), ("assistant", "Yes."))
    no_role = "messages: the chat template does not write the content of message 1, of tool; set "
    assert learned(KNOWN_ROLES, row, messages="messages") == [f"{no_role}task.chat_template to one that does"]


def test_predict_refuses_a_row_of_which_the_template_drops_a_part(tmp_path: Path) -> None:
    rows = _lines(_calling())
    encoded = _task(tmp_path, PLAIN, rows, messages="messages").encode(rows, False)
    assert [why[:38] for _, why in encoded.problems] == ["tools: the chat template writes no too"]


def test_content_that_a_template_escapes_is_accepted(learned: Callable[..., list[str]]) -> None:
    row = _chat(("user", "Hi."), ("tool", 'a "quoted"\nline'), ("assistant", "Yes."))
    assert learned(LLAMA, row, messages="messages") == ["Yes.<eot>"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{town", "messages: message 1 calls weather with '{town', not a JSON object"),
        ('"{}"', "messages: message 1 calls weather with '\"{}\"', not a JSON object"),
    ],
)
def test_arguments_other_than_an_object_are_a_bad_row(
    arguments: str, reason: str, learned: Callable[..., list[str]]
) -> None:
    assert learned(LLAMA, _calling(arguments=arguments), messages="messages") == [reason]


def test_legacy_function_calls_are_tool_calls(learned: Callable[..., list[str]]) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"town": "T"}'}},
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ]
    }
    (text,) = learned(LLAMA, row, messages="messages")
    assert text == '{"name": "weather", "parameters": {"town": "T"}}<eot>Sunny.<eot>'


def test_invalid_tools_are_a_bad_row_with_a_remedy(learned: Callable[..., list[str]]) -> None:
    row = {**_chat(("user", "Hi."), ("assistant", "Yes.")), "tools": ["search"]}
    assert learned(CHATML, row, messages="messages") == [
        "tools is ['search'], which is not a list of tools (task.tools: \"\" reads none)"
    ]
    assert learned(CHATML, row, messages="messages", tools="") == ["Yes.<|im_end|>\n"]


def test_an_answer_of_weight_0_is_not_learned(learned: Callable[..., list[str]]) -> None:
    row = _chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row["messages"][1]["weight"] = 0
    none = {"messages": [*row["messages"][:2]]}
    assert learned(PLAIN, row, none, messages="messages") == ["d<end>", "messages: all its answers have the weight 0"]


# Columns read with prompts: Alpaca's input, system messages


def test_the_input_is_added_to_the_instruction(
    learned: Callable[..., list[str]], prompts: Callable[..., list[str]], tmp_path: Path
) -> None:
    rows = [{"instruction": "Name the capital.", "input": c, "output": o} for c, o in (("France", "Paris"), ("", "?"))]
    names = {"prompt": "instruction", "response": "output"}
    assert prompts(PLAIN, *rows, **names) == [
        "[user]Name the capital.\nFrance<end>[assistant]", "[user]Name the capital.<end>[assistant]",
    ]  # fmt: skip
    assert learned(PLAIN, *rows, **names) == ["Paris<end>", "?<end>"]
    assert _task(tmp_path, PLAIN, _lines(*rows), **names).params.input == "input"


def test_an_answer_may_be_the_rest_of_a_conversation(
    learned: Callable[..., list[str]], prompts: Callable[..., list[str]]
) -> None:
    prompt = _chat(("user", "1?"), ("assistant", "One."), ("user", "2?"))["messages"]
    names = {"prompt": "prompt", "response": "completion"}
    row = {"prompt": prompt, "completion": _chat(("assistant", "Two."))["messages"]}
    assert learned(PLAIN, row, **names) == ["Two.<end>"]
    assert learned(PLAIN, {"prompt": prompt, "completion": "Two."}, **names) == ["Two.<end>"]
    expected = "[user]1?<end>[assistant]One.<end>[user]2?<end>[assistant]"
    assert prompts(PLAIN, row, **names) == [expected]


def test_a_null_input_adds_nothing(prompts: Callable[..., list[str]]) -> None:
    rows = [{"instruction": "Go.", "input": None, "output": "a"}, {"instruction": "Go.", "input": "b", "output": "a"}]
    names = {"prompt": "instruction", "response": "output"}
    assert prompts(PLAIN, *rows, **names)[0] == "[user]Go.<end>[assistant]"
    assert prompts(PLAIN, *rows, **names, input="")[1] == "[user]Go.<end>[assistant]"


def test_an_input_column_that_is_the_prompt_is_read_once(prompts: Callable[..., list[str]]) -> None:
    row = {"input": "Go.", "output": "a", "system": "Be kind."}
    expected = "[system]Be kind.<end>[user]Go.<end>[assistant]"
    assert prompts(PLAIN, row, prompt="input", response="output") == [expected]


def test_unread_columns_are_noted(tmp_path: Path) -> None:
    row = {"question": "Who?", "context": "Anna.", "history": "b", "id": "c", "response": "a"}
    task = _task(tmp_path, PLAIN, _lines(row), prompt="question")
    assert task.remarks(_lines(row), list(row)[1:4]) == (
        "question: 19 % of the tokens are learned, those of the answers",
        "column context is not read; task.input: context reads it",
        "column history is not read; put it into the prompts or conversations if it matters",
    )
    assert len(_task(tmp_path, PLAIN, prompt="question", input="context").remarks(_lines(row), ["id"])) == 1
    assert _task(tmp_path, PLAIN, messages="question").params.unread(["context", "functions"]) == (
        "column functions is not read; task.tools: functions reads it",
    )


def test_a_system_column_becomes_the_first_message(learned: Callable[..., list[str]], tmp_path: Path) -> None:
    rows = [{**_chat(("user", "Hi."), ("assistant", "Yes.")), "system": s} for s in ("Be kind.", "", None)]
    task = _task(tmp_path, PLAIN, _lines(*rows), messages="messages")
    texts = task.processor().batch_decode(task.encode(_lines(*rows), True).samples.column("input_ids").to_pylist())
    without = "[user]Hi.<end>[assistant]Yes.<end>"
    assert texts == [f"[system]Be kind.<end>{without}", without, without]
    twice = {**_chat(("system", "Be short."), ("user", "Hi."), ("assistant", "Yes.")), "system": "Be kind."}
    assert learned(PLAIN, twice, messages="messages") == [
        'messages begins with a system message, and system is another; keep one, or set task.system: ""'
    ]


# Templates of reasoning models


def test_answers_that_the_template_rewrites_are_not_learned(learned: Callable[..., list[str]]) -> None:
    row = _chat(("user", "0?"), ("assistant", "Yes."), ("user", "Sure?"), ("assistant", "Quite."))
    assert learned(THINKING, row, messages="messages") == ["<think></think>Quite.<|end|>"]
    single = _chat(("user", "0?"), ("assistant", "Yes."))
    assert learned(THINKING, single, messages="messages") == ["<think></think>Yes.<|end|>"]


def test_calls_and_the_answer_after_them_are_learned(learned: Callable[..., list[str]]) -> None:
    row = _chat(("user", "0?"), ("assistant", "Yes."), ("tool", "ok"), ("assistant", "Quite."))
    assert learned(THINKING, row, messages="messages") == ["<think></think>Yes.<|end|><think></think>Quite.<|end|>"]


def test_a_template_that_opens_answers_otherwise_is_refused(learned: Callable[..., list[str]]) -> None:
    template = PLAIN.replace("[assistant]{%", "[assistant]<think>{%")
    row = _chat(("user", "0?"), ("assistant", "Yes."))
    assert learned(template, row, messages="messages") == [
        "messages: the chat template begins an answer differently from message 1, of assistant; write it alike, or set "
        "task.chat_template"
    ]


# ShareGPT and other forms


@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant"), ("Human", "GPT"), ("user", "model")])
def test_sharegpt_is_read(names: tuple[str, str], learned: Callable[..., list[str]]) -> None:
    turns = [("system", "Be kind."), (names[0], "hi"), (names[1], "hello")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    assert learned(PLAIN, row, messages="conversations") == ["hello<end>"]
    assert learned(PLAIN, row, messages="conversations", answer_roles=[names[1]]) == ["hello<end>"]
    assert learned(PLAIN, _chat((names[0].lower(), "hi"), (names[1].lower(), "yes")), messages="messages") == [
        "yes<end>"
    ]


def test_function_calls_of_sharegpt_are_read(
    learned: Callable[..., list[str]], prompts: Callable[..., list[str]]
) -> None:
    turns = [
        ("human", "Weather?"), ("function_call", '{"name": "weather", "arguments": {"town": "T"}}'),
        ("observation", "sunny"), ("gpt", "Sunny."),
    ]  # fmt: skip
    row = {
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "tools": json.dumps([TOOL["function"]]),
    }
    (text,) = learned(LLAMA, row, messages="conversations")
    assert text == '{"name": "weather", "parameters": {"town": "T"}}<eot>Sunny.<eot>'
    (prompt,) = prompts(LLAMA, row, messages="conversations")
    assert prompt.endswith('<ipython>"sunny"<eot><assistant>')
    named = {"messages": [{"role": speaker, "content": value} for speaker, value in turns]}
    assert learned(LLAMA, named, messages="messages") == [text]


def test_a_function_call_without_json_is_a_bad_row(learned: Callable[..., list[str]]) -> None:
    row = _chat(("user", "Weather?"), ("function_call", "weather(T)"))
    assert learned(LLAMA, row, messages="messages") == [
        "messages: message 1 has a tool call 'weather(T)', which is not a {name, arguments}"
    ]


def test_answers_that_are_not_learned_are_noted(tmp_path: Path) -> None:
    rows = [_chat(("user", "hi"), ("assistant", "")), _chat(("user", "hi"), ("assistant", "yo"))]
    task = _task(tmp_path, PLAIN, messages="messages")
    assert task.remarks(_lines(*rows))[1:] == (
        "messages: 50 % of the answers are empty (1 of the 2 looked at), so only their end is learned; fill them, or "
        "remove such rows",
    )
    row = _chat(("user", "0?"), ("assistant", "Yes."), ("user", "Sure?"), ("assistant", "Quite."))
    task = _task(tmp_path, THINKING, messages="messages")
    assert task.remarks(_lines(row, row))[1:] == (
        "messages: 50 % of the answers are not learned (2 of the 4 looked at), as the chat template writes them "
        "differently once other messages follow; split conversations after each answer, or set task.chat_template "
        "(chatml writes them alike)",
    )


@pytest.mark.parametrize("roles", [("User", "Assistant"), ("system",)])
def test_a_conversation_without_answers_names_its_roles(
    roles: tuple[str, ...], learned: Callable[..., list[str]]
) -> None:
    assert learned(PLAIN, _chat(*((role, "hi") for role in roles)), messages="messages") == [
        f"messages has no message of assistant (task.answer_roles), only of {', '.join(sorted(roles))}"
    ]


def test_two_messages_of_one_role_are_both_read(prompts: Callable[..., list[str]]) -> None:
    row = _chat(("user", "hi"), ("user", "you"), ("assistant", "hello"))
    assert prompts(PLAIN, row, messages="messages") == ["[user]hi<end>[user]you<end>[assistant]"]


def test_conversations_as_json_text_are_read(learned: Callable[..., list[str]]) -> None:
    calling = _calling()
    row = {"messages": json.dumps(calling["messages"]), "tools": json.dumps(calling["tools"])}
    expected = '{"name": "weather", "parameters": {"town": "T0"}}<eot>It is sunny.<eot>'
    other = {"messages": "hello", "tools": ""}
    assert learned(LLAMA, row, other, messages="messages") == [
        expected, "messages is 'hello', which is not a list of messages",
    ]  # fmt: skip


def test_numbers_become_text(learned: Callable[..., list[str]]) -> None:
    row = {"messages": json.dumps([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": 4}])}
    assert learned(PLAIN, row, messages="messages") == ["4<end>"]


# Tokens, display and properties


def test_an_answer_that_shares_its_first_token_with_a_space_is_learned_whole(learned: Callable[..., list[str]]) -> None:
    template = PLAIN.replace("[{{ m['role'] }}]", "{{ m['role'] }}: ").replace("[assistant]", "assistant: ")
    assert learned(template, _chat(("user", "q"), ("assistant", "yes")), messages="messages") == [" yes<end>"]


_CALLS = 'user: Weather in T0?\nassistant: weather({"town": "T0"})\ntool: sunny\nassistant: It is sunny.'


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (_calling()["messages"], _CALLS), (json.dumps(_calling()["messages"]), _CALLS),
        ([{"from": "human", "value": "hi"}], "user: hi"), (_chat(("user", _parts("a")))["messages"], "user: a"),
        ([TOOL], json.dumps([TOOL])), ([{"role": "user"}], '[{"role": "user"}]'), ([], "[]"), (None, "None"),
        ("a text", "a text"), ("[1]", "[1]"),
    ],
    ids=range(10),
)  # fmt: skip
def test_any_cell_can_be_displayed(cell: object, text: str) -> None:
    assert to_display_text(cell) == text


def test_rows_of_several_files_keep_their_own_tools(tmp_path: Path) -> None:
    """Read files whose tools and arguments have different keys but one Arrow type."""
    places = [("town", "T"), ("zone", 1)]
    for name, value in places:
        tools = [{"name": "f", "parameters": {"properties": {name: {"type": type(value).__name__}}}}]
        row = {**_calling(arguments={name: value}), "tools": tools}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    split = open_data(tmp_path / "*.jsonl", cache=tmp_path / "cache")
    rows = split.read(np.arange(2), ["messages", "tools"]).to_pylist()
    calls = [read_turns(row["messages"], "m")[1].message["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert calls == [dict([place]) for place in places]
    tools = [read_tools(row["tools"], "t") or [{}] for row in rows]
    assert [list(tool["function"]["parameters"]["properties"]) for (tool,) in tools] == [["town"], ["zone"]]


def test_messages_keep_other_keys_for_templates() -> None:
    (turn,) = read_turns([{"role": "assistant", "content": "a", "reasoning_content": "b", "name": None}], "m")
    assert turn.message == {"role": "assistant", "content": "a", "reasoning_content": "b"}


_KEYS = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "function_call",
        "function",
        "name",
        "arguments",
        "type",
        "text",
        "weight",
    ]
)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 1)
    | st.sampled_from(["", "assistant", "function_call", "text", "{}", "[1]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_any_cell_is_read_or_refused(cell: object) -> None:
    for read in (read_turns, read_tools):
        for form in (cell, json.dumps(cell)):
            try:
                result = read(form, "c")
            except ValueError as problem:
                assert str(problem).startswith("c")
            else:
                assert result is None or all(isinstance(item, Turn | dict) for item in result)
    assert isinstance(to_display_text(cell), str)
