"""Layers of models, depths of their parameters, and `model.freeze` (`launcher/models/layers.py`)."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from launcher.driver.prepare import prepare
from launcher.errors import ModelError
from launcher.models.batch_norm import PartBatchNorm, convert_to_part_batch_norm, find_batch_norms
from launcher.models.layers import Stack, find_stack, freeze, frozen_modules, parameter_depths
from launcher.spec.model import FreezeSpec
from launcher.spec.train import TrainSpec
from launcher.train.param_groups import build_param_groups
from tests.support.jobs import make_job, write_splits
from tests.support.tiny_models import make_tiny_resnet

# Auto class; the list of layers; places of depth 0, 1 and n + 1.
_MODELS = {
    "bert": (
        "AutoModelForSequenceClassification",
        "bert.encoder.layer",
        ("bert.embeddings.", "bert.encoder.layer.0.", "bert.pooler.dense.weight"),
    ),
    "gpt": ("AutoModelForCausalLM", "transformer.h", ("transformer.wte.", "transformer.h.0.", "transformer.ln_f.bias")),
    "vit": ("AutoModelForImageClassification", "vit.layers", ("vit.embeddings.", "vit.layers.0.", "classifier.bias")),
    "resnet": (
        "AutoModelForImageClassification",
        "resnet.encoder.stages",
        ("resnet.embedder.", "resnet.encoder.stages.0.", "classifier.1.weight"),
    ),
}


@pytest.fixture(scope="module")
def folders(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    resnet = make_tiny_resnet(tmp_path_factory.mktemp("resnet"))
    names = ("text-classification", "causal-lm", "image-classification")
    return dict(zip(_MODELS, [*(tiny_models[name] for name in names), resnet], strict=True))


def _model(name: str, folders: dict[str, Path]) -> Any:
    return getattr(transformers, _MODELS[name][0]).from_pretrained(folders[name])


@pytest.mark.parametrize("name", _MODELS)
def test_depths_set_the_learning_rates_of_layer_decay(name: str, folders: dict[str, Path]) -> None:
    model = _model(name, folders)
    _, layers, places = _MODELS[name]
    stack = find_stack(model, "train.layer_decay")
    assert stack == Stack(layers, 2)
    depth = parameter_depths(model, stack)
    for place, expected in zip(places, (0, 1, 3), strict=True):
        assert {d for n, d in depth.items() if n.startswith(place)} == {expected}
    groups = build_param_groups(model, TrainSpec(layer_decay=0.5))
    rates = {name: group.scale for group in groups for name in group.names}
    assert rates == {name: 0.5 ** (3 - d) for name, d in depth.items()}
    assert all(p.dim() >= 2 if group.weight_decay else p.dim() < 2 for group in groups for p in group.parameters)
    assert [group.scale for group in build_param_groups(model, TrainSpec())] == [1.0, 1.0]


@pytest.mark.parametrize("name", _MODELS)
def test_embeddings_and_first_layers_can_be_frozen(name: str, folders: dict[str, Path]) -> None:
    model, (_, layers, places) = _model(name, folders), _MODELS[name]
    freeze(model, FreezeSpec(embeddings=True, layers=1))
    tied = ["lm_head"] if name == "gpt" else []  # it has the embeddings' weights
    assert frozen_modules(model)[-1 - len(tied) :] == [f"{layers}.0", *tied]
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n, d in parameter_depths(model, Stack(layers, 2)).items() if d >= 2}
    assert not any(n.startswith(places[0]) for n in learning)


def test_backbone_and_named_parameters_can_be_frozen(folders: dict[str, Path]) -> None:
    model = _model("bert", folders)
    freeze(model, FreezeSpec(backbone=True))
    assert frozen_modules(model) == ["bert"]
    freeze(model, FreezeSpec(names=("*.LayerNorm.*", "bert.pooler")))
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in model.named_parameters() if "LayerNorm" not in n and "pooler" not in n}


@pytest.mark.parametrize(
    ("name", "spec", "problem"),
    [
        ("bert", {"layers": 3}, "model.freeze.layers: 3 is more than the 2 layers of bert.encoder.layer; lower it"),
        ("bert", {"names": ("bert.encodr.layer.0.*",)},
         "model.freeze.names: no parameter of BertForSequenceClassification matches bert.encodr.layer.0.*; did you "
         "mean bert.encoder.layer.0"),
        ("bert", {"names": ("*",)},
         "model.freeze leaves nothing of BertForSequenceClassification to train; freeze less"),
        ("gpt", {"backbone": True},
         "model.freeze leaves nothing of GPT2LMHeadModel to train; its head shares the embeddings' weights"),
    ],
)  # fmt: skip
def test_impossible_freezing_is_refused(
    name: str, spec: dict[str, Any], problem: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ModelError) as caught:
        freeze(_model(name, folders), FreezeSpec(**spec))
    assert caught.value.message.startswith(problem)


def test_frozen_batch_norm_keeps_its_statistics(folders: dict[str, Path]) -> None:
    model = _model("resnet", folders)
    freeze(model, FreezeSpec(embeddings=True))
    convert_to_part_batch_norm(model)
    norms = dict.fromkeys(find_batch_norms(model))
    frozen = [norm for norm in norms if not isinstance(norm, PartBatchNorm)]
    assert frozen == find_batch_norms(model.resnet.embedder) and len(frozen) < len(norms)


def test_the_plan_has_the_trained_parameters_and_their_memory(tiny_bert: Path, tmp_path: Path) -> None:
    """Check gradients and optimizer states of frozen weights, and of SGD without momentum."""
    data = write_splits(tmp_path / "data", train=20)
    sgd = {"optimizer": {"type": "sgd", "momentum": 0.0}}
    jobs = [{}, {"model": {"freeze": {"backbone": True}}}, {"train": sgd}]
    sections = [{"parallel": {"zero": 0}, **job} for job in jobs]
    whole, head, plain = (prepare(make_job(tiny_bert, data, tmp_path, **section)).plan for section in sections)
    assert head.model["frozen"] == "bert" and head.model["trained"] == 2 * 32 + 2 and "trained" not in whole.model
    assert whole.state_bytes_per_worker == 16 * whole.parameters
    assert head.state_bytes_per_worker == 4 * whole.parameters + 12 * 66
    assert plain.state_bytes_per_worker == 8 * whole.parameters
