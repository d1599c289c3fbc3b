"""Packing: several samples in one sequence, none of which may see another. Masks for it, and a test of the model.

Masks are made in train workers. A model is tested once on the head, on a small copy of its configuration with random
weights: whether samples stay apart is a matter of its code. In transformers 5.23 some hundred types of causal models
keep them apart; models with recurrent layers, and a few others, do not (`tests/models/test_packing.py`).
"""

import logging
from typing import TYPE_CHECKING, Any

from launcher.models.pretrained import empty_model

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_LOG = logging.getLogger(__name__)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
# Largest sizes of the copy under test, by configuration key. The window is shorter than the samples, so that a mask
# which forgets it is found out.
_LARGEST = {
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
    "num_kv_shared_layers": 0,
}
_MOST_PARAMETERS = 100_000_000
"""Of a copy that is tested; what does not become small takes seconds."""
_FIRST, _SECOND = 7, 8
"""Tokens of the two samples under test."""


def mask_packed_samples(model: "PreTrainedModel") -> None:
    """Make a causal language model mask packed samples from one another, in place.

    Positions that begin again at 0 mark the samples. Most models of transformers 5.23 derive the mask from them; some
    (OPT, GPT-OSS, Falcon, XGLM) do not pass positions to the function that makes it, but take a finished mask.
    """
    from transformers.masking_utils import create_masks_for_generate

    config = model.config.get_text_config(decoder=True)

    def add_masks(
        module: "torch.nn.Module", args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        positions, ids = inputs.get("position_ids"), args[0] if args else inputs.get("input_ids")
        embedded = inputs.get("inputs_embeds")
        if positions is None or any(inputs.get(key) is not None for key in ("attention_mask", "past_key_values")):
            return None  # generation, which packs nothing
        if embedded is None:
            if ids is None:
                return None
            embedded = ids.new_empty((*ids.shape, 0), dtype=model.dtype)
        masks = create_masks_for_generate(config, embedded, None, None, position_ids=positions)
        return args, {**inputs, "attention_mask": masks}

    # Not on the whole model: peft calls its `forward` directly, past all hooks.
    model.get_decoder().register_forward_pre_hook(add_masks, with_kwargs=True)


def keeps_samples_apart(auto_model: str, config: "PretrainedConfig") -> bool:
    """Return True if a model of this configuration, once masked, computes packed samples as it computes them alone.

    A model that cannot be made small, or fails, counts as one that does not. Takes a tenth of a second, once
    transformers has loaded the model's class.
    """
    import torch

    text = config.get_text_config(decoder=True)
    try:
        small = type(text)(**_shrunk(text.to_dict()))
        with torch.device("meta"):
            size = sum(weight.numel() for weight in empty_model(auto_model, small).parameters())
        if size > _MOST_PARAMETERS:
            raise ValueError(f"its small copy has {size} parameters")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = empty_model(auto_model, small).float().eval()
            # Flash attention takes no masks: a model has to hand the positions on by itself, as it does to make a mask.
            if "flash" not in (text._attn_implementation or ""):
                mask_packed_samples(model)
            return _compare(model)
    except Exception as error:  # noqa: BLE001  # the model's own code, of any origin
        _LOG.info("%s cannot be tested for packing (%s: %s)", text.model_type, type(error).__name__, error)
        return False


def _compare(model: "PreTrainedModel") -> bool:
    """Compare the logits of a sample that stands behind another with those of the sample alone."""
    import torch

    draws = torch.Generator().manual_seed(1)
    for weight in model.parameters():  # gates and scales that begin at zero would hide what passes through them
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=draws))
    first, second = (torch.randint(5, 90, (1, size), generator=draws) for size in (_FIRST, _SECOND))
    other = second.clone()
    other[0, 0] = (other[0, 0] + 7) % 90
    own = torch.arange(_SECOND)[None]
    with torch.no_grad():
        alone, changed = (model(input_ids=ids, position_ids=own, use_cache=False).logits[0] for ids in (second, other))
        places = torch.cat([torch.arange(_FIRST)[None], own], 1)
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=places, use_cache=False).logits[0, _FIRST:]
    # The measure is how far the sample's own first token moves what follows it.
    reach = (changed - alone)[1:].abs().max()
    return bool(reach > 1e-4 * alone.std() and (packed - alone).abs().max() < 1e-3 * reach)


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a small copy, which has at least one layer of each kind."""
    settings = {key: value for key, value in settings.items() if value is not None}
    kinds = settings.get("layer_types") or settings.get("attention_layers") or []
    deep = max((settings[key] for key in _LAYER_COUNTS if isinstance(settings.get(key), int)), default=0)
    layers = next((n for n in range(2, len(kinds)) if set(kinds[:n]) == set(kinds)), 2)
    grouped = settings.get("num_key_value_heads") != settings.get("num_attention_heads")
    for key, value in settings.items():
        if key in _LAYER_COUNTS:
            settings[key] = min(value, layers)
        elif key == "num_key_value_heads" and not grouped:
            settings[key] = settings["num_attention_heads"]
        elif isinstance(value, list) and len(value) == deep:  # one entry a layer
            settings[key] = value[:layers]
        elif key == "per_layer_config":
            settings[key] = {number: entry for number, entry in value.items() if int(number) < layers}
        elif key in _LARGEST and isinstance(value, int) and not isinstance(value, bool):
            settings[key] = min(value, _LARGEST[key])
        elif key.endswith("_token_id"):
            settings[key] = 0 if key == "pad_token_id" else 1
    return settings
