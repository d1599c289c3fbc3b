"""Exact match and F1 beside the official formulas, which are written again here."""

import re
import string
from collections import Counter

import numpy as np
import pytest
import torch
from torchmetrics.text import SQuAD

from launcher.tasks.metrics.squad import AnswerMetrics, best_scores, exact_match, f1, first_sentence, words_of
from tests.support.worker_group import run_group


def _normalize(text: str) -> str:
    """Normalize as `evaluate-v2.0.py` of SQuAD does: white_space_fix(remove_articles(remove_punc(lower(s))))."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _official(prediction: str, answers: list[str]) -> tuple[float, float]:
    """Return F1 and exact match as `evaluate-v2.0.py` of SQuAD computes them (get_raw_scores)."""

    def score(gold: str) -> float:
        true, guess = _normalize(gold).split(), _normalize(prediction).split()
        common = sum((Counter(true) & Counter(guess)).values())
        if not true or not guess:
            return float(true == guess)
        if common == 0:
            return 0.0
        precision, recall = common / len(guess), common / len(true)
        return 2 * precision * recall / (precision + recall)

    golds = [gold for gold in answers if _normalize(gold)] or [""]
    return max(map(score, golds)), max(float(_normalize(gold) == _normalize(prediction)) for gold in golds)


def _texts(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    words = [
        "The",
        "a",
        "AN",
        "cat",
        "Cat's",
        "U.S.",
        "1,000",
        "(dogs)",
        "—",
        "café",
        "well-known",
        "theatre",
        "I",
        "'",
    ]
    texts = [str(rng.choice([" ", "  ", "\n"])).join(rng.choice(words, rng.integers(1, 6))) for _ in range(count)]
    return [text if rng.random() > 0.1 else "" for text in texts]


def test_scores_are_those_of_the_official_script() -> None:
    predictions = _texts(0, 600)
    golds = [_texts(i + 1, 1 + i % 3) for i in range(600)]
    scores = [best_scores(p, g) for p, g in zip(predictions, golds, strict=True)]
    expected = [_official(p, g) for p, g in zip(predictions, golds, strict=True)]
    for column in (0, 1):
        assert [pair[column] for pair in scores] == pytest.approx([pair[column] for pair in expected], abs=1e-12)
    assert 0.02 < np.mean([exact for _, exact in scores]) < np.mean([score for score, _ in scores]) < 0.9


def test_scores_of_answerable_questions_are_those_of_torchmetrics() -> None:
    # SQuAD 1.1, whose script differs where an answer has no word but articles.
    pairs = [(p, g) for p, g in zip(_texts(7, 300), _texts(8, 300), strict=True) if words_of(p) and words_of(g)]
    reference = SQuAD()
    reference.update(
        [{"prediction_text": p, "id": str(i)} for i, (p, _) in enumerate(pairs)],
        [{"answers": {"text": [g], "answer_start": [0]}, "id": str(i)} for i, (_, g) in enumerate(pairs)],
    )
    metrics = AnswerMetrics(torch.device("cpu"))
    for part in (pairs[:1], pairs[1:90], pairs[90:]):
        metrics.update([p for p, _ in part], [[g] for _, g in part], [""] * len(part))
    expected = {name: float(value) / 100 for name, value in reference.compute().items()}
    assert metrics.compute() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer", "score", "exact"),
    [
        ("蓝色", "蓝色的", 0.8, 0),
        ("《红楼梦》", "红楼梦", 1, 1),
        ("308分", "308", 2 / 3, 0),
        ("2005 年", "2005年", 1, 1),
        ("Play公司", "play 公司", 1, 1),
        ("東京タワー", "東京", 4 / 7, 0),
        ("서울에서", "서울", 2 / 3, 0),
        ("blue whale", "blue", 2 / 3, 0),
        ("“blue”", "blue", 0, 0),  # as SQuAD has it: quotation marks beyond ASCII stay
    ],
)
def test_scripts_without_spaces_are_compared_by_characters(
    prediction: str, answer: str, score: float, exact: float
) -> None:
    assert (f1(prediction, answer), exact_match(prediction, answer)) == (pytest.approx(score), exact)


def test_rows_with_and_without_an_answer_are_scored_separately() -> None:
    metrics = AnswerMetrics(torch.device("cpu"))
    contexts = ["A cat sat. It slept.", "Dogs bark! Loudly.", "x", "y"]
    metrics.update(["cat", "", "", "cat"], [["the cat"], ["dogs bark"], [], []], contexts)
    assert metrics.compute() == {
        "f1": 0.5, "exact_match": 0.5, "has_answer_f1": 0.5, "has_answer_exact": 0.5, "no_answer_accuracy": 0.5,
    }  # fmt: skip
    # Never answering is right twice; the first sentences would give (2/3 + 1) / 4 and no exact match but one.
    assert metrics.baseline() == {"f1": 0.5, "exact_match": 0.5}
    answerable = AnswerMetrics(torch.device("cpu"))
    answerable.update(["cat"], [["the cat"]], contexts[:1])
    assert answerable.compute() == {"f1": 1.0, "exact_match": 1.0}
    assert answerable.baseline() == {"f1": pytest.approx(2 / 3), "exact_match": 0.0}
    unanswerable = AnswerMetrics(torch.device("cpu"))
    unanswerable.update([""], [[]], contexts[2:3])
    assert unanswerable.compute() == {"f1": 1.0, "exact_match": 1.0, "no_answer_accuracy": 1.0}
    assert AnswerMetrics(torch.device("cpu")).compute() == {"f1": 0.0, "exact_match": 0.0}


@pytest.mark.parametrize(
    ("context", "sentence"),
    [
        (" One. Two.", "One."), ("Really?! Yes.", "Really?!"), ("没有。有。", "没有。"), ("no end", "no end"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_sentence_ends_with_its_marks(context: str, sentence: str) -> None:
    assert first_sentence(context) == sentence


def _score_share(predictions: list[str], golds: list[list[str]]) -> dict[str, float]:
    import torch.distributed as dist

    metrics = AnswerMetrics(torch.device("cpu"))
    # The last of three ranks has no row at all.
    rank = dist.get_rank()
    own = slice(rank, None, 2) if rank < 2 else slice(0, 0)
    metrics.update(predictions[own], golds[own], [""] * len(golds[own]))
    return metrics.compute()


def test_states_of_all_ranks_are_merged() -> None:
    predictions, golds = _texts(0, 41), [_texts(i + 1, i % 3) for i in range(41)]
    whole = AnswerMetrics(torch.device("cpu"))
    whole.update(predictions, golds, [""] * 41)
    # The sums of each batch are rounded, far below a digit that anybody reads.
    assert run_group(3, _score_share, predictions, golds) == pytest.approx(whole.compute(), abs=1e-7)
