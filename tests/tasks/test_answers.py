"""Answers of question answering as people write them, and their tokens in the windows of a context."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from launcher.errors import DataError
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.answers import Answer, AnswerParams, AnswerReader, answer_notes, check_place, read_answers
from launcher.tasks.samples import Encoded
from tests.support.jobs import Columns


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ({"text": ["a", "b c"], "answer_start": [3, 5]}, [("a", 3), ("b c", 5)]),
        ({"text": [], "answer_start": []}, []),
        ({"text": ["", " "], "answer_start": [-1, 0]}, []),
        ([{"text": "a", "start": 3}, {"text": "b", "answer_start": 0}], [("a", 3), ("b", 0)]),
        ([], []),
    ],
)
def test_answers_are_read_in_both_forms(cell: object, answers: list[tuple[str, int]]) -> None:
    assert [(answer.text, answer.start) for answer in read_answers(cell, "answers")] == answers


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "answers is null"),
        ("a", "answers is 'a', which is not {text: [...], answer_start: [...]} as SQuAD has it, or a list of {text, "
              "start}"),
        ({"text": "a", "answer_start": 3}, "answers is {'text': 'a', 'answer_start': 3}, which is not {text: [...], "),
        ({"texts": ["a"]}, "answers is {'texts': ['a']}, which is not {text: [...], "),
        ({"text": ["a"], "answer_start": []}, "answers has 1 texts for 0 starts"),
        ({"text": ["a"], "answer_start": [None]}, "answers has the answer 'a' at None; give text and integer"),
        ([{"text": "a"}], "answers has the answer 'a' at None; give text and integer"),
        ({"text": [None], "answer_start": [3]}, "answers has the answer None at 3; give text and integer"),
    ],
)  # fmt: skip
def test_other_forms_are_refused(cell: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_answers(cell, "answers")
    assert str(caught.value).startswith(message)


def test_an_answer_must_stand_where_it_says() -> None:
    context = "Zoë saw 蓝色 birds."
    assert check_place(Answer("蓝色", 8), context, "answers", "context") == Answer("蓝色", 8)
    assert check_place(Answer(" birds", 10), context, "answers", "context") == Answer("birds", 11)
    for start, there in ((9, "'色 '"), (-1, "''"), (400, "''")):
        with pytest.raises(ValueError) as caught:
            check_place(Answer("蓝色", start), context, "answers", "context")
        place = "it stands at 8, in characters from 0"
        assert str(caught.value) == f"answers has the answer '蓝色' at {start}, where context has {there} ({place})"
    with pytest.raises(ValueError, match="context does not contain it"):
        check_place(Answer("green", 8), context, "answers", "context")


def _encode(model: Path, rows: list[dict[str, Any]], **params: Any) -> Encoded:
    reader = AnswerReader(AnswerParams.model_validate(params), load_tokenizer(ModelSpec(name=str(model))))
    return reader.encode(pa.Table.from_pylist(rows), True)


def _row(context: str, text: str | None, question: str = "w0 w1") -> dict[str, Any]:
    texts = [] if text is None else [text]
    starts = [] if text is None else [context.index(text)]
    return {"question": question, "context": context, "answers": {"text": texts, "answer_start": starts}}


def _run_qa_positions(sample: dict[str, Any], start: int, end: int) -> list[tuple[int, int]]:
    """Return first and last token of an answer by the loops of transformers' run_qa.py (its default, on the right)."""
    positions = []
    for starts, ends, null in zip(sample["starts"], sample["ends"], sample["null"], strict=True):
        inside = [t for t, s in enumerate(starts) if s >= 0]
        first, last = inside[0], inside[-1]
        if not (starts[first] <= start and ends[last] >= end):
            positions.append((null, null))
            continue
        while first < len(starts) and starts[first] <= start and starts[first] >= 0:
            first += 1
        while ends[last] >= end:
            last -= 1
        positions.append((first - 1, last + 1))
    return positions


