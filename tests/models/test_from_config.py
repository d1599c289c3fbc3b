"""Models from a configuration alone (`launcher/models/from_config.py`)."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from launcher.errors import ModelError
from launcher.tasks import build_task
from tests.support.jobs import prepared_job, write_splits

_GPT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}
_BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 300,
}  # fmt: skip


def _prepared(tmp_path: Path, task: str, config: dict[str, Any], **params: Any) -> Any:
    data = write_splits(tmp_path / "data", train=60, task=task)
    model = {"name": "", "from_config": config}
    return prepared_job(Path("none"), data, tmp_path, task={"type": task, "max_length": 32, **params}, model=model)


def test_a_tokenizer_is_trained_on_the_texts(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, "causal-lm", _GPT)
    tokenizer = AutoTokenizer.from_pretrained(prepared.job.model.name)
    assert 260 <= len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer("w1 w22 ünseen ✓")["input_ids"]) == "w1 w22 ünseen ✓"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    config = AutoConfig.from_pretrained(prepared.job.model.name)
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    again = _prepared(tmp_path, "causal-lm", _GPT)
    assert again.job == prepared.job


def test_tokenizer_does_not_depend_on_the_directory(tmp_path: Path) -> None:
    first, second = (_prepared(tmp_path / name, "causal-lm", _GPT).job.model.name for name in ("one", "other"))
    assert first != second
    for name in ("tokenizer.json", "config.json"):
        assert (Path(first) / name).read_bytes() == (Path(second) / name).read_bytes()


def test_an_encoder_tokenizer_adds_its_special_tokens(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, "text-classification", _BERT)
    tokenizer = AutoTokenizer.from_pretrained(prepared.job.model.name)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("w1", "w2")["input_ids"])
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    task = build_task(prepared.job)
    weights = [dict(task.build_model().state_dict()) for _ in range(2)]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        _prepared(tmp_path, "causal-lm", {**_GPT, "model_type": "gpt-17"})
    assert caught.value.message.startswith("model.from_config: gpt-17 refuses its settings (")
