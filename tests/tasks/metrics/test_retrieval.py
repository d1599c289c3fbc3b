"""Retrieval over a whole corpus: beside a plain sort of each query's documents, and however the rows are cut."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from launcher.tasks.metrics.retrieval import RetrievalMetrics
from launcher.tasks.results import RowResult
from tests.support.worker_group import run_group

_ROWS, _WIDTH, _SIZE = 61, 3, 6


def _split() -> dict[str, torch.Tensor]:
    """Return embeddings and hashes of a split with repeated documents, repeated queries and rows without negatives."""
    rng = np.random.default_rng(0)
    texts = normalize(torch.from_numpy(rng.normal(size=(140, _SIZE))).float(), dim=-1)
    # Fewer texts than places: many are drawn twice. Hash 0 marks a place without a document.
    document_hash = rng.integers(1, 140, (_ROWS, _WIDTH))
    document_hash[::4, 1:] = 0
    query_hash = rng.integers(1000, 1040, _ROWS)
    noise = torch.from_numpy(rng.normal(size=(_ROWS, _SIZE))).float() * 0.3
    # Rows with the same query have the same embedding.
    first = [int(np.flatnonzero(query_hash == key)[0]) for key in query_hash]
    query = normalize(texts[document_hash[first, 0]] + noise[first], dim=-1)
    return {
        "query": query,
        "documents": texts[document_hash],
        "query_hash": torch.from_numpy(query_hash),
        "document_hash": torch.from_numpy(document_hash),
    }


def _update(metrics: RetrievalMetrics, split: dict[str, torch.Tensor], rows: Sequence[int]) -> None:
    metrics.update(*(split[name][list(rows)] for name in split), np.array(rows, np.int64))


def _ranks_by_sorting(split: dict[str, torch.Tensor]) -> tuple[list[int], int]:
    """Return the rank of each row's positive, and the size of the corpus, by the plainest code there is."""
    corpus = {}
    for hashes, vectors in zip(split["document_hash"].tolist(), split["documents"], strict=True):
        corpus |= {key: vector.double() for key, vector in zip(hashes, vectors, strict=True) if key}
    answers: dict[int, set[int]] = {}
    for key, hashes in zip(split["query_hash"].tolist(), split["document_hash"].tolist(), strict=True):
        answers.setdefault(key, set()).add(hashes[0])
    ranks = []
    for row in range(_ROWS):
        own, key = int(split["document_hash"][row, 0]), int(split["query_hash"][row])
        competing = [text for text in corpus if text == own or text not in answers[key]]
        query = split["query"][row].double()
        ranks.append(sorted(competing, key=lambda text: -float(query @ corpus[text])).index(own) + 1)
    return ranks, len(corpus)


def test_metrics_equal_those_of_sorting_the_corpus_for_each_query() -> None:
    split = _split()
    metrics = RetrievalMetrics(torch.device("cpu"))
    for begin in range(0, _ROWS, 7):
        _update(metrics, split, range(begin, min(begin + 7, _ROWS)))
    ranks, size = _ranks_by_sorting(split)
    assert len(set(ranks)) > 5
    assert metrics.compute() == pytest.approx(
        {
            "recall_at_1": np.mean([rank == 1 for rank in ranks]),
            "recall_at_10": np.mean([rank <= 10 for rank in ranks]),
            "mrr_at_10": np.mean([1 / rank if rank <= 10 else 0 for rank in ranks]),
            "ndcg_at_10": np.mean([1 / math.log2(1 + rank) if rank <= 10 else 0 for rank in ranks]),
        }
    )
    assert metrics.baseline()["recall_at_10"] == pytest.approx(10 / size)
    row = int(np.argmax(ranks))
    result = metrics.complete(row, RowResult("rank 1", ""))
    assert result.prediction == f"rank {ranks[row]} of {size}"
    assert [document.rank for document in result.documents[-1:]] == [ranks[row]]
    assert [document.is_true for document in result.documents].count(True) == 1
    for document in result.documents:
        assert document.row is not None
        vector = split["documents"][document.row, document.position]
        assert document.score == pytest.approx(float(split["query"][row] @ vector), abs=1e-6)


def _metrics_of_ranks() -> tuple[dict[str, float], str]:
    split, rank, workers = _split(), dist.get_rank(), dist.get_world_size()
    metrics = RetrievalMetrics(torch.device("cpu"))
    # The last rank gets nothing: a split may have fewer rows than there are workers.
    rows = [*range(rank, _ROWS, max(workers - 1, 1))] if rank < max(workers - 1, 1) else []
    for row in reversed(rows):
        _update(metrics, split, [row])
    values = metrics.compute()
    return values, metrics.complete(rows[0], RowResult("rank 1", "")).prediction if rows else ""


def test_metrics_are_the_same_for_any_number_of_workers() -> None:
    alone = run_group(1, _metrics_of_ranks)
    assert 0 < alone[0]["mrr_at_10"] < 1
    assert run_group(3, _metrics_of_ranks) == alone


def test_ties_and_nan_count_against_the_positive() -> None:
    for value in (1.0, math.nan):
        vectors = torch.full((3, 1, 1), value)
        metrics = RetrievalMetrics(torch.device("cpu"))
        metrics.update(vectors[:, 0], vectors, torch.tensor([1, 2, 3]), torch.tensor([[1], [2], [3]]), np.arange(3))
        assert metrics.compute()["recall_at_1"] == 0.0
        assert metrics.complete(1, RowResult("rank 1", "")).prediction == "rank 3 of 3"
