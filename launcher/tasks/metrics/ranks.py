"""Counts of the ranks at which queries have their positive document, and the metrics that follow. Train workers."""

import math

import torch
import torch.distributed as dist

from launcher.tasks.results import TaskMetrics

CUTOFF = 10
"""Last rank that counts."""
_MAX_CANDIDATES = 10_000
"""Rows with more candidates count as having so many: what a random order reaches is hardly above 0."""


class RankCounts:
    """Number of queries by the rank of their positive: 1 to 10, and below.

    Whole numbers, so that the metrics have the same bits for any number of workers.

    Args:
        device: Device of the counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(CUTOFF + 2, dtype=torch.int64, device=device)

    def update(self, ranks_B: torch.Tensor) -> None:
        """Add queries with these ranks, int64, from 1."""
        ranks_B = ranks_B.to(self._counts.device).clamp(max=CUTOFF + 1)
        self._counts += torch.bincount(ranks_B, minlength=CUTOFF + 2)

    def compute(self) -> dict[str, float]:
        """Merge the counts of all ranks and return recall, MRR and NDCG. Collective; call it once."""
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        counts = self._counts.tolist()
        return at_ranks(counts[1 : CUTOFF + 1], max(sum(counts), 1))


class CandidateMetrics(TaskMetrics):
    """MRR, NDCG and accuracy of the positive among the candidates of its own row.

    Args:
        device: Device of the states.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = RankCounts(device)
        # Rows by their number of candidates: what a random order would reach follows from it.
        self._sizes = torch.zeros(_MAX_CANDIDATES + 1, dtype=torch.int64, device=device)

    def update(self, scores_BP: torch.Tensor, is_document_BP: torch.Tensor) -> None:
        """Add B rows: scores with the positive's first, and which of them are of a document."""
        # Counted from the end: NaN, which is below nothing, has the last rank, and ties count against the positive.
        sizes_B = is_document_BP.sum(1)
        self._counts.update(sizes_B - ((scores_BP < scores_BP[:, :1]) & is_document_BP).sum(1))
        self._sizes += torch.bincount(sizes_B.clamp(max=_MAX_CANDIDATES), minlength=_MAX_CANDIDATES + 1)

    def compute(self) -> dict[str, float]:
        """Merge the counts of all ranks and return the metrics, MRR first. Collective."""
        if dist.is_initialized():
            dist.all_reduce(self._sizes)
        return _of_candidates(self._counts.compute())

    def baseline(self) -> dict[str, float]:
        """Return the expected scores of a random order of each row's candidates."""
        sizes = self._sizes.tolist()
        parts = [(rows, chance(size)) for size, rows in enumerate(sizes) if rows]
        names = chance(1)
        mean = {name: sum(rows * part[name] for rows, part in parts) / max(sum(sizes), 1) for name in names}
        return _of_candidates(mean)


def _of_candidates(values: dict[str, float]) -> dict[str, float]:
    return {
        "mrr_at_10": values["mrr_at_10"],
        "ndcg_at_10": values["ndcg_at_10"],
        "accuracy_at_1": values["recall_at_1"],
    }


def at_ranks(counts: list[float], queries: float) -> dict[str, float]:
    """Return recall at 1 and 10, mean reciprocal rank and normalised discounted cumulative gain at 10.

    Args:
        counts: Number of queries whose only relevant document has rank 1, 2 ... 10.
        queries: Number of all queries.
    """
    return {
        "recall_at_1": counts[0] / queries,
        "recall_at_10": sum(counts) / queries,
        "mrr_at_10": sum(count / rank for rank, count in enumerate(counts, 1)) / queries,
        # With one relevant document the ideal gain is 1, so the gain is the normalised one.
        "ndcg_at_10": sum(count / math.log2(1 + rank) for rank, count in enumerate(counts, 1)) / queries,
    }


def chance(candidates: int) -> dict[str, float]:
    """Return the expected metrics of a random order of so many candidates, one of which is relevant."""
    return at_ranks([float(rank <= candidates) for rank in range(1, CUTOFF + 1)], max(candidates, 1))
