"""Facts of columns from their types and values; samples of rows; counts of labels."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.row_sample import sample_rows
from launcher.data.splits import open_split
from launcher.errors import DataError
from launcher.init.labels import Labels, count_labels
from launcher.init.profile import describe_column, estimate_tokens
from tests.support.toy_data import SINGLE, chats, look_at, named_classes, picture, words

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
def test_shape_follows_from_type_and_content(values: pa.Array, shape: str) -> None:
    assert describe_column("c", pa.chunked_array([values])).shape == shape


def test_facts_of_texts_and_numbers() -> None:
    texts = describe_column("c", pa.chunked_array([["one two", "", None, "one two", "drei"]]))
    assert (texts.rows, texts.nulls, texts.distinct, texts.tokens) == (5, 2, 2, (2, 2, 1))
    assert texts.spaced == pytest.approx(2 / 3) and texts.foreign == 0.0
    numbers = describe_column("c", pa.chunked_array([[1.0, float("nan"), 3.0]]))
    assert (numbers.low, numbers.high, numbers.distinct, numbers.whole) == (1.0, 3.0, 2, True)


def test_null_lists_count_as_empty_ones() -> None:
    column = describe_column("c", pa.chunked_array([pa.array([["a", "b"], None, ["c"]])]))
    assert column.lengths == (2, 0, 1) and column.nulls == 1 and column.distinct == 3


@pytest.mark.parametrize(
    ("empty", "full"),
    [(None, "a"), ("", "a"), ([], ["a"]), ([None], ["a"]), ([None, None], ["a", None]), ([None], chats(1)[0]),
     ({"bytes": None, "path": None}, {"bytes": b"x", "path": None})],
)  # fmt: skip
def test_cells_that_hold_nothing_but_nulls_count_as_empty(empty: object, full: object) -> None:
    column = describe_column("c", pa.chunked_array([pa.array([empty, full])]))
    assert column.nulls == 1 and not column.is_empty
    without_values = describe_column("c", pa.chunked_array([pa.array([empty, empty], pa.array([full]).type)]))
    assert without_values.shape == "other" and without_values.describe().endswith(", empty)")


def test_each_character_of_a_script_without_spaces_is_one_token() -> None:
    assert estimate_tokens("这个酒店不错") == 6
    assert describe_column("c", pa.chunked_array([["这个酒店不错"]])).foreign == 1.0
    assert estimate_tokens("a word, 123") == 4
    assert estimate_tokens("w " * 30_000) == pytest.approx(30_000, rel=0.01)


def test_an_example_is_one_short_line() -> None:
    def example(values: pa.Array) -> str:
        return describe_column("c", pa.chunked_array([values])).example

    assert example(pa.array(["a\x1b[31m\nb" + "c" * 90])) == "a?[31m b" + "c" * 49 + "..."
    assert example(pa.array([picture()])).endswith("bytes")
    assert example(pa.array(chats(1))).startswith(words(1)[0][:20])


def test_sample_is_spread_over_a_sorted_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [0] * 5000 + [1] * 5000}), tmp_path / "a.parquet", row_group_size=5000)
    split = open_split("train", [str(tmp_path)])
    assert sample_rows(split, ["label"], 100).column("label").to_pylist() == [0] * 50 + [1] * 50
    profile = look_at(pa.table({"text": words(3000), "label": [0] * 1500 + [1] * 1500}), tmp_path)
    assert (profile.rows, profile.column("label").distinct, profile.column("text").rows) == (3000, 2, 2000)


def test_only_few_pictures_are_read(tmp_path: Path) -> None:
    profile = look_at(pa.table({"image": [picture(i) for i in range(40)], "label": [0, 1] * 20}), tmp_path)
    assert profile.column("image").rows == 16 and profile.column("label").rows == 40


def test_arrow_files_are_sampled_and_counted(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, SINGLE.schema) as writer:
        writer.write_table(SINGLE, max_chunksize=25)
    split = open_split("train", [str(tmp_path / "a.arrow")])
    assert sample_rows(split, ["stars"], 9).num_rows == 9
    assert count_labels(split, "stars") == Labels((("1", 20), ("2", 20), ("3", 20)), 60, 0)


def test_labels_with_class_names_are_counted_by_name(tmp_path: Path) -> None:
    column = look_at(named_classes(pa.table({"y": [1, 1, -1]}), "y", ["no", "yes"]), tmp_path).column("y")
    assert column.class_names == ("no", "yes") and column.feature == "ClassLabel"
    counts = count_labels(open_split("train", [str(tmp_path)]), "y").counts
    assert counts == (("yes", 2), ("-1", 1))


def test_missing_column_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    profile = look_at(SINGLE, tmp_path)
    with pytest.raises(DataError, match=r"--label star: toy.parquet has no such column; did you mean stars\?"):
        profile.column("star", "--label")
    with pytest.raises(DataError, match=r"--text zzz: toy.parquet has no such column; it has id, review, stars"):
        profile.column("zzz")


def test_option_with_commas_may_be_one_column_name(tmp_path: Path) -> None:
    profile = look_at(pa.table({"a,b": ["x"], "a": ["x"]}), tmp_path)
    assert profile.parse_names("a,b") == ("a,b",) and profile.parse_names("a, c") == ("a", "c")
