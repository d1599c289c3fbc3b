"""Pairs of a short and a long text as windows of tokens, which know the characters they cover. Runs in data workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """Tokens of the short text and of a part of the long one.

    Args:
        input_ids: Tokens, T of them.
        token_type_ids: Segment of each token, as BERT has them.
        starts: First character of each token in the long text, int32 (T,); -1 for tokens of the short text and marks.
        ends: One past its last character, int32 (T,).
        null: Token that stands for "nothing in this window": the classification token, or else the first.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    null: int


def read_windows(
    tokenizer: "PreTrainedTokenizerBase", firsts: Sequence[str], seconds: Sequence[str], max_length: int, overlap: int
) -> list[list[Window]]:
    """Return the windows of each pair of texts, in order.

    Args:
        tokenizer: Fast tokenizer.
        firsts: Short texts, which are whole in each window.
        seconds: Long texts.
        max_length: Tokens of a window.
        overlap: Tokens of the long text that consecutive windows share; `room_beside` of each short text exceeds it.
    """
    if not firsts:
        return []
    # `only_second` for every tokenizer: those that pad on the left too, as padding is made elsewhere.
    tokens = tokenizer(
        list(firsts), list(seconds), truncation="only_second", max_length=max_length, stride=overlap,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_attention_mask=False,
    )  # fmt: skip
    windows: list[list[Window]] = [[] for _ in firsts]
    for pair, encoding in zip(tokens["overflow_to_sample_mapping"], tokens.encodings, strict=True):
        windows[pair].append(_window(encoding, tokenizer.cls_token_id))
    return windows


def room_beside(tokenizer: "PreTrainedTokenizerBase", firsts: Sequence[str], max_length: int) -> list[int]:
    """Return the tokens that a window has for the long text, for each short text.

    The tokenizers library panics, past any `except Exception`, where this is not more than the overlap of the windows.
    """
    if not firsts:
        return []
    tokens = tokenizer(list(firsts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [max_length - tokenizer.num_special_tokens_to_add(pair=True) - len(ids) for ids in tokens]


def _window(encoding: "Encoding", cls_token_id: int | None) -> Window:
    is_second = np.array([sequence == 1 for sequence in encoding.sequence_ids])
    spans = np.where(is_second[:, None], np.array(encoding.offsets, np.int32).reshape(-1, 2), np.int32(-1))
    # XLNet has it at the end, GPT-2 none at all.
    null = encoding.ids.index(cls_token_id) if cls_token_id in encoding.ids else 0
    return Window(encoding.ids, encoding.type_ids, spans[:, 0], spans[:, 1], null)
