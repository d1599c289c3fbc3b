"""Sentence embeddings: texts to vectors whose cosine says how similar they are, for search and similarity.

Runs wherever a task runs (`base.py` says where). Read `documents.py` next for parameters and rows, `models/pooling.py`
for the vectors, and `metrics/contrastive.py` for the losses.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from launcher.models.pooling import embed, sentence_transformer_files
from launcher.models.pretrained import load_tokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks.base import Task, truncation_note
from launcher.tasks.documents import EmbeddingParams, EmbeddingRows, example_texts, to_places
from launcher.tasks.params import ColumnKind
from launcher.tasks.results import MetricMode, RowResult, TaskMetrics
from launcher.tasks.samples import Batch, Encoded, Outputs

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_RANKED = ("query", "documents", "query_hash", "document_hash")


class SentenceEmbedding(Task):
    """Fine-tuning of `AutoModel` with pooling, to vectors of length 1; the export loads in sentence-transformers too.

    Texts with the same tokens are one: a row never takes what answers its query for a negative.
    """

    Params = EmbeddingParams
    params: EmbeddingParams
    auto_model = "AutoModel"
    augments = False

    def __init__(self, params: EmbeddingParams, model: ModelSpec, seed: int) -> None:
        self.params, self.model, self.seed = params, model, seed
        self.input_columns, self.target_columns = params.texts[:1], params.texts[1:]
        names: tuple[str, ...] = ("recall_at_1", "recall_at_10", "mrr_at_10", "ndcg_at_10")
        if params.is_scored:
            self.input_columns, self.target_columns, names = params.texts, (params.score,), ("spearman", "pearson")
        self.metric_modes: Mapping[str, MetricMode] = dict.fromkeys(names, "max")
        self.prediction_schema = pa.schema({"embedding": pa.list_(pa.float32())})
        self.couples = params.loss != "cosine"

    def columns(self, with_targets: bool = True) -> dict[str, ColumnKind]:
        return {**super().columns(with_targets), **dict.fromkeys(self.params.texts, "text")}

    def prediction_inputs(self, names: Sequence[str]) -> tuple[str, ...]:
        return (self.params.prediction_column(names),)

    @cached_property
    def _rows(self) -> EmbeddingRows:
        return EmbeddingRows(self.params, load_tokenizer(self.model))

    def processor(self) -> "PreTrainedTokenizerBase":
        return self._rows.tokenizer

    def encode(self, rows: pa.Table, with_targets: bool, noise: np.ndarray | None = None) -> Encoded:
        return self._rows.encode(rows, with_targets)

    def collate(self, samples: pa.Table) -> Batch:
        return self._rows.collate(samples)

    def forward(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Return embeddings of the queries (B, D), and of their documents (B, P, D) where the batch has them."""

        def run(tokens: Mapping[str, Any]) -> "torch.Tensor":
            return embed(model(**tokens).last_hidden_state, tokens["attention_mask"], self.params.pooling)

        query_BD, targets = run(batch.inputs), batch.targets
        if "places" not in targets:
            return {"query": query_BD}
        # A second forward pass: padding questions to the length of their answers would cost more than it.
        documents_SD = run({name: targets[f"document_{name}"] for name in ("input_ids", "attention_mask")})
        rows, places = targets["document_hash"].shape
        documents_BPD = to_places(documents_SD, targets["places"], rows, places, 0.0)
        others = {name: targets[name] for name in ("query_hash", "document_hash", "score")}
        return {"query": query_BD, "documents": documents_BPD, **others}

    def coupled_losses(self, outputs: Outputs) -> "torch.Tensor":
        from launcher.tasks.metrics.contrastive import cosent_losses, ranking_losses

        if self.params.is_scored:
            return cosent_losses(_cosines(outputs), outputs["score"], self.params.scale)
        query, documents, query_hash, document_hash = (outputs[name] for name in _RANKED)
        scale, symmetric = self.params.scale, self.params.symmetric
        return ranking_losses(query, documents, query_hash, document_hash, scale=scale, symmetric=symmetric)

    def sample_losses(self, outputs: Outputs, batch: Batch) -> "torch.Tensor":
        """Return the squared error of each cosine similarity."""
        return (_cosines(outputs) - outputs["score"] / self.params.max_score) ** 2

    def metrics(self, device: "torch.device") -> TaskMetrics:
        from launcher.tasks.metrics.retrieval import RetrievalMetrics
        from launcher.tasks.metrics.similarity import SimilarityMetrics

        return SimilarityMetrics(device) if self.params.is_scored else RetrievalMetrics(device)

    def update_metrics(self, metrics: Any, outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        if self.params.is_scored:
            metrics.update(_cosines(outputs), outputs["score"])
        else:
            metrics.update(*(outputs[name] for name in _RANKED), samples.column("__row").to_numpy())

    def decode(self, outputs: Outputs, samples: pa.Table) -> pa.Table:
        vectors = outputs["query"].float().cpu().numpy()
        offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
        return pa.table({"embedding": pa.ListArray.from_arrays(offsets, vectors.ravel())}, self.prediction_schema)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Sequence[int]) -> list[RowResult]:
        if not self.params.is_scored:
            # The rank is known once the whole split is: `RetrievalMetrics.complete`.
            return [RowResult("rank 1", "") for _ in chosen]
        pairs = zip(outputs["score"][chosen].tolist(), _cosines(outputs)[chosen].tolist(), strict=True)
        return [RowResult(f"{score:.4g}", f"cosine {cosine:.3f}") for score, cosine in pairs]

    def remarks(self, rows: pa.Table, unread: Sequence[str] = ()) -> tuple[str, ...]:
        cells = [cell for row in rows.select(list(self.params.texts[:2])).to_pylist() for cell in row.values()]
        lengths = [len(ids) for ids in self._rows.tokens([str(cell) for cell in cells if cell])]
        return truncation_note(lengths, self.params.max_length) + self.params.unread_note(rows)

    def document_text(self, row: Mapping[str, object], position: int) -> str:
        return self.params.read_documents(row)[position]

    def export_files(self, config: "PretrainedConfig") -> Mapping[str, str]:
        prompts = {"query": self.params.query_prefix, "document": self.params.document_prefix}
        size: int = config.get_text_config().hidden_size
        return sentence_transformer_files(size, self.params.pooling, self.params.max_length, prompts)

    def example_rows(self, rows: int, seed: int) -> pa.Table:
        """Return texts of five words, documents that share some of them, and scores that say how many."""
        queries, documents, shared = example_texts(rows, seed)
        scores = [number / 5 * self.params.max_score for number in shared]
        return pa.table(
            dict(zip((*self.params.texts[:2], self.params.score), (queries, documents, scores), strict=True))
        )


def _cosines(outputs: Outputs) -> "torch.Tensor":
    """Return the cosine similarity of each pair, float32 (B,); embeddings have length 1."""
    return (outputs["query"] * outputs["documents"][:, 0]).sum(-1)


TASK = SentenceEmbedding
