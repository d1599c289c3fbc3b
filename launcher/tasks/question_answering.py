"""Extractive question answering: the span of a context that answers a question, or that there is none.

Runs wherever a task runs (`base.py` says where). Read `answers.py` next for its parameters
and for how answers become tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.answers import AnswerParams, AnswerReader, answer_notes
from launcher.tasks.base import Task
from launcher.tasks.padding import text_inputs
from launcher.tasks.params import TrainingColumns
from launcher.tasks.results import RowResult
from launcher.tasks.samples import Batch, Encoded, Outputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from launcher.tasks.metrics.answer_spans import Prediction
    from launcher.tasks.metrics.squad import AnswerMetrics


class QuestionAnswering(Task):
    """Fine-tuning of `AutoModelForQuestionAnswering`: the first and the last token of the answer.

    A row is a question with all windows of its context. Its loss is the sum over them, its weight their number, so that
    the loss of a global batch is the mean over its windows, as transformers' `run_qa.py` computes it; windows without
    the whole answer point to the first token (CLS). Other than there, padding takes no part in the softmax.
    """

    Params = AnswerParams
    params: AnswerParams
    auto_model = "AutoModelForQuestionAnswering"
    augments = False

    def __init__(self, params: AnswerParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        # The context first: marks of the report point into the first text.
        self.input_columns, self.target_columns = (params.context, params.question), (params.answers,)
        self.column_kinds = {params.answers: "text"}
        names = ("f1", "exact_match", "has_answer_f1", "has_answer_exact", "no_answer_accuracy")
        self.metric_modes = dict.fromkeys(names, "max")
        self.prediction_schema = pa.schema({"prediction": pa.string(), "score": pa.float32(), "start": pa.int32()})

    def infer_params(self, data: TrainingColumns) -> AnswerParams:
        return self.params.with_column(data)

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.model)

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        return AnswerReader(self.params, self._tokenizer).encode(rows, with_targets)

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        return answer_notes(self.encode(rows, True).samples, self.params.max_answer_length)

    def collate(self, samples: pa.Table) -> Batch:
        """Pad the S windows of B rows to (S, T); labels are first and last token (S, 2), `row` is (S,)."""
        import torch

        from launcher.tasks.metrics.answer_spans import flat_windows

        windows = flat_windows(samples, ("input_ids", "token_type_ids", "first", "last"))
        labels = [torch.tensor(windows.column(name).to_pylist(), dtype=torch.int64) for name in ("first", "last")]
        rows = [i for i, nulls in enumerate(samples.column("null").to_pylist()) for _ in nulls]
        inputs = text_inputs(windows, self._tokenizer.pad_token_id)
        return Batch(inputs, torch.stack(labels, 1), torch.ones(len(samples)), {"row": torch.tensor(rows)})

    def head(self) -> dict[str, object]:
        # First and last token; a model that was a classifier of three classes would have three.
        return {"num_labels": 2}

    def check_model(self) -> dict[str, object]:
        return {name: fact for name, fact in super().check_model().items() if name != "classes"}

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        from launcher.tasks.metrics.answer_spans import span_losses

        mask = batch.inputs["attention_mask"]
        assert not isinstance(mask, bool)
        losses_S = span_losses(outputs, batch.labels, mask)
        return losses_S.new_zeros(len(batch.mask)).index_add(0, batch.targets["row"], losses_S)

    def metrics(self, device: "torch.device") -> "AnswerMetrics":
        from launcher.tasks.metrics.squad import AnswerMetrics

        return AnswerMetrics(device)

    def _find(self, outputs: Outputs, samples: pa.Table) -> "list[Prediction]":
        from launcher.tasks.metrics.answer_spans import Search, find_answers

        params = self.params
        threshold = params.null_threshold if params.unanswerable else None
        return find_answers(outputs, samples, Search(params.n_best, params.max_answer_length, threshold))

    def update_metrics(self, metrics: "AnswerMetrics", outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        texts = [prediction.text for prediction in self._find(outputs, samples)]
        metrics.update(texts, samples.column("answers").to_pylist(), samples.column("context").to_pylist())

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        rows = [{"prediction": p.text, "score": p.score, "start": p.start} for p in self._find(outputs, samples)]
        return pa.Table.from_pylist(rows, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        from launcher.tasks.metrics.answer_spans import to_result

        rows = samples.take(pa.array(chosen))
        # The windows of these rows, in their order: a search of all rows would be the second one of the batch.
        windows = [np.flatnonzero(batch.targets["row"].cpu().numpy() == i) for i in chosen]
        own = np.concatenate(windows)
        logits = {name: outputs[name][own] for name in ("start_logits", "end_logits")}
        truth = rows.select(["answers", "answer_starts"]).to_pylist()
        return [to_result(found, **row) for found, row in zip(self._find(logits, rows), truth, strict=True)]

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return contexts of the words w0..w99, most with one of w100..w199, which is the answer."""
        rng = np.random.default_rng(seed)
        answers, contexts = [], []
        for length in rng.integers(5, 50, rows):
            words = [f"w{w}" for w in rng.integers(0, 100, length)]
            place, answer = int(rng.integers(length)), f"w{rng.integers(100, 200)}"
            start = sum(len(word) + 1 for word in words[:place])
            has_answer = rng.random() < 0.8
            words[place:place] = [answer] * has_answer
            contexts.append(" ".join(words))
            answers.append({"text": [answer][:has_answer], "answer_start": [start][:has_answer]})
        kind = pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int32())})
        columns = {self.params.context: contexts, self.params.question: ["w0 w199"] * rows}
        return pa.table({**columns, self.params.answers: pa.array(answers, kind)})


TASK = QuestionAnswering
