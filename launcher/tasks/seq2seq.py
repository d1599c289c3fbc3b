"""Sequence to sequence (T5, BART, Marian, two encoders as one model): translations, summaries and other rewriting.

Runs wherever a task runs (`base.py` says where). Read `text_pairs.py` next for its parameters, `models/seq2seq.py` for
the tokens and the generation, and `metrics/texts.py` for the scores.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from launcher.models.chat import IGNORED
from launcher.models.seq2seq import PairTokenizer, generate_targets, set_generation
from launcher.spec.model import ModelSpec
from launcher.tasks.base import RowInputs, RowResult, Task, truncation_note, with_replaced
from launcher.tasks.padding import list_column, pad_lists, text_inputs
from launcher.tasks.params import TrainingColumns
from launcher.tasks.samples import Batch, Encoded, Outputs
from launcher.tasks.text_pairs import PairParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from launcher.tasks.metrics.texts import TextScores


class Seq2Seq(Task):
    """Fine-tuning of `AutoModelForSeq2SeqLM`. The weight of a sample is its number of target tokens."""

    Params = PairParams
    params: PairParams
    auto_model = "AutoModelForSeq2SeqLM"
    augments = False
    generates = True
    length_keys = ("max_source_length", "max_target_length", "max_new_tokens")

    def __init__(self, params: PairParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns = (params.translation or params.source,)
        self.target_columns = () if params.translation else (params.target,)
        self.metric_modes = {**dict.fromkeys(params.score_names, "max"), "perplexity": "min", "token_accuracy": "max"}
        self.prediction_schema = pa.schema({"prediction": pa.string()})
        self.smoothing = params.label_smoothing

    def infer_params(self, data: TrainingColumns) -> PairParams:
        return self.params.with_tokenization(data)

    @cached_property
    def _pairs(self) -> PairTokenizer:
        return PairTokenizer(self.model, self.params.source_lang, self.params.target_lang)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._pairs.tokenizer

    def head(self) -> dict[str, object]:
        # `EncoderDecoderModel` is often saved without them.
        return {"decoder_start_token_id": self._pairs.tokens.start, "pad_token_id": self._pairs.tokens.pad}

    def add_adapters(self, model: "PreTrainedModel") -> None:
        set_generation(model, self._pairs.tokens, self.params.num_beams, self.params.new_tokens)

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        texts = self.params.texts(rows, with_targets)
        ids = self._pairs.source_ids(texts.sources, self.params.max_source_length)
        no_labels: list[list[int]] = [[] for _ in ids]
        labels = self._pairs.target_ids(texts.targets, self.params.max_target_length) if with_targets else no_labels
        # Scores compare with the true text, not with what is left of it as tokens.
        reference = pa.array(texts.targets, pa.string())
        samples = pa.table({"input_ids": list_column(ids), "labels": list_column(labels), "reference": reference})
        weights = np.array([len(row) for row in labels], np.float64)
        lengths = np.array([len(row) for row in ids], np.int64) + weights.astype(np.int64)
        return Encoded(samples, np.array(texts.valid_rows, np.int64), lengths, weights, texts.problems)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad input_ids, attention_mask (B, S), decoder_input_ids and labels (B, T); a label is the next token."""
        import torch

        labels = torch.from_numpy(pad_lists(samples.column("labels"), IGNORED))
        inputs = text_inputs(samples, self._pairs.tokenizer.pad_token_id)
        # Labels never reach the model, which would average the loss. Without `use_cache: False` a forward pass also
        # returns the keys and values of all layers.
        more: dict[str, torch.Tensor | bool] = {
            "decoder_input_ids": self._pairs.decoder_input_ids(labels),
            "use_cache": False,
        }
        return Batch({**inputs, **more}, labels, torch.ones(len(samples)))

    def evaluation_forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Return logits of the true tokens, and the tokens `generated` for the rows to score (-100 for others)."""
        logits = self.forward(model, batch)["logits"]
        limit = self.params.generated_rows
        rows = batch.rows or range(len(batch.mask))
        chosen = [i for i, row in enumerate(rows) if row >= 0 and (limit is None or row < limit)]
        return {"logits": logits, "generated": generate_targets(model, batch.inputs, chosen)}

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        from launcher.tasks.metrics.losses import token_losses

        return token_losses(outputs["logits"], batch.labels, smoothing=self.smoothing)

    def for_evaluation(self) -> Task:
        return with_replaced(self, smoothing=0.0) if self.smoothing else self

    def metrics(self, device: "torch.device") -> "TextScores":
        from launcher.tasks.metrics.texts import TextScores

        tokenize = self.params.tokenize
        return TextScores(device, self.params.scores, "13a" if tokenize == "auto" else tokenize)

    def update_metrics(self, metrics: "TextScores", outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        metrics.update(outputs["logits"], batch.labels)
        metrics.update_texts(self._pairs.texts(outputs["generated"]), samples.column("reference").to_pylist())

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        texts = [text or "" for text in self._pairs.texts(outputs["generated"])]
        return pa.table({"prediction": texts}, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        texts = self._pairs.texts(outputs["generated"][chosen])
        truth = samples.column("reference").take(pa.array(chosen)).to_pylist()
        missing = f"(only the first {self.params.generated_rows} rows are generated)"
        return [RowResult(true, missing if text is None else text) for true, text in zip(truth, texts, strict=True)]

    def predict(self, model: "PreTrainedModel", samples: pa.Table) -> pa.Table:
        """Return the text that the model generates for each source."""
        inputs = self.collate(samples).to(model.device).inputs
        return self.decode({"generated": generate_targets(model, inputs, range(len(samples)))}, samples)

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        texts, params = self.params.texts(rows, True), self.params
        sources = [len(row) for row in self._pairs.source_ids(texts.sources, None)]
        targets = [len(row) for row in self._pairs.target_ids(texts.targets, None)]
        return (
            *truncation_note(sources, params.max_source_length, "max_source_length"),
            *truncation_note(targets, params.max_target_length, "max_target_length"),
        )

    def display_inputs(self, row: Mapping[str, object]) -> RowInputs:
        return RowInputs({self.params.source: self.params.source_text(row)})

    def display_target(self, row: Mapping[str, object]) -> str:
        return self.params.target_text(row)

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return pairs that count: a source from one of w0..w19 on, and its target 100 words further."""
        runs = np.random.default_rng(seed).integers((0, 2), (20, 9), (rows, 2))
        texts = [[" ".join(f"w{first + i + j}" for j in range(n)) for first, n in runs] for i in (0, 100)]
        return pa.table({self.params.source: texts[0], self.params.target: texts[1]})


TASK = Seq2Seq
