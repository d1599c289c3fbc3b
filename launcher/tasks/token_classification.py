"""Token classification (NER): a tag for each word. Runs wherever a task runs (`base.py`).

Read `metrics/tags.py` next for how words and character spans become labels of tokens.
"""

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
from launcher.tasks.base import truncation_note
from launcher.tasks.metrics.tags import Tags
from launcher.tasks.padding import list_column, pad_lists, text_inputs
from launcher.tasks.params import PackedParams, is_list
from launcher.tasks.results import RowInputs
from launcher.tasks.samples import Batch, Encoded, LostLabels, read_each
from launcher.tasks.targets import LabelParams, TargetTask

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_REMEDY = "let entities begin and end with words, or take a model whose tokenizer reads smaller pieces"


class TokenParams(LabelParams, PackedParams):
    """`task:` with `type: token-classification`."""

    text: str = "tokens"
    """Column that holds a list of words, or a string whose entities are character spans."""
    label: str = "tags"
    """Column with a tag (B-person, or a number that its file or task.labels names) for each word; for a string, a list
    of {start, end, label} that begin and end with words."""
    max_length: int = Field(default=256, ge=4)
    """Tokens kept of each row, and the length of a packed sequence; words after them are neither learned nor scored."""


class TokenClassification(TargetTask):
    """Fine-tuning of `AutoModelForTokenClassification`. The label of a word is at its first token."""

    Params = TokenParams
    params: TokenParams
    auto_model = "AutoModelForTokenClassification"
    augments = False

    def __init__(self, params: TokenParams, model: ModelSpec, seed: int) -> None:
        self.tags = Tags(params.label, params.labels or (), params.ordered_weights, params.label_smoothing)
        super().__init__(params, model, seed, self.tags)
        self.input_columns = (params.text,)
        self.pack_length = params.max_length if params.packing else None

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.model, words=True)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        cells, valid_rows, problems = self._read(rows, with_targets)
        encodings = self._tokenize(rows, [text for text, _ in cells])
        samples = [self.tags.sample(t, text, label) for t, (text, label) in zip(encodings, cells, strict=True)]
        columns = {n: list_column([s[n] for s in samples]) for n in ("input_ids", "labels", "starts", "ends")}
        # `decode` cuts entities out of the text, so it travels with the sample.
        columns["text"] = pa.array([_joined(text) for text, _ in cells], pa.string())
        lengths = np.array([len(s["input_ids"]) for s in samples], np.int64)
        weights = self.targets.sample_weights([s["labels"] for s in samples])
        return Encoded(pa.table(columns), np.array(valid_rows, np.int64), lengths, weights, problems)

    def lost_labels(self, rows: pa.Table) -> LostLabels:
        """Return the entities that tags of words cannot represent: parts of words, and overlapping ones."""
        cells, valid_rows, _ = self._read(rows, True)
        encodings = self._tokenize(rows, [text for text, _ in cells])
        lost, entities = [], 0
        for i, (text, label), tokens in zip(valid_rows, cells, encodings, strict=True):
            # Only character spans can be lost: `Tags.check` has compared the tags of a list of words with its words.
            if isinstance(text, str):
                entities += len(label)
                lost += [(i, reason) for reason in self.tags.lost(tokens, text, label)]
        return LostLabels(entities, tuple(lost), "entities", _REMEDY)

    def _read(
        self, rows: pa.Table, with_targets: bool
    ) -> tuple[list[tuple[Any, Any]], list[int], tuple[tuple[int, str], ...]]:
        """Return text and label of each valid row, their positions, and (position, reason) of each other row."""
        texts = rows.column(self.params.text).to_pylist()
        labels = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)

        def read(cells: tuple[Any, Any]) -> tuple[Any, Any]:
            text, label = cells
            if not text:
                raise ValueError(f"{self.params.text} is {'null' if text is None else 'empty'}")
            if not _is_text_or_words(text):
                reason = "which is neither text nor a list of words"
                raise ValueError(f"{self.params.text} is {show_value(text)}, {reason}")
            if with_targets:
                self.tags.check(label, text)
            return cells

        return read_each(zip(texts, labels, strict=True), read)

    def _tokenize(self, rows: pa.Table, texts: list[Any]) -> "list[Encoding]":
        if not texts:
            return []
        arrow_type = rows.schema.field(self.params.text).type
        # By the type of the column, not of a cell: the tokenizer takes one flag for all texts of a call.
        is_split = is_list(arrow_type)
        # `encodings` are the objects of the tokenizers library, with words and offsets; only fast tokenizers have them.
        return self._tokenizer(  # type: ignore[no-any-return]  # untyped
            texts, is_split_into_words=is_split, truncation=True, max_length=self.params.max_length,
            return_offsets_mapping=True,
        ).encodings  # fmt: skip

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        texts = [text for text in rows.column(self.params.text).to_pylist() if text and _is_text_or_words(text)]
        is_split = bool(texts) and isinstance(texts[0], list)
        # Without truncation, or nothing could be said of what is cut off.
        lengths = [len(self._tokenizer(text, is_split_into_words=is_split)["input_ids"]) for text in texts]
        return truncation_note(lengths, self.params.max_length)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad the inputs and labels to (B, T); labels are -100 where no word begins."""
        import torch

        labels = torch.from_numpy(pad_lists(samples.column("labels"), IGNORED))
        return Batch(text_inputs(samples, self._tokenizer.pad_token_id), labels, torch.ones(len(samples)))

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        text = row[self.params.text]
        assert isinstance(text, str | list)
        return RowInputs({self.params.text: _joined(text)})

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return the words w0..w199, of which each of w0..w49 is a thing and each of w50..w99 a place."""
        rng = np.random.default_rng(seed)
        words = [rng.integers(0, 200, rng.integers(3, 20)).tolist() for _ in range(rows)]
        tags = [[("B-thing", "B-place", "O", "O")[word // 50] for word in row] for row in words]
        return pa.table({self.params.text: [[f"w{w}" for w in row] for row in words], self.params.label: tags})


def _is_text_or_words(cell: object) -> bool:
    return isinstance(cell, str) or (isinstance(cell, list) and all(isinstance(word, str) for word in cell))


def _joined(text: str | list[str]) -> str:
    # `Tags.sample` counts one character between words: the separator must stay one character.
    return text if isinstance(text, str) else " ".join(text)


TASK = TokenClassification
