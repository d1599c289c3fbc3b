"""What a column holds, from its type and a few values."""

import json

import pyarrow as pa
import pytest

from launcher.init.columns import describe_column, estimate_tokens
from tests.support.toy_data import chats, picture, words

_SOUND = b"RIFF\x00\x00\x00\x00WAVEfmt "
_FILE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (pa.array(["a", None]), "text"),
        (pa.array(["a"], pa.large_string()), "text"),
        (pa.array(["a", "b"]).dictionary_encode(), "text"),
        (pa.array([1, 2], pa.uint8()), "integer"),
        (pa.array([1.5, None]), "number"),
        (pa.array([True]), "flag"),
        (pa.array([["a"], []]), "words"),
        (pa.array([["a"]], pa.large_list(pa.large_string())), "words"),
        (pa.array([[1, 2]]), "integers"),
        (pa.array([[0.0, 1.0]]), "numbers"),
        (pa.array(chats(2)), "messages"),
        (pa.array(chats(2, keys=("from", "value"))), "messages"),
        (pa.array([json.dumps(chat) for chat in chats(2)]), "messages"),
        (pa.array([[{"role": "user", "content": [{"type": "text", "text": "w1"}]}]]), "messages"),
        (pa.array([[{"start": 0, "end": 1, "label": "x"}]]), "spans"),
        (pa.array([[{"start": 0, "end": 1, "tag": "x"}]]), "structs"),
        (pa.array([[{"role": "user", "content": [{"type": "image"}]}]]), "structs"),
        (pa.array([picture()]), "picture"),
        (pa.array([{"bytes": None, "path": None}, {"bytes": picture(), "path": "a.png"}], _FILE), "picture"),
        (pa.array([{"bytes": None, "path": "a.jpg"}], _FILE), "picture"),
        (pa.array(["a/b.JPG", "c.png"]), "picture"),
        (pa.array([{"bytes": _SOUND, "path": "a.wav"}]), "sound"),
        (pa.array([b"\x00\x01"]), "other"),
        (pa.array([{"a": 1}]), "other"),
        (pa.nulls(2), "other"),
    ],
    ids=str,
)
def test_shapes(values: pa.Array, shape: str) -> None:
    assert describe_column("c", pa.chunked_array([values])).shape == shape


def test_facts_of_texts_and_numbers() -> None:
    texts = describe_column("c", pa.chunked_array([["one two", "", None, "one two", "drei"]]))
    assert (texts.rows, texts.nulls, texts.distinct, texts.tokens) == (5, 2, 2, (2, 2, 1))
    assert texts.spaced == pytest.approx(2 / 3) and texts.foreign == 0.0
    numbers = describe_column("c", pa.chunked_array([[1.0, float("nan"), 3.0]]))
    assert (numbers.low, numbers.high, numbers.distinct, numbers.whole) == (1.0, 3.0, 2, True)


def test_lists_count_for_every_row() -> None:
    column = describe_column("c", pa.chunked_array([pa.array([["a", "b"], None, ["c"]])]))
    assert column.lengths == (2, 0, 1) and column.nulls == 1 and column.distinct == 3


def test_a_script_without_spaces_has_a_token_for_each_character() -> None:
    assert estimate_tokens("这个酒店不错") == 6
    assert describe_column("c", pa.chunked_array([["这个酒店不错"]])).foreign == 1.0
    assert estimate_tokens("a word, 123") == 4
    assert estimate_tokens("w " * 30_000) == pytest.approx(30_000, rel=0.01)


def test_an_example_is_one_short_line() -> None:
    assert (
        describe_column("c", pa.chunked_array([["a\x1b[31m\nb" + "c" * 90]])).example == "a?[31m b" + "c" * 49 + "..."
    )
    assert describe_column("c", pa.chunked_array([pa.array([picture()])])).example.endswith("bytes")
    assert describe_column("c", pa.chunked_array([pa.array(chats(1))])).example.startswith(words(1)[0][:20])
