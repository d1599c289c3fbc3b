"""Tasks of the GPU checks, named by import path in their job files. Runs wherever a task does.

`VarlenLM` brings torch's variable-length attention to transformers' models; `TightLM` runs out of memory on purpose.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from launcher.tasks.causal_lm import CausalLM
from launcher.tasks.samples import Batch, Outputs

LARGEST = 2
"""Sequences of a micro-batch that fit, as far as `TightLM` is concerned."""


def sequence_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Return where each packed sample begins in the flattened batch, and its end: int32 (N + 1,).

    Args:
        position_ids: Position of each token within its sample, (B, T); the padding behind counts from 0 as well.
    """
    flat = position_ids.reshape(-1)
    begins = (flat == 0).nonzero().reshape(-1)
    return torch.cat((begins, begins.new_tensor([flat.numel()]))).to(torch.int32)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each packed sample alone, without a mask.

    Args:
        module: Attention layer; unused, as transformers passes it to every implementation.
        query: Queries, half precision (B, H, T, D).
        key: Keys, (B, H_kv, T, D).
        value: Values, (B, H_kv, T, D).
        attention_mask: Mask; must be None.
        scaling: Factor of the scores; None is D ** -0.5.
        dropout: Dropout probability; must be 0.
        position_ids: Position of each token within its sample, (B, T).
    """
    from torch.nn.attention.varlen import varlen_attn

    assert attention_mask is None and not dropout and position_ids is not None
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
    query, key, value = (tensor.transpose(1, 2).reshape(-1, heads, width) for tensor in (query, key, value))
    bounds = sequence_bounds(position_ids.expand(batch, length))
    # The longest sample is not read back from the device, which would wait for it in every layer.
    out = varlen_attn(query, key, value, bounds, bounds, length, length, scale=scaling, window_size=(-1, 0))
    return out.reshape(batch, length, heads, width), None


# Not registered as a mask function: transformers then makes no mask for it.
AttentionInterface.register("varlen", varlen_attention)


class VarlenLM(CausalLM):
    """Language modelling for models whose configuration says `attn_implementation: varlen`."""


class TightLM(CausalLM):
    """Language modelling on a device that holds micro-batches of `LARGEST` sequences."""

    def sample_losses(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        if torch.is_grad_enabled() and len(batch.mask) > LARGEST:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(batch.mask)} sequences (on purpose)")
        return super().sample_losses(outputs, batch)
