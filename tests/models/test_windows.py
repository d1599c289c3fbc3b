"""Windows of a long text beside a short one: tokens, characters, and the token that stands for nothing."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from launcher.models.pretrained import load_tokenizer
from launcher.models.windows import read_windows, room_beside
from launcher.spec.model import ModelSpec


@pytest.fixture
def tokenizer(tiny_bert: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSpec(name=str(tiny_bert)))


def test_tokens_know_the_characters_of_the_long_text(tokenizer: PreTrainedTokenizerBase) -> None:
    context = "w1  W2, w3"
    ((window,),) = read_windows(tokenizer, ["w9"], [context], 16, 4)
    words = [context[s:e] for s, e in zip(window.starts, window.ends, strict=True) if s >= 0]
    assert words == ["w1", "W2", ",", "w3"]
    # [CLS] w9 [SEP] and the last [SEP] belong to no character.
    assert window.starts.tolist() == [-1, -1, -1, 0, 4, 6, 8, -1]
    assert window.token_type_ids == [0, 0, 0, 1, 1, 1, 1, 1]
    assert window.null == 0


def test_windows_belong_to_their_pair(tokenizer: PreTrainedTokenizerBase) -> None:
    long, short = " ".join(["w1"] * 20), "w2"
    windows = read_windows(tokenizer, ["w9", "w9 w8", "w9"], [short, long, short], 12, 3)
    assert [len(parts) for parts in windows] == [1, 5, 1]
    assert all(len(window.input_ids) <= 12 for parts in windows for window in parts)
    assert read_windows(tokenizer, [], [], 12, 3) == room_beside(tokenizer, [], 12) == []


def test_windows_advance_exactly_while_there_is_more_room_than_overlap(tokenizer: PreTrainedTokenizerBase) -> None:
    firsts = ["w9", "w9 w8 w7"]
    assert room_beside(tokenizer, firsts, 12) == [8, 6]
    ((*_, last),) = read_windows(tokenizer, firsts[1:], [" ".join(["w1"] * 20)], 12, 5)
    assert last.ends.max() == 59
    # The library's panic is no `Exception`: whoever reads windows has to compare first.
    with pytest.raises(BaseException, match="`stride` must be strictly less than"):
        read_windows(tokenizer, firsts[1:], [" ".join(["w1"] * 20)], 12, 6)


def test_without_a_classification_token_the_first_stands_for_nothing(tiny_models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(ModelSpec(name=str(tiny_models["causal-lm"])))
    assert tokenizer.cls_token_id is None
    ((window,),) = read_windows(tokenizer, ["w9"], ["w1 w2"], 16, 4)
    assert (window.null, window.starts.tolist()) == (0, [-1, 0, 3])
    tokenizer.cls_token = "w2"
    ((window,),) = read_windows(tokenizer, ["w9"], ["w1 w2"], 16, 4)
    assert window.null == 2
