"""Adapters on every kind of model: which layers get one, which are trained in full, and that merging them is exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from launcher.errors import ModelError
from launcher.models.adapters import add_adapters, find_targets, merge_adapters, save_adapters
from launcher.models.pretrained import load_config, load_model
from launcher.spec.model import LoraSpec, ModelSpec
from tests.support.tiny_models import make_tiny_bert, make_tiny_gpt, make_tiny_resnet, make_tiny_vit

_LORA = {"rank": 4}
_DORA = {"rank": 4, "dora": True, "rank_stabilized": True}
_TOKENS = ("w5", "<a>", "<b>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    gpt = make_tiny_gpt(root / "gpt")
    folders = {"gpt": gpt, "bert": make_tiny_bert(root / "bert"), "resnet": make_tiny_resnet(root / "resnet")}
    folders |= {"vit": make_tiny_vit(root / "vit"), "bart": root / "bart"}
    PreTrainedTokenizerFast.from_pretrained(gpt).save_pretrained(root / "bart")
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=206, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(root / "bart")
    return folders


def _adapted(auto: str, spec: ModelSpec) -> PeftModel:
    """Return a model with adapters, all of whose trained weights differ from their initial values."""
    model = add_adapters(load_model(auto, spec, load_config(spec), 0), auto, spec, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def _state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the weights as the engine gathers them."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: weight.detach().clone() for name, weight in model.named_parameters()} | buffers


def _inputs(auto: str, spec: ModelSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if "resnet" in spec.name or "vit" in spec.name:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(6, 200, (2, 9), generator=generator)
    if spec.add_tokens:
        ids[0, 3], ids[1, 5] = 206 - 2 * ("bert" in spec.name), 207 - 2 * ("bert" in spec.name)
    return {"input_ids": ids, "decoder_input_ids": ids} if "Seq2Seq" in auto else {"input_ids": ids}


@torch.no_grad()
def _outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model(**inputs).to_tuple() if isinstance(value, torch.Tensor)])


# Auto class, model, peft's class, layers that are trained in full.
_KINDS: tuple[tuple[str, str, str, set[str]], ...] = (
    ("AutoModelForSequenceClassification", "bert", "PeftModelForSequenceClassification", {"classifier"}),
    ("AutoModelForTokenClassification", "gpt", "PeftModelForTokenClassification", {"classifier"}),
    ("AutoModelForQuestionAnswering", "bert", "PeftModelForQuestionAnswering", {"qa_outputs"}),
    ("AutoModelForCausalLM", "gpt", "PeftModelForCausalLM", set()),
    ("AutoModelForSeq2SeqLM", "bart", "PeftModelForSeq2SeqLM", set()),
    # The decoder shares the weights of the embeddings, which are pretrained.
    ("AutoModelForMaskedLM", "bert", "PeftModel", {"cls.predictions.transform"}),
    ("AutoModel", "bert", "PeftModelForFeatureExtraction", set()),
    ("AutoModelForImageClassification", "vit", "PeftModel", {"classifier"}),
    ("AutoModelForImageClassification", "resnet", "PeftModel", {"classifier"}),
)
_VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora": _LORA},
    "dora": {"lora": _DORA},
    "tokens": {"lora": _LORA, "add_tokens": _TOKENS},
}


# DoRA has no convolutions, new tokens need token ids, and peft cannot train them under an output layer with a bias.
_CASES = [
    (kind, variant)
    for kind in _KINDS
    for variant in _VARIANTS
    if not (kind[1] == "resnet" and variant == "dora")
    and not (variant == "tokens" and (kind[1] in ("resnet", "vit") or "Masked" in kind[0]))
]


@pytest.mark.parametrize(("kind", "variant"), _CASES, ids=[f"{kind[0]}-{kind[1]}-{v}" for kind, v in _CASES])
def test_merged_and_saved_adapters_match_the_adapted_model(
    kind: tuple[str, str, str, set[str]], variant: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    auto, name, peft_class, in_full = kind
    sections = _VARIANTS[variant]
    if name == "resnet":
        # Of a ResNet only convolutions are left.
        sections = {"lora": {**_LORA, "target_modules": ["convolution"]}}
    spec = ModelSpec(name=str(folders[name]), dropout=0.0, **sections)
    model = _adapted(auto, spec)
    config = model.peft_config["default"]
    assert type(model).__name__ == peft_class
    assert set(config.modules_to_save or ()) - {"score"} == in_full
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name}
    layers = {name.removeprefix("base_model.model.").split(".modules_to_save.")[0] for name in trained}
    assert {layer for layer in layers if "token_adapter" not in layer} == in_full
    inputs, state = _inputs(auto, spec), _state(model)
    expected = _outputs(model, inputs)
    save_adapters(model, state, tmp_path / "adapter")
    base, plain = merge_adapters(model, state)
    base.save_pretrained(tmp_path / "model", state_dict=plain)  # type: ignore[operator]  # a transformers model
    auto_class = getattr(transformers, auto)
    merged, info = auto_class.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(_outputs(merged.eval(), inputs), expected, atol=1e-5)
    untrained = auto_class.from_pretrained(folders[name])
    if variant == "tokens":
        untrained.resize_token_embeddings(merged.get_input_embeddings().num_embeddings, mean_resizing=False)
    adapted = PeftModel.from_pretrained(untrained, tmp_path / "adapter").eval()
    assert torch.allclose(_outputs(adapted, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"])
def test_a_pretrained_head_gets_an_adapter_and_a_new_one_is_trained_in_full(
    auto: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    getattr(transformers, auto).from_pretrained(folders["bert"]).save_pretrained(tmp_path / "whole")
    head = {"AutoModelForSequenceClassification": "classifier", "AutoModelForQuestionAnswering": "qa_outputs"}[auto]
    for folder, is_new in ((folders["bert"], True), (tmp_path / "whole", False)):
        spec = ModelSpec(name=str(folder), dropout=0.0, lora=LoraSpec(rank=4))
        model = _adapted(auto, spec)
        names = [name for name, weight in model.named_parameters() if weight.requires_grad and head in name]
        parts = {"modules_to_save" if "modules_to_save" in name else "lora" for name in names}
        assert parts == {"modules_to_save" if is_new else "lora"}
        save_adapters(model, _state(model), tmp_path / f"adapter-{is_new}")
        loaded = PeftModel.from_pretrained(
            getattr(transformers, auto).from_pretrained(folder), tmp_path / f"adapter-{is_new}"
        )
        inputs = _inputs(auto, spec)
        assert torch.allclose(_outputs(loaded.eval(), inputs), _outputs(model, inputs), atol=1e-5)


def test_a_pooler_that_the_weights_lack_is_trained_in_full(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers.AutoModelForMaskedLM.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path), lora=LoraSpec(rank=4))
    config = _adapted("AutoModelForSequenceClassification", spec).peft_config["default"]
    assert set(config.modules_to_save) - {"score"} == {"bert.pooler", "classifier"}
    assert not [name for name in config.target_modules if "pooler" in name]


@pytest.mark.parametrize(("name", "dora"), [("gpt", True), ("bert", True), ("bert", False), ("resnet", False)])
def test_merging_equals_the_merging_of_peft(name: str, dora: bool, folders: dict[str, Path]) -> None:
    auto = "AutoModelForImageClassification" if name == "resnet" else "AutoModelForSequenceClassification"
    targets = ["convolution"] if name == "resnet" else None
    spec = ModelSpec(name=str(folders[name]), lora=LoraSpec(rank=4, dora=dora, target_modules=targets, alpha=3.0))
    model = _adapted(auto, spec)
    _, plain = merge_adapters(model, _state(model))
    expected = model.merge_and_unload().state_dict()
    assert plain.keys() == expected.keys()
    for weight, value in plain.items():
        assert torch.allclose(value, expected[weight], atol=1e-6), weight


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("query",), {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}),
        (("*.query",), {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}),
        (("layer.1.*.query", "pooler.*"), {"bert.encoder.layer.1.attention.self.query", "bert.pooler.dense"}),
        (("layer.0.*.[kq]*y",), {f"bert.encoder.layer.0.attention.self.{name}" for name in ("key", "query")}),
        (("bert.pooler.dense",), {"bert.pooler.dense"}),
    ],
)  # fmt: skip
def test_target_modules_are_names_or_patterns(
    patterns: tuple[str, ...], expected: set[str], folders: dict[str, Path]
) -> None:
    spec = ModelSpec(name=str(folders["bert"]), lora=LoraSpec(rank=4, target_modules=patterns))
    auto = "AutoModelForSequenceClassification"
    model = load_model(auto, spec, load_config(spec), 0)
    assert spec.lora is not None
    assert set(find_targets(spec.lora, model)) == expected
    adapted = add_adapters(model, auto, spec, 0)
    names = {
        n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in adapted.named_parameters() if ".lora_A" in n
    }
    assert names == expected


@pytest.mark.parametrize(
    ("auto", "name", "lora", "problem"),
    [
        ("AutoModelForSequenceClassification", "bert", {"target_modules": ["layer.7.*"]},
         "layer.7.* is not a layer of this bert model; its linear layers are dense, key, query, value"),
        ("AutoModelForSequenceClassification", "bert", {"target_modules": ["classifier"]},
         "classifier is new, so it is trained in full; its linear layers are"),
        ("AutoModelForSequenceClassification", "bert", {"target_modules": ["word_embeddings"]},
         "word_embeddings is an Embedding, which takes no adapter; its"),
        # An adapter of the output layer would be merged into the embeddings.
        ("AutoModelForCausalLM", "gpt", {"target_modules": ["lm_head"]}, "lm_head is a Linear, which takes no adapter"),
        ("AutoModelForImageClassification", "resnet", {"target_modules": ["convolution"], "dora": True},
         "convolution is a Conv2d, which takes no adapter"),
    ],
)  # fmt: skip
def test_layers_that_cannot_have_an_adapter_are_refused(
    auto: str, name: str, lora: dict[str, Any], problem: str, folders: dict[str, Path]
) -> None:
    spec = ModelSpec(name=str(folders[name]), lora=LoraSpec.model_validate(lora))
    model = load_model(auto, spec, load_config(spec), 0)
    with pytest.raises(ModelError) as caught:
        add_adapters(model, auto, spec, 0)
    assert caught.value.message.startswith(f"model.lora.target_modules: {problem}")


def test_new_tokens_of_an_output_layer_with_a_bias_are_refused(folders: dict[str, Path]) -> None:
    auto = "AutoModelForMaskedLM"
    spec = ModelSpec(name=str(folders["bert"]), lora=LoraSpec(rank=4), add_tokens=("<a>",))
    with pytest.raises(ModelError, match=r"model.add_tokens: the output layer of a bert model has a bias, with which"):
        add_adapters(load_model(auto, spec, load_config(spec), 0), auto, spec, 0)
