"""Entities as places in a text: what is learned of them, what comes back, and what is said of those that do not."""

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


def _chinese(dice: random.Random) -> Row:
    name, town = dice.choice(_NAMES), dice.choice(_TOWNS)
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


def _back(task: TokenClassification, rows: Sequence[Row]) -> list[list[tuple[int, int, str, str]]]:
    """Say what a model that is right about every word would predict."""
    samples = task.encode(_table(rows), True).samples
    logits = torch.nn.functional.one_hot(task.collate(samples).labels.clamp(min=0), len(task.tags.names)).float()
    found = task.decode(logits, samples).column("prediction").to_pylist()
    return [[(e["start"], e["end"], e["label"], e["text"]) for e in row] for row in found]


def _prepared(model: Path, folder: Path, rows: Sequence[Row], **data: Any) -> PreparedJob:
    pq.write_table(_table(rows), folder / "train.parquet")
    task = {"type": "token-classification", "text": "text", "label": "entities", "max_length": 64}
    return prepare(make_job(model, {"train": str(folder / "train.parquet"), **data}, folder / "runs", task=task))


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bert(tmp_path_factory.mktemp("bytes"))


def test_places_hold_no_spaces_of_tokens(bytes_model: Path) -> None:
    """r20: offsets of byte-level tokens hold the space before a word; and so may those of the annotators."""
    text = "we saw Anna today"
    for entity in (_entity(text, "Anna"), _entity(text, " Anna"), _entity(text, "Anna "), _entity(text, " Anna ")):
        assert _back(_task(bytes_model), [(text, [entity])]) == [[(7, 11, "P", "Anna")]]


def test_bytes_of_one_letter_are_one_word(bytes_model: Path) -> None:
    """r20, r13: three tokens have the place of one Chinese letter, and no word begins at the second of them."""
    text = "见张伟了 ok"
    assert _back(_task(bytes_model), [(text, [_entity(text, "张伟")])]) == [[(1, 3, "P", "张伟")]]
    samples = _task(bytes_model).encode(_table([(text, [])]), True).samples.to_pylist()
    assert (samples[0]["starts"], samples[0]["ends"]) == ([0, 1, 2, 3, 5], [1, 2, 3, 4, 7])


def test_chinese_entities_survive_where_tokens_are_letters(tmp_path: Path) -> None:
    """r13: all between two spaces is one word of XLM-R's tokenizer, here a whole sentence."""
    dice = random.Random(0)
    letters = sorted({letter for _ in range(200) for letter in _chinese(dice)[0]})
    model = spaced_xlmr(tmp_path / "model", [" ".join(letters)] * 20)
    rows = [_chinese(dice) for _ in range(40)]
    labels = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    told = [[(e["start"], e["end"], e["label"], text[e["start"] : e["end"]]) for e in found] for text, found in rows]
    assert _back(_task(model, labels), rows) == told
    assert _prepared(model, tmp_path, rows).job.task.parameters()["labels"] == list(labels)


def test_chinese_entities_that_tokens_run_across_are_refused(tmp_path: Path) -> None:
    """r13: a tokenizer trained on such sentences has tokens of several words; half of the entities are lost."""
    dice = random.Random(0)
    model = spaced_xlmr(tmp_path / "model", [_chinese(dice)[0] for _ in range(500)])
    rows = [_chinese(dice) for _ in range(120)]
    with pytest.raises(DataError) as caught:
        _prepared(model, tmp_path, rows)
    found = str(caught.value)
    assert "of 240 entities in the first 120 rows are lost" in found and found.endswith(f"; {_REMEDY}")
    assert f"{tmp_path}/train.parquet: row 0: entities: the entity " in found and " is read as " in found


@pytest.mark.parametrize("text", ["Anna, come!", "(Anna)", "see Anna: now", "Anna's"])
def test_punctuation_belongs_to_no_entity_where_tokens_part_it(tmp_path: Path, text: str) -> None:
    """r13 in English: a word of XLM-R's tokenizer holds the comma behind it."""
    letters = " ".join("abcdefghijklmnopqrstuvwxyzAB,.:!?()'")
    model = spaced_xlmr(tmp_path / "model", [letters] * 20)
    assert _back(_task(model), [(text, [_entity(text, "Anna")])]) == [[(*_at(text, "Anna"), "P", "Anna")]]


def _at(text: str, part: str) -> tuple[int, int]:
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
def test_entities_that_are_not_of_whole_words_are_refused(
    bytes_model: Path, tmp_path: Path, start: int, end: int, why: str
) -> None:
    rows = [("see Anna now", [{"start": start, "end": end, "label": "P"}])] * 40
    with pytest.raises(DataError) as caught:
        _prepared(bytes_model, tmp_path, rows)
    assert str(caught.value) == (
        f"{tmp_path}/train.parquet: row 0: entities: {why}; 40 of 40 entities in the first 40 rows are lost; {_REMEDY}"
    )


def test_few_entities_that_are_not_of_whole_words_are_told_and_not_learned(bytes_model: Path, tmp_path: Path) -> None:
    """q49: neither the words they touch nor others get their label."""
    good: Row = ("see Anna now", [{"start": 4, "end": 8, "label": "P"}])
    bad: Row = ("see Anna now", [{"start": 5, "end": 10, "label": "P"}])
    prepared = _prepared(bytes_model, tmp_path, [good] * 19 + [bad])
    assert prepared.plan.notes[0] == (
        f"{tmp_path}/train.parquet: row 19: entities: the entity 'nna n' (5 to 10) is read as 'Anna now'; 1 of 20 "
        f"entities in the first 20 rows are lost, neither learned nor scored; {_REMEDY}"
    )
    (sample,) = _task(bytes_model).encode(_table([bad]), True).samples.to_pylist()
    assert (sample["starts"], [label for label in sample["labels"] if label != -100]) == ([0], [0])


def test_of_entities_that_lie_across_each_other_the_longest_is_learned(bytes_model: Path) -> None:
    """Kind of q49: a word has one tag, so of nested entities one is lost."""
    text = "the Bank of China said"
    inner, outer = _entity(text, "China", "LOC"), _entity(text, "Bank of China", "ORG")
    task = _task(bytes_model, ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG"))
    for entities in ([inner, outer], [outer, inner]):
        assert _back(task, [(text, entities)]) == [[(4, 17, "ORG", "Bank of China")]]
        lost = task.lost_labels(_table([(text, entities)]))
        assert lost.lost == ((0, "entities: the entity 'China' (12 to 17) overlaps another"),)
        assert lost.labels == 2
    assert not task.lost_labels(_table([(text, [outer, outer])])).lost, "the same twice is no loss"


def test_entities_behind_max_length_are_not_counted_as_lost(bytes_model: Path) -> None:
    text = "see Anna and then see Bert"
    rows = [(text, [_entity(text, "Anna"), _entity(text, "Bert")])]
    assert _back(_task(bytes_model, length=12), rows) == [[(4, 8, "P", "Anna")]]
    assert not _task(bytes_model, length=12).lost_labels(_table(rows)).lost


def test_a_text_without_entities_is_outside_whatever_the_order_of_the_names(bytes_model: Path) -> None:
    """Kind of q49: the first name of task.labels was the tag of every word there."""
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
def test_names_that_places_cannot_be_written_with_are_bad_rows(
    bytes_model: Path, labels: tuple[str, ...], entities: bool, why: str
) -> None:
    rows: list[Row] = [("see Anna", [{"start": 4, "end": 8, "label": "P"}] if entities else [])]
    assert _task(bytes_model, labels).encode(_table(rows), True).problems == ((0, why),)
