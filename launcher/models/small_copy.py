"""A small random model of the same architecture as a large one, to test what its code computes. Runs on the head.

What a model does with positions, or with the output of its last layer, depends on its code and not on its size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from launcher.models.pretrained import untrained_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
# Largest values of the small model's configuration by key. The attention window is shorter than the samples, so that a
# mask which ignores it fails the test.
_MAX_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("ffn_hidden_size", "inner_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("rotary_dim", "sliding_window", "window_size", "attention_window", "index_topk"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    "hidden_size_per_layer_input": 8,
    # ModernBERT's window on both sides of a token: its `sliding_window` is half of it.
    "local_attention": 8,
    # BigBird's sparse attention begins at 11 blocks: shorter samples would be tested with another kind.
    "block_size": 1,
    "num_kv_shared_layers": 0,
}
_MAX_PARAMETERS = 100_000_000
"""Most parameters of the small model; a larger one, whose size keys are not known here, would take seconds to test."""


@contextmanager
def small_copy(auto_model: str, config: "PretrainedConfig") -> "Iterator[PreTrainedModel]":
    """Yield a small random model in eval mode, fp32 on the CPU; its weights are a function of the configuration.

    Takes a tenth of a second, once the model's class is imported. The global random state is left as it was.

    Args:
        auto_model: Name of the transformers Auto class.
        config: Configuration of the large model's text part.

    Raises:
        ValueError: The sizes of this configuration are not known, so its copy would be large.
        Exception: Whatever the model's code raises, which may be remote.
    """
    import torch

    small = type(config)(**_shrink(config.to_dict()))
    with torch.device("meta"):
        # Counted on the meta device first: an unknown size key may leave a copy of many gigabytes.
        size = sum(weight.numel() for weight in untrained_model(auto_model, small).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"its small copy has {size} parameters")
    # No devices: saving the state of GPUs would initialise CUDA on the head, and the test runs on the CPU.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield untrained_model(auto_model, small).float().eval()


def _shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a small model of the same architecture, with at least one layer of each kind."""
    settings = {key: value for key, value in settings.items() if value is not None}
    kinds = settings.get("layer_types") or settings.get("attention_layers") or []
    depth = max((settings[key] for key in _LAYER_COUNTS if isinstance(settings.get(key), int)), default=0)
    # Hybrid models repeat a pattern of layers, and one kind of them may leak where the others do not.
    layers = next((n for n in range(2, len(kinds)) if set(kinds[:n]) == set(kinds)), 2)
    is_grouped = settings.get("num_key_value_heads") != settings.get("num_attention_heads")
    for key, value in settings.items():
        if key in _LAYER_COUNTS:
            settings[key] = min(value, layers)
        elif key == "num_key_value_heads" and not is_grouped:
            settings[key] = settings["num_attention_heads"]
        # An entry per layer.
        elif isinstance(value, list) and len(value) == depth:
            settings[key] = value[:layers]
        elif key == "per_layer_config":
            settings[key] = {number: entry for number, entry in value.items() if int(number) < layers}
        elif key in _MAX_SIZES and isinstance(value, int) and not isinstance(value, bool):
            settings[key] = min(value, _MAX_SIZES[key])
        elif key.endswith("_token_id"):
            # Token ids must be below the small vocabulary.
            settings[key] = 0 if key == "pad_token_id" else 1
    return settings
