"""`launcher init` for conversations and prompts in public formats: the job file it writes passes `check`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import launcher.cli.main as cli
from launcher.driver.prepare import open_splits
from launcher.models.conversation import read_tools, read_turns
from launcher.spec.loader import load_job
from launcher.tasks import params_class
from tests.support.tiny_models import byte_letters, byte_tokenizer

ROWS = 40
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"town": "T"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ALPACA = [
    {"instruction": "Name the capital.", "input": c, "output": f"{c}'s."} for c in ("France", "Italy", "", "Spain")
]


def _message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


PARTS = {"messages": [_message("user", _parts("1+1?")), _message("assistant", _parts("2"))]}
CALLING = {
    "messages": [
        _message("user", "Weather?"), _message("assistant", None, tool_calls=[CALL]),
        _message("tool", "sunny", tool_call_id="c"), _message("assistant", "Sunny."),
    ],
    "tools": TOOLS,
}  # fmt: skip
TURNS = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "Be kind."}
JSON_TEXT = {"messages": json.dumps(CALLING["messages"]), "tools": json.dumps(TOOLS)}
MIXED = {"messages": [_message("user", _parts("1+1?")), _message("assistant", "2")]}
HALVES = {"prompt": [_message("user", "1+1?")], "completion": [_message("assistant", "2")]}
CONTEXT = {"question": "Who?", "context": "Anna was here, as all of us know.", "answer": "Anna, of course, and no one."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a GPT-2 that reads bytes, without a chat template."""
    folder = tmp_path_factory.mktemp("model")
    names = [*byte_letters(), "<|endoftext|>"]
    core = byte_tokenizer(names, [])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(names), n_positions=1024, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command in this process and in an empty directory: exit code, and all it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output = capsys.readouterr()
        return int(stopped.value.code or 0), output.out + output.err

    return command


@pytest.mark.parametrize(
    ("rows", "written"),
    [
        pytest.param([PARTS], {"messages": "messages"}, id="r03"),
        pytest.param([CALLING], {"messages": "messages", "tools": "tools"}, id="r04"),
        pytest.param(ALPACA, {"prompt": "instruction", "response": "output", "input": "input"}, id="r16"),
        pytest.param([CONTEXT], {"prompt": "question", "response": "answer", "input": "context"}, id="context"),
        pytest.param([TURNS], {"messages": "conversations", "system": "system"}, id="q50"),
        pytest.param([PARTS, MIXED], {"messages": "messages"}, id="text and parts"),
        pytest.param([HALVES], {"prompt": "prompt", "response": "completion"}, id="halves"),
        pytest.param([JSON_TEXT], {"messages": "messages", "tools": "tools"}, id="q54"),
    ],
)
def test_the_job_file_names_the_columns_and_passes_check(
    rows: list[dict[str, Any]], written: dict[str, str], model: Path, launch: Callable[..., tuple[int, str]]
) -> None:
    lines = [json.dumps(rows[i % len(rows)]) for i in range(ROWS)]
    Path("train.jsonl").write_text("\n".join(lines) + "\n")
    Path("validation.jsonl").write_text("\n".join(lines[:3]) + "\n")
    task = ("--task", "causal-lm", "--validation", "validation.jsonl")
    code, output = launch("init", "train.jsonl", "--model", str(model), "--yes", *task)
    assert code == 0, output
    assert "is not read" not in output
    job = load_job("job.yaml", (), params_class)
    columns = {key: value for key, value in job.task.parameters().items() if key not in ("max_length", "chat_template")}
    assert columns == written
    code, output = launch(
        "check", "job.yaml", "task.max_length=1024"
    )  # bytes are more than the tokens of a usual model
    assert code == 0, output
    assert "3 of 3 validation rows are also in train" in output


def test_check_names_the_file_that_lacks_a_column_of_the_training_data(
    model: Path, launch: Callable[..., tuple[int, str]]
) -> None:
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    less = [{key: value for key, value in row.items() if key != "input"} for row in ALPACA]
    Path("validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in less))
    task = "task: {type: causal-lm, prompt: instruction, response: output, chat_template: chatml}"
    data = "data: {train: train.jsonl, validation: validation.jsonl}"
    Path("job.yaml").write_text(f"name: a\n{task}\nmodel: {{name: {model}}}\n{data}\ntrain: {{batch_size: 2}}\n")
    code, output = launch("check", "job.yaml")
    assert code == 2 and "validation.jsonl: has no column 'input', which the task reads" in output, output


def test_tools_without_parameters_can_be_converted(model: Path, launch: Callable[..., tuple[int, str]]) -> None:
    Path("train.jsonl").write_text((json.dumps(CALLING) + "\n") * 4)
    task = "task: {type: causal-lm, messages: messages, chat_template: chatml}"
    Path("job.yaml").write_text(f"name: a\n{task}\nmodel: {{name: {model}}}\ndata: {{train: train.jsonl}}\n")
    split = open_splits(load_job("job.yaml", (), params_class))["train"]
    rows = split.read(np.arange(4), ["tools"]).column(0).to_pylist()
    assert [read_tools(cell, "tools") for cell in rows] == [TOOLS] * 4


def test_dates_in_json_are_the_text_of_the_file(model: Path, launch: Callable[..., tuple[int, str]]) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"day": "2024-05-01"}}}
    messages = [_message("user", "2024-05-02"), _message("assistant", None, tool_calls=[call])]
    Path("train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    task = "task: {type: causal-lm, messages: messages, chat_template: chatml}"
    Path("job.yaml").write_text(f"name: a\n{task}\nmodel: {{name: {model}}}\ndata: {{train: train.jsonl}}\n")
    split = open_splits(load_job("job.yaml", (), params_class))["train"]
    user, assistant = read_turns(split.read(np.arange(1), ["messages"]).column(0).to_pylist()[0], "messages")
    assert user.message["content"] == "2024-05-02"
    assert assistant.message["tool_calls"] == [call]
