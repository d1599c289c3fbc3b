"""Text classification: one or two text columns to one class, several classes, or a number.

The shortest whole task: read it as the example for your own. Runs wherever a task runs (`base.py` says where).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from launcher.formatting import as_text
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.base import truncation_note
from launcher.tasks.metrics.labels import Kind, Labels
from launcher.tasks.padding import list_column, text_inputs
from launcher.tasks.samples import Batch, Encoded, read_each
from launcher.tasks.targets import LabelParams, TargetTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextParams(LabelParams):
    """`task:` with `type: text-classification`."""

    text: str = "text"
    """Column that holds the text."""
    text_pair: str | None = None
    """Column that holds a second text (premise and hypothesis, question and answer)."""
    label: str = "label"
    """Column that holds the label: an int or string; a list of them for multi-label; a number for regression."""
    kind: Kind = "single-label"
    """One class per row, any number of classes per row, or a number."""
    max_length: int = Field(default=128, ge=4)
    """Tokens kept of each row; the rest is cut off."""


class TextClassification(TargetTask):
    """Fine-tuning of `AutoModelForSequenceClassification`."""

    Params = TextParams
    params: TextParams
    auto_model = "AutoModelForSequenceClassification"
    augments = False

    def __init__(self, params: TextParams, model: ModelSpec, seed: int) -> None:
        names, weights = params.labels or (), params.ordered_weights
        self.labels = Labels(params.label, params.kind, names, weights, params.label_smoothing)
        super().__init__(params, model, seed, self.labels)
        self.input_columns = tuple(c for c in (params.text, params.text_pair) if c)

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.model)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        inputs = [rows.column(name).to_pylist() for name in self.input_columns]
        labels = rows.column(self.params.label).to_pylist() if with_targets else [None] * len(rows)

        def read(row: tuple[object, ...]) -> tuple[list[str], list[float]]:
            *cells, label = row
            texts = [as_text(cell, name) for cell, name in zip(cells, self.input_columns, strict=True)]
            return texts, self.labels.target(label) if with_targets else []

        pairs, valid_rows, problems = read_each(zip(*inputs, labels, strict=True), read)
        targets = [target for _, target in pairs]
        columns = [list(texts) for texts in zip(*(texts for texts, _ in pairs), strict=True)]
        # `text_inputs` makes the attention mask from the lengths: as lists it takes a third of the time of encoding.
        limits = {"truncation": True, "max_length": self.params.max_length, "return_attention_mask": False}
        tokens = self._tokenizer(*columns, **limits) if valid_rows else {}
        # The tokenizer returns token types only for models that read them.
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        samples = {name: list_column(tokens[name]) for name in names}
        # One column type for all kinds of labels, an empty list without targets.
        samples["target"] = pa.array(targets, pa.list_(pa.float64()))
        lengths = np.array([len(ids) for ids in tokens["input_ids"]] if valid_rows else [], np.int64)
        weights = self.targets.sample_weights(targets)
        return Encoded(pa.table(samples), np.array(valid_rows, np.int64), lengths, weights, problems)

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        cells = rows.select(list(self.input_columns)).to_pylist()
        texts = [[str(cell) for cell in row.values()] for row in cells if all(row.values())]
        # Without truncation, or nothing could be said of what is cut off.
        lengths = [len(self._tokenizer(*pair, return_attention_mask=False)["input_ids"]) for pair in texts]
        return truncation_note(lengths, self.params.max_length)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad input_ids, attention_mask (and token_type_ids) to (B, T); labels are (B,), multi-label (B, classes)."""
        import torch

        inputs = text_inputs(samples, self._tokenizer.pad_token_id)
        return Batch(inputs, self.labels.tensor(samples.column("target")), torch.ones(len(samples)))

    def head(self) -> dict[str, object]:
        # GPT-style models classify from the last token before the padding: without this entry transformers refuses a
        # batch of more than one row. It must be the id that `text_inputs` pads with, or they read the wrong token.
        return super().head() | {"pad_token_id": self._tokenizer.pad_token_id or 0}

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return texts of the words w0..w99 (class a) or w100..w199 (class b)."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, rows)
        words = [rng.integers(0, 100, rng.integers(3, 20)) + 100 * label for label in labels]
        texts = [" ".join(f"w{w}" for w in row) for row in words]
        return pa.table({self.params.text: texts, self.params.label: [("a", "b")[i] for i in labels]})


TASK = TextClassification
