"""Masks of masked language modelling (Devlin et al. 2019, arXiv:1810.04805): which tokens are hidden, and by what.

Runs in data workers (`Masker`), train and predict workers (`filled_texts`). All tokens of a table are masked
at once; each row's mask is a function of its tokens and its seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from launcher.models.chat import IGNORED
from launcher.models.noise import Words, mixed, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = npt.NDArray[np.int64]
_HIDDEN, _REPLACED = 0.8, 0.9
"""Of the chosen tokens 80 % are hidden, 10 % are replaced by any token, and 10 % are kept."""


@dataclass(frozen=True)
class MaskedTexts:
    """Samples of texts.

    Args:
        usable: Positions of the texts that have a token to predict, int64 (n,).
        samples: Tokens of these as the model reads them (`input_ids`), `labels` of all of them, -100 for those that are
            not predicted, the characters that the others stand for (`starts`, `ends`), if asked for, and the `text`.
        lengths: Number of tokens of each, int64 (n,).
        counts: Number of tokens to predict, int64 (n,).
    """

    usable: Ints
    samples: pa.Table
    lengths: Ints
    counts: Ints


class Masker:
    """Masks for the tokens of a tokenizer.

    Args:
        tokenizer: Tokenizer with a mask token.
        fraction: Share of each row's tokens that is predicted, at least one.
        max_length: Tokens kept of each row.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", fraction: float, max_length: int) -> None:
        self._tokenizer, self._fraction, self._max_length = tokenizer, fraction, max_length
        self._mask_id = int(tokenizer.mask_token_id)
        # Unknown words are special tokens too: to predict one teaches nothing.
        self._special_ids = np.array(sorted(tokenizer.all_special_ids), np.int64)
        self._words = np.setdiff1d(np.arange(len(tokenizer)), self._special_ids)

    def encode(self, texts: Sequence[str], seeds: Ints | None, chooses: bool, has_places: bool) -> MaskedTexts:
        """Return the samples of some texts.

        Args:
            texts: Texts, any number.
            seeds: Seed of each text, int64; None takes a hash of its tokens, so that its mask is always the same.
            chooses: True to choose the tokens to predict; False to predict the mask tokens in the text.
            has_places: True to return the characters of predicted tokens, where the tokenizer knows them.
        """
        has_places = has_places and self._tokenizer.is_fast
        tokens: dict[str, list[Any]] = {"input_ids": [], "offset_mapping": []}
        # A tokenizer refuses an empty batch.
        if texts:
            tokens |= self._tokenizer(
                list(texts), truncation=True, max_length=self._max_length, return_attention_mask=False,
                return_offsets_mapping=has_places,
            )  # fmt: skip
        special = frozenset(self._special_ids.tolist())
        usable = [k for k, ids in enumerate(tokens["input_ids"]) if not (chooses and special.issuperset(ids))]
        lengths = np.array([len(tokens["input_ids"][k]) for k in usable], np.int64)
        ids = np.fromiter(chain.from_iterable(tokens["input_ids"][k] for k in usable), np.int64, int(lengths.sum()))
        row_of = np.repeat(np.arange(len(usable)), lengths)
        positions = np.arange(len(ids)) - (np.cumsum(lengths) - lengths)[row_of]
        if chooses:
            keys = _hashes(ids, row_of, positions, len(usable)) if seeds is None else seeds[usable].astype(np.uint64)
            chosen, read = self._mask(ids, row_of, positions, keys)
        else:
            chosen, read = np.flatnonzero(ids == self._mask_id), ids
        counts = np.bincount(row_of[chosen], minlength=len(usable))
        spans = np.zeros((0, 2), np.int64)
        if has_places:
            offsets = chain.from_iterable(tokens["offset_mapping"][k] for k in usable)
            spans = np.array(list(offsets), np.int64).reshape(-1, 2)[chosen]
        labels = np.full(len(ids), IGNORED)
        labels[chosen] = ids[chosen]
        columns = {
            "input_ids": _lists(read, lengths),
            "labels": _lists(labels, lengths),
            "starts": _lists(spans[:, 0], counts * has_places),
            "ends": _lists(spans[:, 1], counts * has_places),
            "text": pa.array([texts[k] for k in usable], pa.string()),
        }
        return MaskedTexts(np.array(usable, np.int64), pa.table(columns), lengths, counts)

    def _mask(self, ids: Ints, row_of: Ints, positions: Ints, keys: Words) -> tuple[Ints, Ints]:
        """Choose and hide tokens of n rows, laid end to end.

        Args:
            ids: Tokens, int64 (tokens,); each row has one that is not special.
            row_of: Row of each token.
            positions: Position of each token in its row.
            keys: Seed of each row, uint64 (n,).

        Returns:
            Indices of the tokens to predict, ascending, and the tokens as the model reads them.
        """
        token_keys = keys[row_of]
        is_special = np.isin(ids, self._special_ids)
        candidates = np.bincount(row_of, ~is_special, len(keys))
        # A fixed number, as in BERT's own data, and not a coin per token: no row goes without.
        counts = np.maximum(np.round(self._fraction * candidates), 1)
        # Row by row, words first, in random order: the first `counts` of each row are chosen.
        order = np.lexsort((uniform(token_keys, 3 * positions), is_special, row_of))
        chosen = np.sort(order[positions < counts[row_of]])
        kind = uniform(token_keys[chosen], 3 * positions[chosen] + 1)
        word = uniform(token_keys[chosen], 3 * positions[chosen] + 2)
        others = self._words[(word * len(self._words)).astype(np.int64)]
        read = ids.copy()
        read[chosen] = np.where(kind < _HIDDEN, self._mask_id, np.where(kind < _REPLACED, others, ids[chosen]))
        return chosen, read