def test_windows_and_positions_are_those_of_run_qa(tiny_bert: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        words = [f"w{w}" for w in rng.integers(0, 200, rng.integers(1, 70))]
        begin = int(rng.integers(len(words)))
        # An answer must be no longer than the overlap, 7.
        rows.append(_row(" ".join(words), " ".join(words[begin : begin + int(rng.integers(1, 7))])))
    encoded = _encode(tiny_bert, rows, max_length=24, doc_stride=7)
    assert encoded.problems == ()
    samples = encoded.samples.to_pylist()
    for row, sample, weight, length in zip(rows, samples, encoded.weights, encoded.lengths, strict=True):
        start = row["answers"]["answer_start"][0]
        expected = _run_qa_positions(sample, start, start + len(row["answers"]["text"][0]))
        assert [*zip(sample["first"], sample["last"], strict=True)] == expected
        assert weight == len(expected) == len(sample["input_ids"])
        assert length == sum(map(len, sample["input_ids"])) and max(map(len, sample["input_ids"])) <= 24
        # Every word of the context is in some window, and each window but the first repeats 7 of them.
        covered = sorted({s for starts in sample["starts"] for s in starts if s >= 0})
        assert len(covered) == len(row["context"].split())
        for earlier, later in zip(sample["starts"], sample["starts"][1:], strict=False):
            assert len({*earlier} & {*later} - {-1}) == 7
    assert encoded.weights.max() >= 4


def test_windows_without_the_answer_point_to_the_null_token(tiny_bert: Path) -> None:
    context = " ".join(f"w{i}" for i in range(40))
    rows = [_row(context, "w5"), _row(context, None)]
    first, second = _encode(tiny_bert, rows, max_length=25, doc_stride=4).samples.to_pylist()
    assert len(first["first"]) == 3
    # After [CLS], two words of the question and [SEP].
    assert (first["first"], first["last"]) == ([9, 0, 0], [9, 0, 0])
    assert (second["first"], second["last"], second["answers"]) == ([0, 0, 0], [0, 0, 0], [])
    assert first["token_type_ids"][0] == [0] * 4 + [1] * 21


def test_bad_rows_are_reported_with_their_remedy(tiny_bert: Path) -> None:
    context = " ".join(f"w{i}" for i in range(40))
    rows = [
        _row(context, " ".join(f"w{i}" for i in range(10, 25))),
        _row(context, "w5", question="w1 " * 18),
        _row(context, "w5"),
        {**_row(context, "w5"), "question": " "},
        {**_row(context, "w5"), "context": ""},
    ]
    encoded = _encode(tiny_bert, rows, max_length=25, doc_stride=4)
    assert encoded.valid_rows.tolist() == [2]
    assert [position for position, _ in encoded.problems] == [0, 1, 3, 4]
    reasons = [reason for _, reason in encoded.problems]
    assert reasons[0].startswith("answers has the answer 'w10 w11 ")
    assert reasons[0].endswith("whole in no window, as two share 4 tokens (task.doc_stride); raise it")
    assert reasons[1] == (
        "question leaves 4 of the 25 tokens of a window (task.max_length) for context, and 4 are shared with the next "
        "one (task.doc_stride); raise the first or lower the second"
    )
    assert reasons[2:] == ["question is empty", "context is empty"]


def test_a_third_of_a_window_overlaps_by_default() -> None:
    assert AnswerParams().overlap == 128
    assert AnswerParams(max_length=48).overlap == 16
    with pytest.raises(ValueError, match="doc_stride 48 leaves nothing new in windows of 48; lower it"):
        AnswerParams(max_length=48, doc_stride=48)


@pytest.mark.parametrize(("rows", "unanswerable"), [(["w1", "w2"], False), (["w1", None], True)])
def test_no_answer_is_predicted_if_the_training_data_has_such_rows(rows: list[str | None], unanswerable: bool) -> None:
    table = pa.Table.from_pylist([_row("w1 w2 w3", text) for text in rows])
    assert AnswerParams().with_column(Columns(table)).unanswerable is unanswerable
    assert AnswerParams(unanswerable=False).with_column(Columns(table)).unanswerable is False


@pytest.mark.parametrize("answers", [["a"], [["a"]], [{"text": ["a"]}], [3]])
def test_a_column_without_answers_is_refused(answers: list[object]) -> None:
    table = pa.table({"answers": answers})
    with pytest.raises(DataError) as caught:
        AnswerParams().with_column(Columns(table))
    assert caught.value.message.startswith("task: column answers of the training data is of type ")
    assert caught.value.message.endswith("in Parquet or JSON")


def test_answers_too_long_to_be_predicted_are_noted(tiny_bert: Path) -> None:
    context = " ".join(f"w{i}" for i in range(30))
    rows = [_row(context, "w1 w2 w3 w4 w5 w6"), _row(context, "w1 w2"), _row(context, None)]
    samples = _encode(tiny_bert, rows, max_length=32, doc_stride=8).samples
    assert answer_notes(samples, 6) == ()
    assert answer_notes(samples, 5) == (
        "task.max_answer_length: 1 of the 2 answers looked at have more than 5 tokens (up to 6), and none so long is "
        "ever predicted; raise it",
    )
