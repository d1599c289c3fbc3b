"""Reranking by a cross-encoder: a query and a document, read together, to a score that orders the documents.

Runs wherever a task runs (`base.py` says where). Pairs with a score or class of their own, which are not compared with
other documents of a query, are `text-classification` with `text_pair`. Read `documents.py` next for the rows.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task, truncation_note
from launcher.tasks.documents import PairRows, RerankingParams, example_rankings, to_places
from launcher.tasks.params import ColumnKind
from launcher.tasks.results import MetricMode, RankedDocument, RowResult, TaskMetrics
from launcher.tasks.samples import Batch, Encoded, Outputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Reranking(Task):
    """Fine-tuning of `AutoModelForSequenceClassification` with one output: the positive before its row's negatives.

    The loss of a row is the cross entropy of the positive among the row's documents (ListNet with one relevant
    document, Cao et al. 2007), and depends on no other row.
    """

    Params = RerankingParams
    params: RerankingParams
    auto_model = "AutoModelForSequenceClassification"
    augments = False

    def __init__(self, params: RerankingParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns, self.target_columns = (params.query, params.positive), (params.negatives,)
        names = ("mrr_at_10", "ndcg_at_10", "accuracy_at_1")
        self.metric_modes: Mapping[str, MetricMode] = dict.fromkeys(names, "max")
        self.prediction_schema = pa.schema({"prediction": pa.float64()})

    def columns(self, with_targets: bool = True) -> dict[str, ColumnKind]:
        return {**super().columns(with_targets), **dict.fromkeys(self.target_columns if with_targets else (), "text")}

    @cached_property
    def _rows(self) -> PairRows:
        return PairRows(self.params, load_tokenizer(self.model))

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._rows.tokenizer

    def head(self) -> dict[str, object]:
        # GPT-style models read the last token before the padding: see `text_classification.py`.
        return {"num_labels": 1, "pad_token_id": self.processor().pad_token_id or 0}

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        return self._rows.encode(rows, with_targets)

    def collate(self, samples: pa.Table) -> Batch:
        return self._rows.collate(samples)

    def forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Return the scores of each row's documents, (B, P), the positive's first; -inf where there is none."""
        import torch

        scores_B1, targets = model(**batch.inputs).logits.float(), batch.targets
        if "places" not in targets:
            return {"scores": scores_B1}
        names = [name.removeprefix("negative_") for name in targets if name.startswith("negative_")]
        negatives_S = model(**{name: targets[f"negative_{name}"] for name in names}).logits.float()[:, 0]
        rows, width = targets["is_document"].shape
        negatives_BP = to_places(negatives_S, targets["places"], rows, width - 1, -torch.inf)
        return {"scores": torch.cat([scores_B1, negatives_BP], 1)}

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs["scores"], batch.labels, reduction="none")

    def metrics(self, device: "torch.device") -> TaskMetrics:
        from launcher.tasks.metrics.ranks import CandidateMetrics

        return CandidateMetrics(device)

    def update_metrics(self, metrics: Any, outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        metrics.update(outputs["scores"], batch.targets["is_document"])

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        return pa.table({"prediction": outputs["scores"][:, 0].double().cpu().numpy()}, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        results = []
        for scores, count in zip(
            outputs["scores"][chosen].cpu(), batch.targets["is_document"][chosen].sum(1), strict=True
        ):
            # Stable, and from the end: of equal scores the positive, which is at 0, comes last.
            order = (int(count) - 1 - scores[:count].flip(0).argsort(descending=True, stable=True)).tolist()
            documents = tuple(RankedDocument(i, float(scores[p]), p == 0, p) for i, p in enumerate(order, 1))
            results.append(RowResult("rank 1", f"rank {order.index(0) + 1} of {int(count)}", documents=documents))
        return results

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        cells = [tuple(row.values()) for row in rows.select(list(self.input_columns)).to_pylist()]
        pairs = [(str(query), str(document)) for query, document in cells if query and document]
        lengths = [len(ids) for ids in self._rows.tokens(pairs)["input_ids"]]
        return truncation_note(lengths, self.params.max_length) + self.params.unread_note(rows)

    def document_text(self, row: Mapping[str, object], position: int) -> str:
        return self.params.read_documents(row)[position]

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return queries, documents of their words, and lists of one to three documents of other words."""
        queries, positives, negatives = example_rankings(rows, seed)
        columns = self.input_columns + self.target_columns
        return pa.table(dict(zip(columns, (queries, positives, negatives), strict=True)))


TASK = Reranking
