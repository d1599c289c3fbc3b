"""Weights with names other than the model's: no model may train from random values."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from launcher.errors import ModelError
from launcher.models.pretrained import load_config, load_model, without_weights
from launcher.models.weights import check_weights
from launcher.spec.model import ModelSpec

_CLASSES = "AutoModelForSequenceClassification"
Weights = dict[str, Any]


def _as_pickle(folder: Path, weights: Any) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def _as_old_pickle(folder: Path, weights: Any) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _as_safetensors(folder: Path, weights: Any) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _as_pickles(folder: Path, weights: Any) -> None:
    _as_parts(folder, weights, "pytorch_model", ".bin", torch.save)


def _as_several_safetensors(folder: Path, weights: Any) -> None:
    _as_parts(folder, weights, "model", ".safetensors", lambda part, path: save_file(part, path, {"format": "pt"}))


def _as_parts(folder: Path, weights: Any, stem: str, ending: str, save: Callable[[Any, Path], object]) -> None:
    names = sorted(weights)
    parts = {f"{stem}-0000{i + 1}-of-00002{ending}": names[i::2] for i in range(2)}
    for file, some in parts.items():
        save({name: weights[name] for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))


_FORMATS = (_as_pickle, _as_old_pickle, _as_safetensors, _as_pickles, _as_several_safetensors)


def _model(bert: Path, folder: Path, write: Callable[[Path, Any], None], weights: Any = None) -> ModelSpec:
    """Copy a model with other weights."""
    shutil.copytree(bert, folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder, whole if weights is None else weights(whole))
    return ModelSpec(name=str(folder), allow_pickle=True)


def _check(spec: ModelSpec, auto: str = _CLASSES) -> None:
    check_weights(spec, without_weights(auto, spec, load_config(spec)))


def _load(spec: ModelSpec, auto: str = _CLASSES) -> torch.nn.Module:
    return load_model(auto, spec, load_config(spec), 0)


@pytest.mark.parametrize("write", _FORMATS)
def test_weights_are_loaded_from_every_format(tiny_bert: Path, tmp_path: Path, write: Any) -> None:
    spec = _model(tiny_bert, tmp_path / "model", write)
    _check(spec)
    loaded = _load(spec).state_dict()
    for name, tensor in load_file(tiny_bert / "model.safetensors").items():
        assert torch.equal(loaded[f"bert.{name}"], tensor), name


@pytest.mark.parametrize("write", _FORMATS)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.bert.", "_forward_module."])
def test_names_of_a_wrapped_model_are_refused(tiny_bert: Path, tmp_path: Path, write: Any, prefix: str) -> None:
    spec = _model(
        tiny_bert,
        tmp_path / "model",
        write,
        lambda whole: {f"{prefix}{name}": tensor for name, tensor in whole.items()},
    )
    with pytest.raises(ModelError) as caught:
        _check(spec)
    message = str(caught.value)
    assert message.startswith(f"model.name: {prefix}") and message.endswith(
        f" in the weights of {spec.name} has the name of a wrapped model; remove '{prefix.split('.')[0]}.' from "
        "the names, or save the model inside the wrapper"
    )
    with pytest.raises(ModelError, match=r"have nothing for bert.embeddings.word_embeddings.weight and .* more, which"):
        _load(spec)


@pytest.mark.parametrize("write", _FORMATS)
def test_names_of_wrapped_layers_are_refused(tiny_bert: Path, tmp_path: Path, write: Any) -> None:
    """Wrap parts of a model, as FSDP and compiled layers do."""

    def wrapped(whole: Weights) -> Weights:
        return {name.replace("layer.1.", "layer.1._orig_mod."): tensor for name, tensor in whole.items()}

    spec = _model(tiny_bert, tmp_path / "model", write, wrapped)
    with pytest.raises(ModelError, match=r"encoder.layer.1._orig_mod.*remove '_orig_mod\.' from the names"):
        _check(spec)
    with pytest.raises(ModelError, match=r"have nothing for bert.encoder.layer.1.*, which would stay random"):
        _load(spec)


def test_a_missing_tensor_is_refused_after_loading(tiny_bert: Path, tmp_path: Path) -> None:
    def gap(whole: Weights) -> Weights:
        return {name: tensor for name, tensor in whole.items() if name != "encoder.layer.1.output.dense.weight"}

    spec = _model(tiny_bert, tmp_path / "model", _as_safetensors, gap)
    with pytest.raises(ModelError) as caught:
        _load(spec)
    assert str(caught.value) == (
        f"model.name: the weights of {spec.name} have nothing for bert.encoder.layer.1.output.dense.weight, which "
        "would stay random; put the files of one model together"
    )


def test_a_pooler_may_be_new(tiny_bert: Path, tmp_path: Path) -> None:
    """Load weights like those of masked language models, which have no pooler."""
    spec = _model(tiny_bert, tmp_path / "model", _as_safetensors, lambda whole: {
        name: tensor for name, tensor in whole.items() if "pooler" not in name
    })  # fmt: skip
    _check(spec)
    assert torch.equal(
        _load(spec).state_dict()["bert.encoder.layer.1.output.dense.weight"],
        load_file(tiny_bert / "model.safetensors")["encoder.layer.1.output.dense.weight"],
    )


@pytest.mark.parametrize("write", [_as_pickle, _as_old_pickle])
@pytest.mark.parametrize(
    ("content", "holds"),
    [
        (lambda whole: {"state_dict": whole, "epoch": 3}, "holds state_dict, epoch instead of tensors by name; save"),
        (lambda whole: list(whole.values()), "holds a list instead of tensors by name; save"),
        (lambda whole: torch.nn.Linear(2, 2), "is not a whole file of weights"),
    ],
    ids=["a training state", "a list", "a module"],
)
def test_a_pickle_of_other_things_than_weights_is_refused(
    tiny_bert: Path, tmp_path: Path, write: Any, content: Any, holds: str
) -> None:
    spec = _model(tiny_bert, tmp_path / "model", write, content)
    with pytest.raises(ModelError, match=holds):
        _check(spec)


def test_a_language_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """Refuse a new language model head, whose tokens would be random."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    for i, (kind, ties) in enumerate(((LlamaModel, False), (LlamaModel, True), (LlamaForCausalLM, False))):
        config.tie_word_embeddings = ties
        kind(config).save_pretrained(tmp_path / str(i))
    with pytest.raises(ModelError, match=r"have nothing for lm_head.weight, which would stay random"):
        _load(ModelSpec(name=str(tmp_path / "0")), "AutoModelForCausalLM")
    for fine in ("1", "2"):
        _load(ModelSpec(name=str(tmp_path / fine)), "AutoModelForCausalLM")


def test_adapters_next_to_a_model_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    """Refuse what transformers would wrap: it loads the model that the adapters name."""
    spec = _model(tiny_bert, tmp_path / "model", _as_safetensors)
    (tmp_path / "model/adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ModelError, match=r"holds adapters .adapter_config.json. next to a model; merge them into its"):
        _check(spec)
