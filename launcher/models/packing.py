"""Packing of several samples into one sequence: attention masks that isolate them, and a test of the model for it.

Masks are made in train workers. A model is tested once on the head, on a small random model of the same configuration:
whether samples are isolated depends on the model's code. In transformers 5.23 some hundred types of causal models
isolate them; models with recurrent layers, and a few others, do not (lists in `tests/models/test_packing.py`).
"""

import logging
from typing import TYPE_CHECKING, Any

from launcher.models.small_copy import small_copy

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_LOG = logging.getLogger(__name__)
_FIRST_LENGTH, _SECOND_LENGTH = 7, 8
"""Tokens of the two packed samples of the test."""


def mask_packed_samples(model: "PreTrainedModel") -> None:
    """Add a hook to a causal language model that masks packed samples from each other.

    A sample begins where `position_ids` restarts at 0. Most models of transformers 5.23 derive the mask from positions
    themselves; some (OPT, GPT-OSS, Falcon, XGLM) do not pass them to `create_causal_mask`, but accept a finished mask,
    so the hook makes it for all of them.
    """
    from transformers.masking_utils import create_masks_for_generate

    config = model.config.get_text_config(decoder=True)

    def add_masks(
        module: "torch.nn.Module", args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        positions, ids = inputs.get("position_ids"), args[0] if args else inputs.get("input_ids")
        embedded = inputs.get("inputs_embeds")
        if positions is None or any(inputs.get(key) is not None for key in ("attention_mask", "past_key_values")):
            # Generation, or a caller with a mask of its own: nothing is packed.
            return None
        if embedded is None:
            if ids is None:
                return None
            # Only its shape, dtype and device are read: no memory is allocated.
            embedded = ids.new_empty((*ids.shape, 0), dtype=model.dtype)
        masks = create_masks_for_generate(config, embedded, None, None, position_ids=positions)
        return args, {**inputs, "attention_mask": masks}

    # Not on the whole model: peft calls `model.forward` instead of `model()`, which skips its hooks.
    model.get_decoder().register_forward_pre_hook(add_masks, with_kwargs=True)


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
                mask_packed_samples(model)
            return _isolates_samples(model)
    except Exception as error:  # noqa: BLE001  # the model's code, possibly remote, may raise anything
        _LOG.info("%s cannot be tested for packing (%s: %s)", text.model_type, type(error).__name__, error)
        return False


def _isolates_samples(model: "PreTrainedModel") -> bool:
    """Return whether the logits of a sample packed after another are those of the sample alone."""
    import torch

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        return output

    rng = torch.Generator().manual_seed(1)
    # Gates and scales are initialised to 0, which would hide a leak behind them.
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=rng))
    first, second = (torch.randint(5, 90, (1, size), generator=rng) for size in (_FIRST_LENGTH, _SECOND_LENGTH))
    changed = second.clone()
    changed[0, 0] = (changed[0, 0] + 7) % 90
    positions = torch.arange(_SECOND_LENGTH)[None]
    packed_positions = torch.cat([torch.arange(_FIRST_LENGTH)[None], positions], 1)
    with torch.no_grad():
        alone = logits(second, positions)
        packed = logits(torch.cat([first, second], 1), packed_positions)[_FIRST_LENGTH:]
        # The scale of a visible effect: how far the sample's own first token moves the logits after it.
        effect = (logits(changed, positions) - alone)[1:].abs().max()
    # Relative to the effect: a leak is of its order of magnitude, rounding far below. A model whose logits ignore the
    # token before them shows nothing, and does not pass.
    return bool(effect > 1e-4 * alone.std() and (packed - alone).abs().max() < 1e-3 * effect)
