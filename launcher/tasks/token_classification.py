"""Token classification (NER): a tag for each word. Data workers and train workers."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from launcher.formatting import show_value
from launcher.models.chat import IGNORED
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Batch, Encoded, LostLabels, RowInputs, truncation_note
from launcher.tasks.metrics.tags import Tags
from launcher.tasks.padding import list_column, pad_lists, text_inputs
from launcher.tasks.targets import LabelParams, TargetTask

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_REMEDY = "let entities begin and end with words, or take a model whose tokenizer reads smaller pieces"


class TokenParams(LabelParams):
    """`task:` with `type: token-classification`."""

    text: str = "tokens"
    """Column that holds a list of words, or a string whose entities are character spans."""
    label: str = "tags"
    """Column with a tag (B-person, or a number that its file or task.labels names) for each word; for a string, a list
    of {start, end, label}, whose places are of whole words."""
    max_length: int = Field(default=256, ge=4)
    """Tokens kept of each row; words behind them are neither learned nor scored."""


class TokenClassification(TargetTask):
    """Fine-tunes `AutoModelForTokenClassification`; a word's tag stands at its first token."""

    Params = TokenParams
    params: TokenParams
    auto_model = "AutoModelForTokenClassification"
    augments = False

    def __init__(self, params: TokenParams, model: ModelSpec, seed: int) -> None:
        self.tags = Tags(params.label, params.labels or (), params.ordered_weights, params.label_smoothing)
        super().__init__(params, model, seed, self.tags)
        self.input_columns = (params.text,)

    @cached_property  # once per process
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.model, words=True)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        texts, raw, kept, problems = self._read(rows, with_targets)
        encodings = self._encodings(rows, [texts[i] for i in kept])
        samples = [self.tags.sample(row, texts[i], raw[i]) for i, row in zip(kept, encodings, strict=True)]
        columns = {n: list_column([s[n] for s in samples]) for n in ("input_ids", "labels", "starts", "ends")}
        columns["text"] = pa.array([_joined(texts[i]) for i in kept], pa.string())
        lengths = np.array([len(s["input_ids"]) for s in samples], np.int64)
        weights = self.targets.sample_weights([s["labels"] for s in samples])
        return Encoded(pa.table(columns), np.array(kept, np.int64), lengths, weights, tuple(problems))

    def lost_labels(self, rows: pa.Table) -> LostLabels:
        """Entities that are not of whole words, or lie across others: they are neither learned nor scored."""
        texts, raw, kept, _ = self._read(rows, True)
        lost, entities = [], 0
        for i, row in zip(kept, self._encodings(rows, [texts[i] for i in kept]), strict=True):
            if isinstance(texts[i], str):
                entities += len(raw[i])
                lost += [(i, why) for why in self.tags.lost(row, texts[i], raw[i])]
        return LostLabels(entities, tuple(lost), "entities", _REMEDY)

    def _read(
        self, rows: pa.Table, with_targets: bool
    ) -> tuple[list[Any], list[Any], list[int], list[tuple[int, str]]]:
        """Return the texts, their labels, the rows that can be used, and why others cannot."""
        texts = rows.column(self.params.text).to_pylist()
        raw = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)
        kept, problems = [], []
        for i, text in enumerate(texts):
            try:
                if not text:
                    raise ValueError(f"{self.params.text} is {'null' if text is None else 'empty'}")
                if not _is_read(text):
                    raise ValueError(
                        f"{self.params.text} is {show_value(text)}, which is neither text nor a list of words"
                    )
                if with_targets:
                    self.tags.check(raw[i], text)
                kept.append(i)
            except ValueError as problem:
                problems.append((i, str(problem)))
        return texts, raw, kept, problems

    def _encodings(self, rows: pa.Table, texts: list[Any]) -> "list[Encoding]":
        if not texts:
            return []
        kind = rows.schema.field(self.params.text).type
        split = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return self._tokenizer(  # type: ignore[no-any-return]  # untyped
            texts, is_split_into_words=split, truncation=True, max_length=self.params.max_length,
            return_offsets_mapping=True,
        ).encodings  # fmt: skip

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        read = [text for text in rows.column(self.params.text).to_pylist() if text and _is_read(text)]
        split = bool(read) and isinstance(read[0], list)
        lengths = [len(self._tokenizer(text, is_split_into_words=split)["input_ids"]) for text in read]
        return truncation_note(lengths, self.params.max_length)

    def collate(self, samples: pa.Table) -> Batch:
        """input_ids and attention_mask (B, T); labels (B, T), -100 where no word begins."""
        import torch

        labels = torch.from_numpy(pad_lists(samples.column("labels"), IGNORED))
        return Batch(text_inputs(samples, self._tokenizer.pad_token_id), labels, torch.ones(len(samples)))

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        text = row[self.params.text]
        assert isinstance(text, str | list)
        return RowInputs({self.params.text: _joined(text)})

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Words w0..w199; w0..w49 in a row are a thing, w50..w99 a place, the rest nothing."""
        rng = np.random.default_rng(seed)
        words = [rng.integers(0, 200, rng.integers(3, 20)).tolist() for _ in range(rows)]
        tags = [[("B-thing", "B-place", "O", "O")[word // 50] for word in row] for row in words]
        return pa.table({self.params.text: [[f"w{w}" for w in row] for row in words], self.params.label: tags})


def _is_read(cell: object) -> bool:
    """Return whether a cell is text or a list of words."""
    return isinstance(cell, str) or (isinstance(cell, list) and all(isinstance(word, str) for word in cell))


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else " ".join(text)


TASK = TokenClassification
