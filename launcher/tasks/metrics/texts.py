"""Scores of generated texts against references: BLEU and chrF2 by sacrebleu, ROUGE by rouge-score. Train workers.

All are sums over the rows of a split: n-gram counts for BLEU and chrF2, scores of single rows for ROUGE. They do not
depend on batches or ranks.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from launcher.tasks.metrics.language import LanguageMetrics
from launcher.tasks.results import TaskMetrics, rounded

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

Scores = Literal["bleu", "rouge"]
Tokenization = Literal["13a", "zh", "char", "intl"]

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# Japanese, Thai, Lao, Burmese and Khmer: written without spaces, as Chinese is.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_CHARACTERS = re.compile(r"[a-z0-9]+|[^\W_]")
_WORDS = re.compile(r"[^\W_]+")
_ROUGE = ("rouge1", "rouge2", "rougeLsum")


def tokenization_of(texts: Iterable[str], scores: Scores) -> Tokenization:
    """Return the tokenization for the script of some texts: `zh` for Chinese, `char` for others without spaces.

    Otherwise `13a`, the WMT standard of BLEU; but for ROUGE `intl` where most letters are not Latin, as rouge-score
    knows the letters a-z alone.
    """
    text = "".join(texts)
    if _UNSPACED.search(text):
        return "char"
    if _HAN.search(text):
        return "zh"
    letters = [letter for letter in text if letter.isalpha()]
    is_foreign = sum(letter > "\u024f" for letter in letters) > 0.5 * len(letters)
    return "intl" if is_foreign and scores == "rouge" else "13a"


class TextScores(TaskMetrics):
    """BLEU and chrF2, or ROUGE-1, ROUGE-2 and ROUGE-Lsum, of generated texts, and `LanguageMetrics` of the true tokens.

    Args:
        device: Device of the states.
        scores: Scores to compute.
        tokenization: Tokenization of the texts; ROUGE splits into characters under `zh` and `char`, and into words of
            any script under `intl`.
    """

    def __init__(self, device: torch.device, scores: Scores, tokenization: Tokenization) -> None:
        self._language = LanguageMetrics(device)
        self._counters = _bleu(tokenization) if scores == "bleu" else (_Rouge(tokenization),)
        # The number of texts, then the statistics. float64: exact up to 2^53.
        size = 1 + sum(counter.size for counter in self._counters)
        self._sums = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows of true tokens: logits (B, T, V); labels (B, T), -100 for none."""
        self._language.update_logits(logits, labels)

    def update_texts(self, generated: Sequence[str | None], references: Sequence[str]) -> None:
        """Add generated texts and the true ones; None for a row that was not generated."""
        pairs = [(text, true) for text, true in zip(generated, references, strict=True) if text is not None]
        if not pairs:
            return
        texts, truth = map(list, zip(*pairs, strict=True))
        numbers = [float(len(pairs))]
        for counter in self._counters:
            numbers += counter.count(texts, truth)
        self._sums += rounded(torch.tensor(numbers, dtype=torch.float64, device=self._sums.device))

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, the scores of texts first. Collective."""
        if dist.is_initialized():
            # In place: a second call of `compute` would add the sums of all ranks once more.
            dist.all_reduce(self._sums)
        sums = self._sums.tolist()
        values: dict[str, float] = {}
        begin = 1
        for counter in self._counters:
            values |= counter.compute(sums[begin : begin + counter.size], sums[0])
            begin += counter.size
        return values | self._language.compute()

    def baseline(self) -> dict[str, float]:
        """Return the scores of unigram frequencies; there are none for whole texts."""
        return self._language.baseline()

    def notes(self) -> tuple[str, ...]:
        """Return the signature of each score, and the number of texts that it compares."""
        texts = f"{int(self._sums[0]):,} generated texts compared"
        return (texts, *(counter.signature for counter in self._counters))


class _Sacrebleu:
    """Sufficient statistics of one of sacrebleu's metrics.

    The public `corpus_score` needs the whole corpus at once; what it adds up is private (sacrebleu 2.6,
    metrics/base.py).
    """

    def __init__(self, name: str, metric: "BLEU | CHRF", size: int) -> None:
        self._name, self._metric, self.size = name, metric, size
        metric.num_refs = 1

    @property
    def signature(self) -> str:
        return f"{self._name}: {self._metric.get_signature()}"

    def count(self, generated: Sequence[str], references: Sequence[str]) -> list[float]:
        rows = self._metric._extract_corpus_statistics(generated, [references])
        return [float(sum(column)) for column in zip(*rows, strict=True)]

    def compute(self, sums: Sequence[float], rows: float) -> dict[str, float]:
        return {self._name: float(self._metric._compute_score_from_stats([int(value) for value in sums]).score)}


def _bleu(tokenization: Tokenization) -> tuple[_Sacrebleu, ...]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # `force` silences the advice about texts that look tokenized: an uncased model writes them so.
    bleu, chrf = BLEU(tokenize=tokenization, force=True), CHRF()
    return (
        _Sacrebleu("bleu", bleu, 2 + 2 * bleu.max_ngram_order),
        _Sacrebleu("chrf", chrf, 3 * chrf.order),
    )


class _Rouge:
    """Sums of the F1 scores of rows."""

    size = len(_ROUGE)

    def __init__(self, tokenization: Tokenization) -> None:
        from importlib.metadata import version

        from rouge_score.rouge_scorer import RougeScorer

        pattern = {"zh": _CHARACTERS, "char": _CHARACTERS, "intl": _WORDS}.get(tokenization)
        tokenizer = None if pattern is None else _PatternTokenizer(pattern)
        self._scorer = RougeScorer(_ROUGE, use_stemmer=True, tokenizer=tokenizer)
        words = {"zh": "characters", "char": "characters", "intl": "words"}.get(tokenization, "words, Porter stemmer")
        self.signature = f"rouge: F1|tok:{words}|sentences:lines|version:rouge-score {version('rouge-score')}"

    def count(self, generated: Sequence[str], references: Sequence[str]) -> list[float]:
        rows = [self._scorer.score(true, text) for true, text in zip(references, generated, strict=True)]
        return [sum(row[name].fmeasure for row in rows) for name in _ROUGE]

    def compute(self, sums: Sequence[float], rows: float) -> dict[str, float]:
        return {name: value / max(rows, 1.0) for name, value in zip(_ROUGE, sums, strict=True)}


class _PatternTokenizer:
    """Tokenizer of rouge-score that returns all matches of a pattern in lower case."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern

    def tokenize(self, text: str) -> list[str]:
        return self._pattern.findall(text.lower())
