"""Packing of several samples into one sequence: attention masks that isolate them, and a test of the model for it.

Masks are made in train workers. A model is tested once on the head, on a small random model of the same configuration:
whether samples are isolated depends on the model's code. In transformers 5.23 some hundred types of causal models and
most encoders isolate them; models with recurrent layers, and a few others, do not (lists in
`tests/models/test_packing.py`).
"""

import logging
from typing import TYPE_CHECKING, Any

from launcher.models.pretrained import first_position
from launcher.models.small_copy import small_copy

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_LOG = logging.getLogger(__name__)
_FIRST_LENGTH, _SECOND_LENGTH = 7, 8
"""Tokens of the two packed samples of the test."""
_CAUSAL = "AutoModelForCausalLM"


def mask_packed_samples(model: "PreTrainedModel", auto_model: str) -> None:
    """Add a hook to a model that masks packed samples from each other.

    A sample begins where `position_ids` restarts at 0. Most causal models of transformers 5.23 derive the mask from
    positions themselves; some (OPT, GPT-OSS, Falcon, XGLM) do not pass them to `create_causal_mask`, and encoders never
    do. But all accept a finished mask, so the hook makes it.

    Args:
        model: Model, without adapters.
        auto_model: Name of its transformers Auto class: attention is causal in `AutoModelForCausalLM`, and reaches both
            sides in others.
    """
    from transformers.masking_utils import create_masks_for_generate

    is_causal = auto_model == _CAUSAL
    config = model.config.get_text_config(decoder=True)
    first = 0 if is_causal else first_position(model)

    def add_masks(
        module: "torch.nn.Module", args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        positions, ids = inputs.get("position_ids"), args[0] if args else inputs.get("input_ids")
        embedded = inputs.get("inputs_embeds")
        if positions is None or any(inputs.get(key) is not None for key in ("attention_mask", "past_key_values")):
            # Generation, an evaluation of an encoder, or a caller with a mask of its own: nothing is packed.
            return None
        if embedded is None:
            if ids is None:
                return None
            # Only its shape, dtype and device are read: no memory is allocated.
            embedded = ids.new_empty((*ids.shape, 0), dtype=model.dtype)
        if is_causal:
            masks = create_masks_for_generate(config, embedded, None, None, position_ids=positions)
        else:
            masks = _two_sided_masks(config, embedded, positions)
        return args, {**inputs, "attention_mask": masks, "position_ids": positions + first}

    # Not on the whole model: peft calls `model.forward` instead of `model()`, which skips its hooks.
    body = model.get_decoder() if is_causal else model.base_model
    body.register_forward_pre_hook(add_masks, with_kwargs=True)


def _two_sided_masks(config: "PretrainedConfig", embedded_BTD: "torch.Tensor", positions_BT: "torch.Tensor") -> Any:
    """Return the mask of an encoder whose samples begin at position 0, or one for each kind of its layers."""
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        and_masks,
        packed_sequence_mask_function,
        sliding_window_bidirectional_mask_function,
    )

    is_same_sample = packed_sequence_mask_function((positions_BT == 0).cumsum(-1))

    def mask(kind: str) -> Any:
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(f"a layer of the kind {kind} has no mask for packed samples")
        visible = is_same_sample
        if kind == "sliding_attention":
            visible = and_masks(sliding_window_bidirectional_mask_function(config.sliding_window), visible)
        # Not `create_bidirectional_mask`, which takes such a function too, but calls it by vmap: 10 ms, not 1.
        batch, length = positions_BT.shape
        return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=batch, q_length=length, kv_length=length, q_offset=0, kv_offset=0, mask_function=visible,
            allow_is_causal_skip=False, dtype=embedded_BTD.dtype, device=positions_BT.device, config=config,
        )  # fmt: skip

    kinds = getattr(config, "layer_types", None)
    return {kind: mask(kind) for kind in sorted(set(kinds))} if kinds else mask("full_attention")


def keeps_samples_apart(auto_model: str, config: "PretrainedConfig") -> bool:
    """Return whether a model of this configuration, with masks, computes packed samples as it computes single ones.

    A model that cannot be made small, or that fails, counts as one that does not. Takes a tenth of a second, once the
    model's class is imported. The global random state is left as it was.
    """
    text = config.get_text_config(decoder=True)
    try:
        with small_copy(auto_model, text) as model:
            # Flash attention takes no masks: a model must pass the positions on by itself, so it is tested without.
            if "flash" not in (text._attn_implementation or ""):
                mask_packed_samples(model, auto_model)
            return _isolates_samples(model, auto_model == _CAUSAL)
    except Exception as error:  # noqa: BLE001  # the model's code, possibly remote, may raise anything
        _LOG.info("%s cannot be tested for packing (%s: %s)", text.model_type, type(error).__name__, error)
        return False


def _isolates_samples(model: "PreTrainedModel", is_causal: bool) -> bool:
    """Return whether the logits of two packed samples are those of each sample alone."""
    import torch

    def logits(ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        flags = {"use_cache": False} if is_causal else {}
        output: torch.Tensor = model(input_ids=ids, **inputs, **flags).logits[0]
        return output

    def alone(ids: torch.Tensor) -> torch.Tensor:
        """Run one sample as a task does without packing: an encoder counts its positions itself."""
        if is_causal:
            return logits(ids, position_ids=torch.arange(ids.shape[1])[None])
        return logits(ids, attention_mask=torch.ones_like(ids))

    rng = torch.Generator().manual_seed(1)
    # Gates and scales are initialised to 0, which would hide a leak behind them.
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=rng))
    first, second = (torch.randint(5, 90, (1, size), generator=rng) for size in (_FIRST_LENGTH, _SECOND_LENGTH))
    changed = second.clone()
    changed[0, 0] = (changed[0, 0] + 7) % 90
    positions = torch.cat([torch.arange(_FIRST_LENGTH), torch.arange(_SECOND_LENGTH)])[None]
    with torch.no_grad():
        packed = logits(torch.cat([first, second], 1), position_ids=positions)
        single = alone(second)
        # The scale of a visible effect: how far the sample's own first token moves the logits after it.
        effect = (alone(changed) - single)[1:].abs().max()
        difference = (packed - torch.cat([alone(first), single])).abs().max()
    # Relative to the effect: a leak is of its order of magnitude, rounding far below. A model whose logits ignore the
    # token before them shows nothing, and does not pass.
    return bool(effect > 1e-4 * single.std() and difference < 1e-3 * effect)
