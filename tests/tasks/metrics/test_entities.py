"""Entities and their scores beside seqeval, and tags."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from launcher.spec.model import ModelSpec
from launcher.tasks.metrics.entities import EntityMetrics, Span, entity_types, spans
from launcher.tasks.metrics.tags import Tags
from launcher.tasks.token_classification import TokenClassification, TokenParams

_TAGS = ("O", "B-a", "I-a", "B-b", "I-b", "E-a", "S-b")
_rows = st.lists(st.lists(st.sampled_from(_TAGS), min_size=1, max_size=12), min_size=1, max_size=8)


@given(st.lists(st.sampled_from(_TAGS), max_size=20))
@settings(max_examples=300, deadline=None)
def test_spans_match_seqeval(tags: list[str]) -> None:
    assert [(s.type, s.start, s.end - 1) for s in spans(tags)] == get_entities(tags)


def test_spans_by_hand() -> None:
    assert spans(["I-a", "I-a", "B-a", "O", "I-b"]) == [Span(0, 2, "a"), Span(2, 3, "a"), Span(4, 5, "b")]
    assert spans([]) == []
    assert entity_types(_TAGS) == ("a", "b")


def _padded(rows: list[list[str]]) -> torch.Tensor:
    width = max(map(len, rows)) * 2
    labels = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):  # every other token is a word's second
        labels[i, 0 : 2 * len(row) : 2] = torch.tensor([_TAGS.index(tag) for tag in row])
    return labels


@given(_rows, st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_scores_match_seqeval(truth: list[list[str]], random: "object") -> None:
    import random as _random

    assert isinstance(random, _random.Random)
    predicted_tags = [[random.choice(_TAGS) if random.random() < 0.4 else tag for tag in row] for row in truth]
    metrics = EntityMetrics(_TAGS, torch.device("cpu"))
    labels, predicted = _padded(truth), _padded(predicted_tags).clamp(min=0)
    logits = torch.nn.functional.one_hot(predicted, len(_TAGS)).float()
    for i in range(len(truth)):
        metrics.update(logits[i : i + 1], labels[i : i + 1])
    computed = metrics.compute()
    assert computed["f1"] == pytest.approx(f1_score(truth, predicted_tags, zero_division=0), abs=1e-9)
    assert computed["precision"] == pytest.approx(precision_score(truth, predicted_tags, zero_division=0), abs=1e-9)
    assert computed["recall"] == pytest.approx(recall_score(truth, predicted_tags, zero_division=0), abs=1e-9)
    if any(spans(row) for row in [*truth, *predicted_tags]):
        report = classification_report(truth, predicted_tags, zero_division=0, output_dict=True)
        for line in metrics.classes():
            if line.label in report:
                assert line.f1 == pytest.approx(report[line.label]["f1-score"], abs=1e-9)
                assert line.support == report[line.label]["support"]


def test_baseline_predicts_no_entities() -> None:
    metrics = EntityMetrics(_TAGS, torch.device("cpu"))
    labels = _padded([["O", "O", "O", "B-a"]])
    metrics.update(torch.nn.functional.one_hot(labels.clamp(min=0), len(_TAGS)).float(), labels)
    assert metrics.compute()["f1"] == 1.0
    assert metrics.baseline() == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "macro_f1": 0.0, "accuracy": 0.75}
    assert metrics.confusion() is None


def test_tag_names_are_inferred_from_tags_and_from_spans() -> None:
    tags = Tags("tags", ())
    words, ids = pa.array([["O", "B-x"], ["I-x"]]), pa.array([[0, 1], [2]])
    assert tags.infer_names([words], words.type, None) == ("B-x", "I-x", "O")
    assert tags.infer_names([ids], ids.type, ("O", "B-x", "I-x")) == ("O", "B-x", "I-x")
    entities = pa.array([[{"start": 0, "end": 3, "label": "y"}], [], [{"start": 1, "end": 2, "label": "x"}]])
    assert tags.infer_names([entities[:1], entities[1:]], entities.type, None) == ("O", "B-x", "I-x", "B-y", "I-y")


def test_invalid_labels_are_refused_with_a_reason() -> None:
    tags = Tags("tags", ("O", "B-x", "I-x"))
    for label, row, text in (
        (None, ["w", "w"], "tags is null"),
        ("O", ["w", "w"], "tags is 'O', which is not a list"),
        (["O"], ["w", "w"], "tags has 1 tags for 2 words"),
        (["O", "B-z"], ["w", "w"], "tags has the tag 'B-z', which is not one of O, B-x, I-x"),
        (["O", 7], ["w", "w"], "tags has the tag 7, which is not one of O, B-x, I-x"),
        ([{"start": 0, "end": 1, "label": "z"}], "a", "tags has the label 'z', which is not one of O, B-x, I-x"),
    ):
        with pytest.raises(ValueError) as caught:
            tags.check(label, row)
        assert str(caught.value) == text
    tags.check(["O", 2], ["w", "w"])


@pytest.mark.parametrize("tags", [("NOUN", "VERB", "X", "-LRB-", "PRP$"), ("0", "1", "2", "3", "4")])
def test_tags_without_a_prefix_score_as_types(tags: tuple[str, ...]) -> None:
    """Score random parts of speech as seqeval scores `I-NOUN`."""
    dice = torch.Generator().manual_seed(3)
    labels, predicted = (torch.randint(0, len(tags), (40, 9), generator=dice) for _ in range(2))
    metrics = EntityMetrics(tags, torch.device("cpu"))
    metrics.update(torch.nn.functional.one_hot(predicted, len(tags)).float(), labels)
    computed = metrics.compute()
    predicted_tags, truth = ([[f"I-{tags[i]}" for i in row] for row in rows.tolist()] for rows in (predicted, labels))
    assert computed["f1"] == pytest.approx(f1_score(truth, predicted_tags), abs=1e-9) and computed["f1"] < 0.3
    assert [line.label for line in metrics.classes()] == list(tags)


def test_macro_mean_ignores_a_type_without_labels_and_predictions() -> None:
    metrics = EntityMetrics(_TAGS, torch.device("cpu"))
    labels = torch.tensor([[1, 2, 0, 1]])  # of type a alone
    metrics.update(torch.nn.functional.one_hot(labels, len(_TAGS)).float(), labels)
    assert metrics.compute()["macro_f1"] == 1.0


def test_a_tag_of_minus_100_is_neither_learned_nor_scored(tiny_bert: Path) -> None:
    """Mark words without a tag as `datasets` and transformers do."""
    rows = pa.table({"words": [["w1", "w2", "w3"], ["w4"]], "tags": pa.array([[0, -100, 2], [1]])})
    tags = Tags("tags", ())
    column = rows.column("tags").chunk(0)
    assert tags.infer_names([column], column.type, ("0", "1", "2")) == ("0", "1", "2")
    assert Tags("tags", ("0", "1", "2")).counts([column], ("0", "1", "2")) == [1, 1, 1]
    params = TokenParams(text="words", label="tags", labels=("0", "1", "2"), max_length=16)
    encoded = TokenClassification(params, ModelSpec(name=str(tiny_bert)), 0).encode(rows, True)
    (first, second) = encoded.samples.to_pylist()
    assert [label for label in first["labels"] if label != -100] == [0, 2]
    assert (first["starts"], first["ends"]) == ([0, 6], [2, 8]) and encoded.weights.tolist() == [2.0, 1.0]
    assert len(second["starts"]) == 1
