"""Parameters of sequence-to-sequence tasks: which columns hold the texts, and how targets are scored. Runs anywhere.

Read `seq2seq.py` for the task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import pyarrow as pa
from pydantic import Field, model_validator

from launcher.formatting import as_text, show_value
from launcher.tasks.params import SmoothedParams, TrainingColumns
from launcher.tasks.samples import read_each

_SCORED_TEXTS = 1000
"""Training rows whose script decides how targets are tokenized for the scores."""


@dataclass(frozen=True)
class Texts:
    """Texts of some rows.

    Args:
        valid_rows: Positions of the rows with all texts.
        problems: Pairs (position, reason) of the others.
        sources: Source of each valid row.
        targets: Target of each valid row.
    """

    valid_rows: list[int]
    problems: tuple[tuple[int, str], ...]
    sources: list[str]
    targets: list[str]


class PairParams(SmoothedParams):
    """`task:` with `type: seq2seq`."""

    source: str = "source"
    """Column with the texts to read."""
    target: str = "target"
    """Column with the texts to write."""
    translation: str | None = None
    """Column with both texts of each row, {en: ..., de: ...}; `source` and `target` are then its keys."""
    prefix: str = ""
    """Text put before each source, such as T5's `translate English to German: `."""
    source_lang: str | None = None
    """Language of the sources, for models of many languages, as their tokenizer names it (`en_XX`, `eng_Latn`)."""
    target_lang: str | None = None
    """Language of the targets, for such models."""
    max_source_length: int = Field(default=256, ge=4)
    """Tokens kept of each source; the rest is cut off."""
    max_target_length: int = Field(default=128, ge=4)
    """Tokens kept of each target; the rest is cut off."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that are generated for a row; null takes `max_target_length`."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of the search in evaluations, `predict` and the export; 1 takes the most likely token."""
    generated_rows: int | None = Field(default=None, ge=1)
    """First rows of a split whose targets an evaluation generates and scores; null generates all."""
    scores: Literal["bleu", "rouge"] = "bleu"
    """Scores of generated targets: `bleu` (BLEU and chrF2 by sacrebleu) for translations, `rouge` (F1 of ROUGE-1,
    ROUGE-2 and ROUGE-Lsum by rouge-score) for summaries."""
    tokenize: Literal["auto", "13a", "zh", "char", "intl"] = "auto"
    """Tokenization of the scored texts, as sacrebleu names it; ROUGE splits into characters under `zh` and `char`.
    `auto` chooses by the script of the training targets."""

    @model_validator(mode="after")
    def _check_pair(self) -> "PairParams":
        if self.translation and self.source == self.target:
            raise ValueError(f"source and target are both {self.source}, so there is nothing to learn; name two keys")
        if (self.source_lang is None) != (self.target_lang is None):
            missing = "target_lang" if self.target_lang is None else "source_lang"
            raise ValueError(f"{missing} is missing, but a model of many languages needs both; name it")
        return self

    @property
    def new_tokens(self) -> int:
        """Most tokens that are generated for a row."""
        return self.max_new_tokens or self.max_target_length

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores of generated targets, the main one first."""
        return ("bleu", "chrf") if self.scores == "bleu" else ("rouge1", "rouge2", "rougeLsum")

    def source_text(self, row: Mapping[str, object]) -> str:
        """Return the source of a row.

        Raises:
            ValueError: It has none.
        """
        return self._text(row, self.source)

    def target_text(self, row: Mapping[str, object]) -> str:
        """Return the target of a row.

        Raises:
            ValueError: It has none.
        """
        return self._text(row, self.target)

    def texts(self, rows: pa.Table, with_targets: bool) -> "Texts":
        """Return sources with their prefix, and targets; "" for each target that is not read."""

        def read(row: Mapping[str, object]) -> tuple[str, str]:
            return self.prefix + self.source_text(row), self.target_text(row) if with_targets else ""

        pairs, valid_rows, problems = read_each(rows.to_pylist(), read)
        return Texts(valid_rows, problems, [source for source, _ in pairs], [target for _, target in pairs])

    def _text(self, row: Mapping[str, object], name: str) -> str:
        if self.translation is None:
            return as_text(row[name], name)
        cell = row[self.translation]
        if cell is None:
            raise ValueError(f"{self.translation} is null")
        if not isinstance(cell, Mapping):
            raise ValueError(
                f"{self.translation} is {show_value(cell)}, which is not a text by language ({{en: ..., de: ...}})"
            )
        if name not in cell:
            raise ValueError(f"{self.translation} has no {name}, only {', '.join(map(str, cell))}")
        return as_text(cell[name], f"{self.translation}.{name}")

    def with_tokenization(self, data: TrainingColumns) -> "PairParams":
        """Return the parameters with the tokenization that `auto` chooses."""
        if self.tokenize != "auto":
            return self
        from launcher.tasks.metrics.texts import tokenization_of  # imports torch

        column = self.translation or self.target
        cells = islice((cell for piece in data.pieces(column) for cell in piece.to_pylist()), _SCORED_TEXTS)
        texts = (cell.get(self.target) if isinstance(cell, dict) else cell for cell in cells)
        chosen = tokenization_of((str(text) for text in texts if text is not None), self.scores)
        return self.model_copy(update={"tokenize": chosen})
