"""Scores of generated texts: sums over the split, equal to what the libraries compute of the whole corpus."""

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from launcher.tasks.metrics.texts import Scores, TextScores, Tokenization, tokenization_of

_TRUE = [
    "The quick brown fox jumps over the lazy dog.",
    "Two men, one of them old, are sitting on a bench in the park.",
    "A dog runs.\nIt is chased by children.",
    "Running cats were playing with the balls!",
    "Nothing in common here",
]
_WRITTEN = [
    "The quick fox jumped over the lazy dogs.",
    "Two men are sitting on the bench, in a park.",
    "Children chase it.\nA dog runs",
    "A cat plays with balls!",
    "",
]
_CHINESE_TRUE = ["我喜欢机器学习。", "今天天气很好,我们去公园吧!", "GPT-2 是一个语言模型。"]
_CHINESE_WRITTEN = ["我爱机器学习。", "今天的天气不错,去公园吧。", "GPT-2 是语言的模型"]


def _scores(written: list[str | None], true: list[str], scores: Scores, tokenization: Tokenization) -> TextScores:
    """Score texts in two uneven batches, with a batch of nothing between."""
    states = TextScores(torch.device("cpu"), scores, tokenization)
    for begin, end in ((0, 2), (2, 2), (2, len(true))):
        states.update_texts(written[begin:end], true[begin:end])
    return states


@pytest.mark.parametrize(
    ("written", "true", "tokenization"), [(_WRITTEN, _TRUE, "13a"), (_CHINESE_WRITTEN, _CHINESE_TRUE, "zh")]
)
def test_bleu_and_chrf_are_those_of_sacrebleu_on_the_whole_corpus(
    written: list[str], true: list[str], tokenization: Tokenization
) -> None:
    states = _scores([*written], true, "bleu", tokenization)
    computed = states.compute()
    bleu = sacrebleu.metrics.BLEU(tokenize=tokenization)
    assert computed["bleu"] == bleu.corpus_score(written, [true]).score > 1
    chrf = sacrebleu.metrics.CHRF()
    assert computed["chrf"] == chrf.corpus_score(written, [true]).score > 1
    assert [*computed][:2] == ["bleu", "chrf"]
    assert states.notes() == (
        f"{len(true)} generated texts compared", f"bleu: {bleu.get_signature()}", f"chrf: {chrf.get_signature()}"
    )  # fmt: skip


def test_rouge_is_the_mean_of_the_rows() -> None:
    computed = _scores([*_WRITTEN], _TRUE, "rouge", "13a").compute()
    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    rows = [scorer.score(true, text) for true, text in zip(_TRUE, _WRITTEN, strict=True)]
    assert [*computed][:3] == names
    for name in names:
        assert computed[name] == pytest.approx(np.mean([row[name].fmeasure for row in rows]), abs=1e-7)
    assert 0.2 < computed["rouge2"] < computed["rouge1"] < 1


def test_rouge_of_chinese_counts_characters() -> None:
    # 我 机 器 学 习 of seven and six characters; the full stop is none.
    computed = _scores(["我爱机器学习。"], ["我喜欢机器学习"], "rouge", "zh").compute()
    assert computed["rouge1"] == pytest.approx(2 * 5 / (6 + 7))
    assert computed["rouge2"] == pytest.approx(2 * 3 / (5 + 6))
    # Latin words and numbers in a Chinese text are one token each.
    assert _scores(["GPT 模型"], ["gpt4 模型"], "rouge", "zh").compute()["rouge1"] == pytest.approx(2 * 2 / (3 + 3))


def test_rouge_of_other_scripts_counts_words() -> None:
    assert _scores(["мама мыла раму"], ["мама мыла окно"], "rouge", "intl").compute()["rouge1"] == pytest.approx(2 / 3)
    assert _scores(["мама мыла раму"], ["мама мыла окно"], "rouge", "13a").compute()["rouge1"] == 0


def test_rows_that_were_not_generated_do_not_count() -> None:
    whole = _scores([_WRITTEN[0], None, None, _WRITTEN[3], None], _TRUE, "bleu", "13a")
    part = _scores([_WRITTEN[0], _WRITTEN[3]], [_TRUE[0], _TRUE[3]], "bleu", "13a")
    assert whole.compute() == part.compute()
    assert whole.notes()[0] == "2 generated texts compared"
    assert _scores([None], ["a"], "rouge", "13a").compute()["rouge1"] == 0


@pytest.mark.parametrize(
    ("text", "scores", "tokenization"),
    [
        ("Ein Hund läuft über die Straße.", "rouge", "13a"),
        ("我喜欢机器学习。 GPT", "bleu", "zh"),
        ("私は猫が好きです", "bleu", "char"),
        ("ฉันรักแมว", "rouge", "char"),
        ("мама мыла раму", "bleu", "13a"),
        ("мама мыла раму", "rouge", "intl"),
        ("", "bleu", "13a"),
    ],
)
def test_the_script_decides_the_tokenization(text: str, scores: Scores, tokenization: str) -> None:
    assert tokenization_of(["", text], scores) == tokenization
