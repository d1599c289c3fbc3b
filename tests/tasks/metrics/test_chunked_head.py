"""The chunked cross entropy is that of the whole logits: losses, predictions, gradients; else it is off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from launcher.spec.model import ModelSpec
from launcher.tasks.causal_lm import CausalLM
from launcher.tasks.conversations import CausalParams
from launcher.tasks.masked_lm import MaskedLM, MaskedParams
from launcher.tasks.metrics import chunked_head
from launcher.tasks.metrics.chunked_head import ChunkedHead, token_outputs
from launcher.tasks.metrics.losses import labelled_losses
from launcher.tasks.samples import Batch


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "_CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(chunked_head, "_MIN_CHUNK", 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_losses_and_gradients_match_the_whole_logits(smoothing: float, has_bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 29, bias=has_bias).double()
    hidden = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 29, (2, 11))
    labels[0, :4] = labels[1, 9:] = -100
    weight = torch.rand(2, 11)
    plain = labelled_losses(head(hidden), labels, smoothing=smoothing)
    gradients = torch.autograd.grad((plain * weight).sum(), [hidden, *head.parameters()])
    expected = head(hidden).argmax(-1)
    chunked = ChunkedHead(head)
    chunked.labels, chunked.smoothing = labels, smoothing
    pair = head(hidden)
    assert torch.allclose(pair[..., 0], plain.float(), atol=1e-6)
    assert torch.equal(pair[..., 1][labels != -100].long(), expected[labels != -100])
    own = torch.autograd.grad((pair[..., 0] * weight).sum(), [hidden, *head.parameters()])
    for mine, truth in zip(own, gradients, strict=True):
        assert torch.allclose(mine, truth, atol=1e-5)
    chunked.labels = None
    assert head(hidden).shape == (2, 11, 29)


def test_a_batch_without_labels_has_zero_losses_and_gradients() -> None:
    head = torch.nn.Linear(4, 7)
    ChunkedHead(head).labels = torch.full((1, 3), -100)
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    pair = head(hidden)
    pair[..., 0].sum().backward()
    assert float(pair.detach().abs().sum()) == 0.0
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) == 0.0


def _outputs(model: Any, auto: str = "AutoModelForCausalLM") -> tuple[dict[str, torch.Tensor], Batch]:
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    batch = Batch({"input_ids": ids, "use_cache": False}, labels, torch.ones(2))
    return token_outputs(auto, model, batch.inputs, batch.labels), batch


def test_models_return_token_losses_and_still_generate(tiny_models: dict[str, Path]) -> None:
    model = CausalLM(CausalParams(), ModelSpec(name=str(tiny_models["causal-lm"])), 0).build_model().eval()
    outputs, batch = _outputs(model)
    logits = model(**batch.inputs).logits
    truth = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(2, 9)
    assert torch.allclose(outputs["losses"], truth, atol=1e-5)
    assert "forward" in vars(model.get_output_embeddings())
    assert model.generate(batch.inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 9


def test_masked_models_score_hidden_tokens_alone(tiny_models: dict[str, Path]) -> None:
    model = MaskedLM(MaskedParams(), ModelSpec(name=str(tiny_models["masked-lm"])), 0).build_model().eval()
    # As in a pretrained model: the decoder's bias is its own, and not zero.
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.rand(2, 9, generator=torch.Generator().manual_seed(2)) < 0.7, -100)
    outputs = token_outputs("AutoModelForMaskedLM", model, {"input_ids": ids}, labels)
    assert "forward" in vars(model.get_output_embeddings())
    logits = model(input_ids=ids).logits
    is_labelled = labels != -100
    assert torch.allclose(outputs["losses"], labelled_losses(logits, labels), atol=1e-5)
    confidence, predicted = logits.softmax(-1).max(-1)
    assert torch.equal(outputs["predicted"], predicted * is_labelled)
    assert torch.allclose(outputs["confidence"], confidence * is_labelled, atol=1e-6)


def test_a_bias_after_the_output_layer_keeps_logits_whole() -> None:
    from transformers import BertConfig, MarianConfig, RobertaConfig

    assert not chunked_head._returns_output_of_head("AutoModelForSeq2SeqLM", MarianConfig())
    for config in (BertConfig(), RobertaConfig()):
        assert chunked_head._returns_output_of_head("AutoModelForMaskedLM", config)


def test_models_that_cap_their_logits_keep_them_whole() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0)).eval()
    outputs, batch = _outputs(model)
    assert "forward" not in vars(model.get_output_embeddings())
    truth = labelled_losses(model(**batch.inputs).logits, batch.labels)
    assert torch.allclose(outputs["losses"], truth, atol=1e-6)


def test_adapters_of_the_output_layer_keep_logits_whole(tiny_models: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = CausalLM(CausalParams(), ModelSpec(name=str(tiny_models["causal-lm"])), 0).build_model().eval()
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", ensure_weight_tying=True)
    )
    outputs, batch = _outputs(adapted)
    truth = labelled_losses(adapted(**batch.inputs).logits, batch.labels)
    assert torch.allclose(outputs["losses"], truth, atol=1e-6)
