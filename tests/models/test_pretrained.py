"""Tokens that a job adds: in tokenizers, and as rows of the embeddings (`model.add_tokens`)."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher.driver.prepare import prepare
from launcher.errors import ModelError
from launcher.models.chat import load_chat_tokenizer
from launcher.models.pretrained import load_config, load_model, load_tokenizer, new_token_ids
from launcher.spec.model import ModelSpec
from tests.support.jobs import make_job, write_splits

_TOKENS = ("w5", "<b>", "<a>", "<b>")
_CLASSES, _CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


def _load(folder: Path, auto: str, seed: int = 0, **keys: Any) -> Any:
    spec = ModelSpec(name=str(folder), add_tokens=_TOKENS, **keys)
    return load_model(auto, spec, load_config(spec), seed)


def test_new_tokens_follow_the_others_in_the_order_of_the_job(tiny_models: dict[str, Path]) -> None:
    spec = ModelSpec(name=str(tiny_models["causal-lm"]), add_tokens=_TOKENS)
    own = load_tokenizer(spec.model_copy(update={"add_tokens": ()}))
    for tokenizer in (load_tokenizer(spec), load_chat_tokenizer(spec, None, required=True)):
        assert len(tokenizer) == len(own) + 2
        assert tokenizer("w1 <a> w2 <b>")["input_ids"] == [*own("w1")["input_ids"], 207, *own("w2")["input_ids"], 206]
        # `w5` is a token already: it is not found inside others.
        assert tokenizer("w5 w55")["input_ids"] == own("w5 w55")["input_ids"]
    assert new_token_ids(spec) == [206, 207]


@pytest.mark.parametrize(("auto", "task"), [(_CLASSES, "text-classification"), (_CAUSAL, "causal-lm")])
def test_new_rows_are_a_function_of_the_seed(auto: str, task: str, tiny_models: dict[str, Path]) -> None:
    torch.manual_seed(1)
    first = _load(tiny_models[task], auto).get_input_embeddings().weight
    torch.manual_seed(2)
    second = _load(tiny_models[task], auto).get_input_embeddings().weight
    assert torch.equal(first, second)
    old = getattr(transformers, auto).from_pretrained(tiny_models[task]).get_input_embeddings().weight
    assert torch.equal(first[: len(old)], old) and len(first) == len(old) + 2
    # Around the mean of the others, unlike a draw of the initializer.
    assert torch.allclose(first[len(old) :], old.mean(0), atol=1e-3)
    other = _load(tiny_models[task], auto, seed=3).get_input_embeddings().weight
    assert not torch.equal(first[len(old) :], other[len(old) :])


def test_output_layer_grows_with_tied_embeddings(tiny_models: dict[str, Path]) -> None:
    model = _load(tiny_models["causal-lm"], _CAUSAL)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == 208


def test_spare_rows_are_used_first(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "padded"
    shutil.copytree(tiny_models["causal-lm"], folder)
    padded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    padded.resize_token_embeddings(224)
    padded.save_pretrained(folder)
    model = _load(folder, _CAUSAL)
    assert model.get_input_embeddings().num_embeddings == 224
    assert torch.equal(model.get_input_embeddings().weight, padded.get_input_embeddings().weight)


def test_an_exported_model_has_its_tokens_already() -> None:
    spec = ModelSpec(name="m", add_tokens=_TOKENS, quantization="nf4", lora={"rank": 4})  # type: ignore[arg-type]
    exported = spec.exported("elsewhere")
    assert exported == ModelSpec(name="elsewhere")


def test_plan_counts_new_rows(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=22)
    without, with_tokens = (
        prepare(make_job(tiny_bert, data, tmp_path, model=model), measure=True).plan
        for model in ({}, {"add_tokens": _TOKENS})
    )
    assert with_tokens.parameters - without.parameters == 2 * 32
    assert with_tokens.memory is not None and without.memory is not None
    assert with_tokens.memory.weights - without.memory.weights == 2 * 32 * 4


@pytest.mark.parametrize(
    ("task", "model", "problem"),
    [
        ("image-classification", {}, "model.add_tokens: a vit model has no embeddings of tokens; drop add_tokens"),
        ("text-classification", {"freeze": {"embeddings": True}},
         "model.freeze: freezes the embeddings, and those of model.add_tokens must be trained; freeze less, or use "
         "model.lora, which trains the new rows alone"),
        ("text-classification", {"freeze": {"names": ["*.word_embeddings.*"]}}, "model.freeze: freezes the embeddings"),
    ],
)  # fmt: skip
def test_tokens_that_would_not_be_trained_are_refused(
    task: str, model: dict[str, Any], problem: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    data = write_splits(tmp_path / "data", train=22, task=task)
    job = make_job(tiny_models[task], data, tmp_path, task={"type": task}, model={"add_tokens": _TOKENS, **model})
    with pytest.raises(ModelError) as caught:
        prepare(job)
    assert caught.value.message.startswith(problem)
