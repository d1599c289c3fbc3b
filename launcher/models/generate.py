"""Text from a causal language model. Runs in train workers (samples for the report) and data workers (predict)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """What the model writes behind each prompt, always taking the most likely token.

    Args:
        model: on any device; under ZeRO-3 all workers must call with the same prompts.
        tokenizer: its own.
        prompts: token ids, at least one each.
        max_new_tokens: tokens written at most.
    """
    import torch
    import torch.distributed as dist

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int):  # what is to be written needs room: of a long prompt the end is kept
        max_new_tokens = min(max_new_tokens, positions - 1)
        prompts = [p[-(positions - max_new_tokens) :] for p in prompts]
    width = max(map(len, prompts))
    # Padding stands in front, so that what is written begins at the same place in every row.
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    written = model.generate(  # type: ignore[operator]  # a method torch.nn.Module's __getattr__ hides
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=_stops(model, tokenizer),
        synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
    )
    texts: list[str] = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return texts


def _stops(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    own = getattr(model.generation_config, "eos_token_id", None)
    stops = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    stops |= {tokenizer.get_vocab().get("<|im_end|>")}  # ends an answer, though few configurations say so
    return sorted(stop for stop in stops if isinstance(stop, int)) or None
