"""Entities as character spans: which are learned and predicted as they are, and which are lost."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launcher.driver.prepare import PreparedJob, prepare
from launcher.errors import DataError
from launcher.spec.model import ModelSpec
from launcher.tasks.token_classification import TokenClassification, TokenParams
from tests.support.jobs import make_job
from tests.support.span_models import byte_bert, spaced_xlmr

_NAMES, _TOWNS = ("张伟", "王芳", "李娜", "刘洋"), ("北京", "上海", "广州", "成都")
_REMEDY = "let entities begin and end with words, or take a model whose tokenizer reads smaller pieces"
Row = tuple[str, list[dict[str, Any]]]


def _chinese(rng: random.Random) -> Row:
    name, town = rng.choice(_NAMES), rng.choice(_TOWNS)
    text = f"昨天{name}从{town}回来了，大家都很高兴。"
    return text, [_entity(text, name, "PER"), _entity(text, town, "LOC")]


def _entity(text: str, part: str, label: str = "P") -> dict[str, Any]:
    return {"start": text.index(part), "end": text.index(part) + len(part), "label": label}


def _task(model: Path, labels: Sequence[str] = ("O", "B-P", "I-P"), length: int = 64) -> TokenClassification:
    params = TokenParams(text="text", label="entities", labels=tuple(labels), max_length=length)
    return TokenClassification(params, ModelSpec(name=str(model)), 0)


_ENTITIES = pa.list_(pa.struct({"start": pa.int64(), "end": pa.int64(), "label": pa.string()}))


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.table({"text": [text for text, _ in rows], "entities": pa.array([e for _, e in rows], _ENTITIES)})


def _predicted(task: TokenClassification, rows: Sequence[Row]) -> list[list[tuple[int, int, str, str]]]:
    """Return the predictions of a model that is right about every word."""
    samples = task.encode(_table(rows), True).samples
    logits = torch.nn.functional.one_hot(task.collate(samples).labels.clamp(min=0), len(task.tags.names)).float()
    predictions = task.decode({"logits": logits}, samples).column("prediction").to_pylist()
    return [[(e["start"], e["end"], e["label"], e["text"]) for e in row] for row in predictions]


def _prepared(model: Path, folder: Path, rows: Sequence[Row], **data: Any) -> PreparedJob:
    pq.write_table(_table(rows), folder / "train.parquet")
    task = {"type": "token-classification", "text": "text", "label": "entities", "max_length": 64}
    return prepare(make_job(model, {"train": str(folder / "train.parquet"), **data}, folder / "runs", task=task))


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bert(tmp_path_factory.mktemp("bytes"))


def test_spans_are_stripped_of_spaces(bytes_model: Path) -> None:
    """Strip the spaces in the offsets of byte-level tokens, and those of annotators."""
    text = "we saw Anna today"
    for entity in (_entity(text, "Anna"), _entity(text, " Anna"), _entity(text, "Anna "), _entity(text, " Anna ")):
        assert _predicted(_task(bytes_model), [(text, [entity])]) == [[(7, 11, "P", "Anna")]]


def test_bytes_of_one_letter_are_one_word(bytes_model: Path) -> None:
    """Merge the three tokens with the offsets of one Chinese letter."""
    text = "见张伟了 ok"
    assert _predicted(_task(bytes_model), [(text, [_entity(text, "张伟")])]) == [[(1, 3, "P", "张伟")]]
    samples = _task(bytes_model).encode(_table([(text, [])]), True).samples.to_pylist()
    assert (samples[0]["starts"], samples[0]["ends"]) == ([0, 1, 2, 3, 5], [1, 2, 3, 4, 7])


def test_chinese_entities_are_learned_if_tokens_are_letters(tmp_path: Path) -> None:
    """Split a sentence, which is one word for a tokenizer like XLM-R's, into letters."""
    rng = random.Random(0)
    letters = sorted({letter for _ in range(200) for letter in _chinese(rng)[0]})
    model = spaced_xlmr(tmp_path / "model", [" ".join(letters)] * 20)
    rows = [_chinese(rng) for _ in range(40)]
    labels = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    expected = [
        [(e["start"], e["end"], e["label"], text[e["start"] : e["end"]]) for e in predictions]
        for text, predictions in rows
    ]
    assert _predicted(_task(model, labels), rows) == expected
    assert _prepared(model, tmp_path, rows).job.task.parameters()["labels"] == list(labels)


def test_chinese_entities_across_tokens_are_refused(tmp_path: Path) -> None:
    """Train a tokenizer on such sentences: its tokens hold several words, and half of the entities are lost."""
    rng = random.Random(0)
    model = spaced_xlmr(tmp_path / "model", [_chinese(rng)[0] for _ in range(500)])
    rows = [_chinese(rng) for _ in range(120)]
    with pytest.raises(DataError) as caught:
        _prepared(model, tmp_path, rows)
    predictions = str(caught.value)
    assert "of 240 entities in the first 120 rows are lost" in predictions and predictions.endswith(f"; {_REMEDY}")
    assert f"{tmp_path}/train.parquet: row 0: entities: the entity " in predictions and " is read as " in predictions


