"""Exact match and F1 of answers as SQuAD defines them. Runs in train workers.

Normalisation and formulas are those of the official scripts of SQuAD 1.1 and 2 (Rajpurkar et al. 2016 and 2018,
arXiv:1606.05250, arXiv:1806.03822): lower case, no punctuation, no articles, and the best of all right answers. Scripts
without spaces between words (and Korean) are compared by characters: `words_of`.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from launcher.tasks.metrics.tags import UNSPACED
from launcher.tasks.results import TaskMetrics, rounded

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE = re.compile(r"[^.!?。！？]*[.!?。！？]*")


def words_of(text: str) -> list[str]:
    """Return the words of an answer that are compared, normalised.

    Of a text in a Latin script, these are those of SQuAD. In a text with any character of a script without spaces, as
    CMRC 2018 and MLQA do, each such character is a word of its own (numbers and Latin words in between stay whole), and
    all Unicode punctuation is dropped, not only that of ASCII. Each answer is treated by its own characters.
    """
    text = text.lower().translate(_PUNCTUATION)
    if UNSPACED.search(text):
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
        text = UNSPACED.sub(r" \g<0> ", text)
    return _ARTICLES.sub(" ", text).split()


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if two answers have the same words, otherwise 0."""
    return float(words_of(prediction) == words_of(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall over the words of two answers."""
    predicted, true = words_of(prediction), words_of(answer)
    # As the script of SQuAD 2: without words on either side, they agree or not.
    if not predicted or not true:
        return float(predicted == true)
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))


def best_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return the best F1 and exact match over all right answers; without any, "" is right.

    Args:
        prediction: Predicted answer, "" for none.
        answers: Right answers, empty if there is none.
    """
    right = [answer for answer in answers if words_of(answer)] or [""]
    return max(f1(prediction, answer) for answer in right), max(exact_match(prediction, answer) for answer in right)


def first_sentence(context: str) -> str:
    """Return the first sentence of a context."""
    match = _SENTENCE.match(context.lstrip())
    return match.group() if match else ""


class AnswerMetrics(TaskMetrics):
    """F1 and exact match over all rows, and over those with and without an answer where there are such.

    Args:
        device: Device of the states.
    """

    def __init__(self, device: torch.device) -> None:
        # Rows (answerable, not), sums of F1 and of exact matches over the answerable, right rows of the others, and
        # sums of F1 and exact matches of the first sentences. float64: sums of a million of fractions.
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)

    def update(self, predictions: Sequence[str], answers: Sequence[Sequence[str]], contexts: Sequence[str]) -> None:
        """Add B rows: predicted answers, all right answers (empty where there is none), and contexts."""
        sums = [0.0] * 7
        for prediction, right, context in zip(predictions, answers, contexts, strict=True):
            score, exact = best_scores(prediction, right)
            if right:
                sentence_score, sentence_exact = best_scores(first_sentence(context), right)
                row = (1.0, 0.0, score, exact, 0.0, sentence_score, sentence_exact)
            else:
                row = (0.0, 1.0, 0.0, 0.0, exact, 0.0, 0.0)
            sums = [total + value for total, value in zip(sums, row, strict=True)]
        self._sums += rounded(torch.tensor(sums, dtype=torch.float64, device=self._sums.device))

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, F1 first. Collective."""
        if dist.is_initialized():
            # In place: a second call of `compute` would add the sums of all ranks once more.
            dist.all_reduce(self._sums)
        answerable, unanswerable, score, exact, right, *_ = self._sums.tolist()
        rows = max(answerable + unanswerable, 1.0)
        metrics = {"f1": (score + right) / rows, "exact_match": (exact + right) / rows}
        if answerable and unanswerable:
            metrics |= {"has_answer_f1": score / answerable, "has_answer_exact": exact / answerable}
        return metrics | ({"no_answer_accuracy": right / unanswerable} if unanswerable else {})

    def baseline(self) -> dict[str, float]:
        """Return the scores of never answering, or of always giving the first sentence if that is better."""
        answerable, unanswerable, *_, score, exact = self._sums.tolist()
        rows = max(answerable + unanswerable, 1.0)
        silent = {"f1": unanswerable / rows, "exact_match": unanswerable / rows}
        sentence = {"f1": score / rows, "exact_match": exact / rows}
        return max(silent, sentence, key=lambda scores: scores["f1"])
