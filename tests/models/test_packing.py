"""Packed samples: which types of models keep them apart, by the values of a small copy of each."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from launcher.models import packing
from launcher.models.packing import keeps_samples_apart

_APART = """
    afmoe apertus arcee aria_text axk1 axk2 beam biogpt bitnet codegen cohere cohere2 cohere2_moe ctrl
    cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon
    flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_assistant gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3
    gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder
    jais2 jetmoe kolibri1 laguna lfm2 llama llama4 llama4_text longcat_flash megatron-bert mellum mimo_v2_flash
    minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi
    moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe
    qwen3 qwen3_moe rembert seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
"""

_LEAK = """
    bailing_hybrid bart bert bert-generation bigbird_pegasus blenderbot blenderbot-small bloom camembert cpmant
    data2vec-text deepseek_v4 dots3_note electra emu3 ernie falcon_h1 falcon_mamba inkling2_text inkling_text
    jamba kimi_linear lfm3 mamba marian mbart minimax mllama mpt musicgen musicgen_melody mvp nemotron_h
    olmo_hybrid pegasus prophetnet qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp roberta
    roberta-prelayernorm roc_bert roformer rwkv trocr xlm-roberta xlm-roberta-xl
"""

_APART_ENCODERS = """
    albert bert camembert data2vec-text distilbert electra ernie eurobert gte jina_embeddings_v3 megatron-bert
    modernbert modernvbert mpnet nomic_bert rembert roberta roberta-prelayernorm roc_bert squeezebert tapas
    xlm-roberta xlm-roberta-xl
"""

# Settings that published models have and the configuration class does not.
_PUBLISHED: dict[str, dict[str, object]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
_REFUSED = {"gemma4_assistant"}  # by transformers, as the class's own defaults do not go together
_COMMON = ["gpt2", "llama", "mistral", "qwen3", "qwen3_moe", "gemma3_text", "phi3", "gpt_oss", "opt", "deepseek_v3"]
_COMMON_LEAK = ["bloom", "mpt", "mamba", "jamba", "qwen3_next", "bert"]
_MASKED = "AutoModelForMaskedLM"


def _is_isolated(kind: str, auto_model: str = "AutoModelForCausalLM", **settings: object) -> bool:
    config = AutoConfig.for_model(kind, **{**_PUBLISHED.get(kind, {}), **settings})
    return keeps_samples_apart(auto_model, config)


@pytest.mark.parametrize("kind", _COMMON)
def test_a_common_model_keeps_packed_samples_apart(kind: str) -> None:
    assert _is_isolated(kind)


@pytest.mark.parametrize("kind", _COMMON_LEAK)
def test_a_model_that_leaks_between_packed_samples_is_detected(kind: str) -> None:
    assert not _is_isolated(kind)


@pytest.mark.parametrize(
    ("kind", "is_apart"),
    [
        *((kind, True) for kind in ("bert", "roberta", "distilbert", "modernbert", "electra", "albert", "mpnet")),
        # Convolutions, Fourier transforms, positions and masks of their own, attention to blocks.
        *((kind, False) for kind in ("convbert", "fnet", "deberta-v2", "big_bird")),
    ],
)
def test_encoders_are_told_apart(kind: str, is_apart: bool) -> None:
    assert _is_isolated(kind, _MASKED) is is_apart


def test_tokens_are_classified_with_masks_of_encoders_alone() -> None:
    assert _is_isolated("roberta", "AutoModelForTokenClassification")
    assert not _is_isolated("llama", "AutoModelForTokenClassification")


def test_wrong_masks_and_positions_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check encoders without masks, RoBERTa with BERT's positions, and ModernBERT without its window."""
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_two_sided_masks", lambda _config, _embedded, _positions: None)
        assert not _is_isolated("bert", _MASKED)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "first_position", lambda _model: 0)
        assert not _is_isolated("roberta", _MASKED)
        assert _is_isolated("bert", _MASKED)
    make = packing._two_sided_masks
    monkeypatch.setattr(
        packing, "_two_sided_masks", lambda config, *args: dict.fromkeys(
            ("full_attention", "sliding_attention"), make(config, *args)["full_attention"]
        )
    )  # fmt: skip
    assert not _is_isolated("modernbert", _MASKED)


def test_the_result_depends_on_the_configuration_and_not_on_the_type() -> None:
    """Vary layers: LFM2's convolutions leak, its attention does not; Falcon's older models use ALiBi."""
    assert _is_isolated("lfm2", layer_types=["full_attention"] * 32)
    assert not _is_isolated("lfm2", layer_types=["conv", "conv", "full_attention", "conv"] * 8)
    assert _is_isolated("falcon")
    assert not _is_isolated("falcon", alibi=True)


def test_flash_attention_needs_a_model_that_passes_positions() -> None:
    """Check OPT, which does not pass its positions on; flash attention takes no masks."""
    assert _is_isolated("opt") and not _is_isolated("opt", attn_implementation="flash_attention_2")
    assert _is_isolated("llama", attn_implementation="flash_attention_2")


def test_a_model_that_fails_is_not_packed() -> None:
    assert not _is_isolated("hunyuan_v1_dense", head_dim=None)


def test_the_global_random_state_is_unchanged() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    _is_isolated("gpt2", n_inner=48)
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - _REFUSED))
def test_each_type_of_causal_model_is_classified_as_listed(kind: str) -> None:
    """Classify all types; those in neither list cannot be made small and are not packed."""
    apart = set(_APART.split())
    assert not apart & set(_LEAK.split())
    assert _is_isolated(kind) == (kind in apart)


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES))
def test_each_type_of_encoder_is_classified_as_listed(kind: str) -> None:
    assert _is_isolated(kind, _MASKED) == (kind in _APART_ENCODERS.split())