@pytest.mark.parametrize("text", ["Anna, come!", "(Anna)", "see Anna: now", "Anna's"])
def test_punctuation_is_split_from_words(tmp_path: Path, text: str) -> None:
    """Split the comma from the word before it, which is one word for a tokenizer like XLM-R's."""
    letters = " ".join("abcdefghijklmnopqrstuvwxyzAB,.:!?()'")
    model = spaced_xlmr(tmp_path / "model", [letters] * 20)
    assert _predicted(_task(model), [(text, [_entity(text, "Anna")])]) == [[(*_offsets(text, "Anna"), "P", "Anna")]]


def _offsets(text: str, part: str) -> tuple[int, int]:
    return text.index(part), text.index(part) + len(part)


@pytest.mark.parametrize(
    ("start", "end", "why"),
    [
        (3, 4, "the entity ' ' (3 to 4) is not a word"),
        (5, 10, "the entity 'nna n' (5 to 10) is read as 'Anna now'"),
        (4, 7, "the entity 'Ann' (4 to 7) is read as 'Anna'"),
    ],
    ids=["q48", "q49", "q49 inside a word"],
)
def test_data_with_mostly_lost_entities_are_refused(
    bytes_model: Path, tmp_path: Path, start: int, end: int, why: str
) -> None:
    rows = [("see Anna now", [{"start": start, "end": end, "label": "P"}])] * 40
    with pytest.raises(DataError) as caught:
        _prepared(bytes_model, tmp_path, rows)
    assert str(caught.value) == (
        f"{tmp_path}/train.parquet: row 0: entities: {why}; 40 of 40 entities in the first 40 rows are lost; {_REMEDY}"
    )


def test_few_lost_entities_are_noted_and_not_learned(bytes_model: Path, tmp_path: Path) -> None:
    """Give their label to no word, neither those they touch nor others."""
    good: Row = ("see Anna now", [{"start": 4, "end": 8, "label": "P"}])
    bad: Row = ("see Anna now", [{"start": 5, "end": 10, "label": "P"}])
    prepared = _prepared(bytes_model, tmp_path, [good] * 19 + [bad])
    assert prepared.plan.notes[0] == (
        f"{tmp_path}/train.parquet: row 19: entities: the entity 'nna n' (5 to 10) is read as 'Anna now'; 1 of 20 "
        f"entities in the first 20 rows are lost, neither learned nor scored; {_REMEDY}"
    )
    (sample,) = _task(bytes_model).encode(_table([bad]), True).samples.to_pylist()
    assert (sample["starts"], [label for label in sample["labels"] if label != -100]) == ([0], [0])


def test_the_longest_of_overlapping_entities_is_learned(bytes_model: Path) -> None:
    """Lose one of two nested entities, as a word has one tag."""
    text = "the Bank of China said"
    inner, outer = _entity(text, "China", "LOC"), _entity(text, "Bank of China", "ORG")
    task = _task(bytes_model, ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG"))
    for entities in ([inner, outer], [outer, inner]):
        assert _predicted(task, [(text, entities)]) == [[(4, 17, "ORG", "Bank of China")]]
        lost = task.lost_labels(_table([(text, entities)]))
        assert lost.lost == ((0, "entities: the entity 'China' (12 to 17) overlaps another"),)
        assert lost.labels == 2
    assert not task.lost_labels(_table([(text, [outer, outer])])).lost, "the same twice is no loss"


def test_truncated_entities_are_not_counted_as_lost(bytes_model: Path) -> None:
    text = "see Anna and then see Bert"
    rows = [(text, [_entity(text, "Anna"), _entity(text, "Bert")])]
    assert _predicted(_task(bytes_model, length=12), rows) == [[(4, 8, "P", "Anna")]]
    assert not _task(bytes_model, length=12).lost_labels(_table(rows)).lost


def test_a_text_without_entities_is_outside_for_any_order_of_names(bytes_model: Path) -> None:
    samples = _task(bytes_model, ("B-P", "I-P", "O")).encode(_table([("see you", [])]), True).samples.to_pylist()
    assert [label for label in samples[0]["labels"] if label != -100] == [2, 2]


@pytest.mark.parametrize(
    ("labels", "entities", "why"),
    [
        (("B-P", "I-P"), True, "task.labels is B-P, I-P, which lacks O, the tag of words outside of entities"),
        (("B-P", "I-P"), False, "task.labels is B-P, I-P, which lacks O, the tag of words outside of entities"),
        (("O", "B-P"), True, "entities has the label 'P', but task.labels is O, B-P, which lacks I-P"),
        (("O", "P"), True, "entities has the label 'P', but task.labels is O, P, which lacks B-P"),
    ],
)
def test_rows_are_bad_if_labels_lack_the_tags_of_spans(
    bytes_model: Path, labels: tuple[str, ...], entities: bool, why: str
) -> None:
    rows: list[Row] = [("see Anna", [{"start": 4, "end": 8, "label": "P"}] if entities else [])]
    assert _task(bytes_model, labels).encode(_table(rows), True).problems == ((0, why),)