def _hashes(ids: Ints, row_of: Ints, positions: Ints, rows: int) -> Words:
    """Return a hash of each row's tokens in order, uint64 (rows,)."""
    hashes = np.zeros(rows, np.uint64)
    # Sums of 64-bit words wrap around, so their order does not matter.
    np.add.at(hashes, row_of, mixed(ids.astype(np.uint64), positions))
    return hashes


def _lists(values: Ints, counts: Ints) -> pa.ListArray:
    """Return values laid end to end as an Arrow column of int32 lists with these lengths."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return tokens as texts, without the space that some begin with."""
    return [str(tokenizer.decode([token])).strip() for token in ids]


def filled_texts(tokenizer: "PreTrainedTokenizerBase", samples: pa.Table, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Return texts with a token in the place of each one that was predicted.

    Args:
        tokenizer: Tokenizer of the model.
        samples: Rows of `MaskedTexts.samples`.
        tokens: Tokens of each row.
    """
    texts = []
    for row, ids in zip(samples.to_pylist(), tokens, strict=True):
        if len(row["starts"]) == len(ids):
            spans = list(zip(row["starts"], row["ends"], strict=True))
            texts.append(_filled(row["text"], spans, token_texts(tokenizer, ids)))
            continue
        # A slow tokenizer knows no places: the text is what its tokens say.
        read = np.array(row["input_ids"])
        read[np.array(row["labels"]) != IGNORED] = ids
        texts.append(str(tokenizer.decode(read, skip_special_tokens=True)))
    return texts


def _filled(text: str, spans: Sequence[tuple[int, int]], tokens: Sequence[str]) -> str:
    """Return a text with tokens in the place of these characters."""
    parts, end = [], 0
    for (begin, following), token in zip(spans, tokens, strict=True):
        replaced = text[begin:following]
        # RoBERTa's mask takes the space before it along.
        space = replaced[: len(replaced) - len(replaced.lstrip())]
        parts += [text[end:begin], space, token.removeprefix("##")]
        end = following
    return "".join([*parts, text[end:]])
