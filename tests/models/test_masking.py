"""Masks of masked language modelling: functions of row and seed, in the shares of BERT, on any table."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from launcher.models.masking import Masker, filled_texts
from launcher.models.noise import uniform
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec

_TEXTS = [" ".join(f"w{(i * 7 + j) % 200}" for j in range(3 + i % 40)) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSpec(name=str(tiny_models["masked-lm"])))


def _truth(row: dict[str, list[int]]) -> list[int]:
    """Return the tokens of a row that are predicted."""
    return [label for label in row["labels"] if label != -100]


def test_uniform_numbers_are_uniform() -> None:
    values = uniform(np.full(100_000, 5, np.uint64), np.arange(100_000))
    assert 0 <= values.min() < values.max() < 1
    counts = np.histogram(values, 50, (0, 1))[0]
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_masks_have_the_shares_of_bert(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [" ".join(f"w{(i + j) % 200}" for j in range(100)) for i in range(200)]
    masked = Masker(tokenizer, 0.15, 128).encode(texts, np.arange(200), chooses=True, has_places=False)
    assert masked.counts.tolist() == [15] * 200
    rows = masked.samples.to_pylist()
    tokens, labels = (np.array([row[name] for row in rows]) for name in ("input_ids", "labels"))
    is_chosen = labels != -100
    read, truth = tokens[is_chosen], labels[is_chosen]
    # 3,000 tokens: a share is within 3 standard deviations.
    hidden, kept = (read == tokenizer.mask_token_id).mean(), (read == truth).mean()
    assert abs(hidden - 0.8) < 0.022
    assert abs(kept - 0.1 - 0.1 / 200) < 0.018
    # No token is replaced by a special one but the mask.
    assert set(np.unique(read)) - {tokenizer.mask_token_id} <= set(range(4, 204))
    # Positions are spread over the whole text, and the tokens around them are untouched.
    assert abs(np.nonzero(is_chosen)[1].mean() - 50.5) < 3
    assert np.where(is_chosen, labels, tokens).tolist() == tokenizer(texts)["input_ids"]


def test_a_mask_depends_on_its_row_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    masker, seeds = Masker(tokenizer, 0.3, 32), np.arange(300) * 12345
    for chosen in (seeds, None):
        whole = masker.encode(_TEXTS, chosen, chooses=True, has_places=False).samples.to_pylist()
        part = None if chosen is None else chosen[40:53]
        assert masker.encode(_TEXTS[40:53], part, chooses=True, has_places=False).samples.to_pylist() == whole[40:53]


def test_masks_change_with_the_seed_and_stay_in_evaluations(tokenizer: PreTrainedTokenizerBase) -> None:
    masker = Masker(tokenizer, 0.15, 128)
    first, again, other = (
        masker.encode(_TEXTS, seeds, chooses=True, has_places=False).samples
        for seeds in (np.arange(300), np.arange(300), np.arange(300) + 1000)
    )
    assert first.equals(again)
    assert first.column("labels") != other.column("labels")
    # In an evaluation equal texts have equal masks, and others others.
    fixed = masker.encode([_TEXTS[30], _TEXTS[31], _TEXTS[30]], None, chooses=True, has_places=True).samples.to_pylist()
    assert fixed[0] == fixed[2]
    assert fixed[0]["labels"] != fixed[1]["labels"]


def test_each_row_has_a_mask_and_special_tokens_have_none(tokenizer: PreTrainedTokenizerBase) -> None:
    masked = Masker(tokenizer, 0.01, 8).encode(["w1", "", "w2 unseen", "unseen", *_TEXTS], None, True, True)
    assert masked.usable.tolist() == [0, 2, *range(4, 304)]
    rows = masked.samples.to_pylist()
    assert [_truth(row) for row in rows[:2]] == [[5], [6]]
    assert set(masked.counts) == {1}
    assert max(masked.lengths) == 8


def test_places_are_those_of_the_hidden_words(tokenizer: PreTrainedTokenizerBase) -> None:
    masked = Masker(tokenizer, 0.3, 128).encode(_TEXTS, None, chooses=True, has_places=True)
    rows = masked.samples.to_pylist()
    for row in rows:
        words = [row["text"][begin:end] for begin, end in zip(row["starts"], row["ends"], strict=True)]
        assert words == tokenizer.convert_ids_to_tokens(_truth(row))
    # The true tokens give the text back.
    assert filled_texts(tokenizer, masked.samples, list(map(_truth, rows))) == _TEXTS


def test_masks_of_the_user_are_filled(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["w1 [MASK], w3", "w4", "[MASK][MASK]"]
    masked = Masker(tokenizer, 0.15, 128).encode(texts, None, chooses=False, has_places=True)
    assert masked.counts.tolist() == [1, 0, 2]
    assert filled_texts(tokenizer, masked.samples, [[9], [], [5, 6]]) == ["w1 w5, w3", "w4", "w1w2"]


def test_texts_without_places_are_filled_from_their_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    masked = Masker(tokenizer, 0.15, 128).encode(["w1 [MASK] w3"], None, chooses=False, has_places=False)
    assert filled_texts(tokenizer, masked.samples, [[9]]) == ["w1 w5 w3"]
