"""Greedy generation of text after prompts. Runs in train workers (samples for the report) and predict workers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_sharded(model: "torch.nn.Module") -> bool:
    """Return True if the weights are shards of ZeRO-3, so that each forward pass is a collective of all ranks."""
    # DeepSpeed 0.19.8 gives each weight that it partitions an id (runtime/zero/partition_parameters.py).
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Return the text that the model generates after each prompt, always taking the most likely token.

    Prompt and answer share the model's positions: an answer ends where they do, and a prompt is never cut.

    Args:
        model: Model in eval mode, on any device. Under ZeRO-3 each forward pass gathers parameters (a collective), so
            all ranks must call with the same prompts.
        tokenizer: Tokenizer of the model.
        prompts: Token ids of each prompt.
        max_new_tokens: Limit of generated tokens for each prompt.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [
        min(max_new_tokens, positions - len(p)) if isinstance(positions, int) else max_new_tokens for p in prompts
    ]
    texts = [""] * len(prompts)
    # Usually one batch: prompts with another limit are near the end of the positions. The limit of a prompt does not
    # depend on the others, so neither does its text.
    for limit in sorted({limit for limit in limits if limit > 0}):
        chosen = [i for i, own_limit in enumerate(limits) if own_limit == limit]
        for i, text in zip(chosen, _generate(model, tokenizer, [prompts[i] for i in chosen], limit), strict=True):
            texts[i] = text
    return texts


def _generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Return the text after each prompt, at least one, as `generate` does; all are generated in one batch."""
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    width = max(map(len, prompts))
    # Left padding: the generated tokens of all rows begin at the same position.
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    # From the lengths, not from the ids: the padding token may be a real one.
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sequences = model.generate(  # type: ignore[operator]  # hidden by torch.nn.Module.__getattr__
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=_end_tokens(model, tokenizer),
        # A rank that is done continues with dummy forward passes until the last one is, or ZeRO-3 would deadlock.
        # It costs an all_reduce and a sync for each token (`_has_unfinished_sequences` of transformers 5.23).
        synced_gpus=is_sharded(model),
    )
    texts: list[str] = tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
    return texts


def _end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    # Ends an answer in ChatML; most generation configs lack it, and without it an answer may run to the limit.
    ends |= {tokenizer.get_vocab().get("<|im_end|>")}
    return sorted(end for end in ends if isinstance(end, int)) or None
