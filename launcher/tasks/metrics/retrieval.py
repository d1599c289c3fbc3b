"""Retrieval over the whole corpus of a split: exact, for any number of workers. Runs in train workers.

The corpus is every document of the split once, positives and negatives; two documents with the same tokens are one.
Each rank keeps the embeddings of its rows in memory of the host (4 bytes a number: 150 MB for 100,000 texts of 384
numbers); at the end the documents are gathered, and each rank ranks the corpus for its own queries.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torchmetrics.utilities.distributed import gather_all_tensors

from launcher.tasks.metrics.ranks import RankCounts, chance
from launcher.tasks.results import RankedDocument, RowResult, TaskMetrics

_NEIGHBOURS = 5
"""Documents that the report displays of a query."""
_CHUNK = 1 << 25
"""Similarities that are computed at once: 128 MiB."""


@dataclass(frozen=True)
class _Corpus:
    """Distinct documents of a split, sorted by hash.

    Args:
        embeddings: Embeddings, float32 (C, D), on the device.
        keys: Hash, row and position in the row, int64 (C, 3).
    """

    embeddings: torch.Tensor
    keys: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Ranked:
    """Result of B queries of this rank, as arrays: objects for each document of each query would fill the memory."""

    rows: npt.NDArray[np.int64]
    positives: npt.NDArray[np.int64]
    """Position of each query's positive in the corpus."""
    ranks: npt.NDArray[np.int64]
    truth: npt.NDArray[np.float32]
    """Similarity of the positive."""
    values: npt.NDArray[np.float32]
    """Largest similarities (B, k), and the positions of those documents (`indices`)."""
    indices: npt.NDArray[np.int64]

    def documents(self, i: int, keys: npt.NDArray[np.int64]) -> tuple[RankedDocument, ...]:
        """Return the first documents of a query, and its positive after them if it is none of them."""
        positive = int(self.positives[i])
        # A document without a rank is the positive of another row with the same query.
        listed = [
            (p, v, int(c)) for p, (v, c) in enumerate(zip(self.values[i], self.indices[i], strict=True), 1) if v > -1e9
        ]
        if positive not in self.indices[i]:
            listed.append((int(self.ranks[i]), self.truth[i], positive))
        return tuple(
            RankedDocument(place, float(value), c == positive, int(keys[c, 2]), int(keys[c, 1]))
            for place, value, c in listed
        )


class RetrievalMetrics(TaskMetrics):
    """Recall, mean reciprocal rank and NDCG of each query's own positive.

    Documents that are as similar as the positive rank before it. Positives of other rows with the same query are left
    out of its ranking: they are right too.

    Args:
        device: Device on which similarities are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = RankCounts(device)
        self._queries: list[torch.Tensor] = []
        # Row, hash of the query, hash of the positive: int64 (B, 3).
        self._query_keys: list[npt.NDArray[np.int64]] = []
        self._documents: list[torch.Tensor] = []
        # Hash, row, position in the row: int64 (S, 3).
        self._document_keys: list[npt.NDArray[np.int64]] = []
        self._seen: set[int] = set()
        self._corpus = _Corpus(torch.zeros(0, 0), np.zeros((0, 3), np.int64))
        self._ranked: list[_Ranked] = []

    def update(
        self,
        query_BD: torch.Tensor,
        documents_BPD: torch.Tensor,
        query_hash_B: torch.Tensor,
        document_hash_BP: torch.Tensor,
        rows: npt.NDArray[np.int64],
    ) -> None:
        """Add B rows: embeddings, hashes (0 where there is no document) and row ids."""
        hashes = document_hash_BP.cpu().numpy()
        self._queries.append(query_BD.float().cpu())
        self._query_keys.append(np.stack([rows, query_hash_B.cpu().numpy(), hashes[:, 0]], 1))
        new = []
        for place, key in enumerate(hashes.ravel().tolist()):
            # Each document once: a corpus with a thousand questions on one page holds the page once.
            if key != 0 and key not in self._seen:
                self._seen.add(key)
                new.append(place)
        row, position = np.divmod(np.array(new, np.int64), hashes.shape[1])
        self._document_keys.append(np.stack([hashes.ravel()[new], rows[row], position], 1))
        self._documents.append(documents_BPD.flatten(0, 1)[new].float().cpu())

    def compute(self) -> dict[str, float]:
        """Gather the corpus, rank it for each query, and return the metrics, recall at 1 first. Collective."""
        empty = torch.zeros(0, 3, dtype=torch.int64)
        own = torch.cat([empty, *map(torch.from_numpy, self._query_keys)])
        # Four collectives, of everything that the ranks hold but the queries' embeddings.
        pairs = self._gather(own)[:, 1:].cpu().numpy()
        keys = self._gather(torch.cat([empty, *map(torch.from_numpy, self._document_keys)])).cpu().numpy()
        corpus = self._gather(torch.cat(self._documents) if self._documents else torch.zeros(0, 0))
        # Sorted by hash, so that the corpus has one order however the rows were assigned to ranks.
        order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))
        _, first = np.unique(keys[order, 0], return_index=True)
        chosen = order[first]
        self._corpus = _Corpus(corpus[torch.from_numpy(chosen).to(corpus.device)], keys[chosen])
        siblings = _positives_of_repeated_queries(pairs, self._corpus.keys[:, 0])
        size = max(1, _CHUNK // max(len(self._corpus.keys), 1))
        queries = torch.cat(self._queries) if self._queries else torch.zeros(0, 0)
        for begin in range(0, len(own), size):
            part = own[begin : begin + size].numpy()
            self._ranked.append(_rank(queries[begin : begin + size], part, self._corpus, siblings))
            self._counts.update(torch.from_numpy(self._ranked[-1].ranks))
        return self._counts.compute()

    def baseline(self) -> dict[str, float]:
        """Return the expected scores of a random order of the corpus."""
        return chance(len(self._corpus.keys))

    def complete(self, row: int, result: RowResult) -> RowResult:
        for ranked in self._ranked:
            for i in np.flatnonzero(ranked.rows == row):
                text = f"rank {ranked.ranks[i]:,} of {len(self._corpus.keys):,}"
                return replace(result, prediction=text, documents=ranked.documents(int(i), self._corpus.keys))
        raise KeyError(f"row {row} was not scored on this rank")

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return tensors (n, D) of all ranks as one on the device. Collective."""
        own = own.to(self._device)
        if not dist.is_initialized():
            return own
        # A rank without rows does not know D, and `cat` takes no (0, 0).
        filled = [part for part in gather_all_tensors(own) if len(part)]
        return torch.cat(filled) if filled else own


def _rank(
    query_BD: torch.Tensor,
    own: npt.NDArray[np.int64],
    corpus: _Corpus,
    siblings: dict[int, npt.NDArray[np.int64]],
) -> _Ranked:
    """Rank the corpus for some queries, given their keys."""
    positives = np.searchsorted(corpus.keys[:, 0], own[:, 2])
    scores = query_BD.to(corpus.embeddings.device) @ corpus.embeddings.T
    for i, query in enumerate(own[:, 1].tolist()):
        if query in siblings:
            others = siblings[query][siblings[query] != positives[i]]
            scores[i, torch.from_numpy(others).to(scores.device)] = -torch.inf
    truth = scores.gather(1, torch.from_numpy(positives).to(scores.device)[:, None])
    # Counted from the end: NaN, which is below nothing, has the last rank, and ties count against the positive.
    ranks = len(corpus.keys) - (scores < truth).sum(1)
    best = scores.topk(min(_NEIGHBOURS, len(corpus.keys)), dim=1)
    columns = (ranks, truth[:, 0], best.values, best.indices)
    return _Ranked(own[:, 0], positives, *(column.cpu().numpy() for column in columns))


def _positives_of_repeated_queries(
    pairs: npt.NDArray[np.int64], corpus: npt.NDArray[np.int64]
) -> dict[int, npt.NDArray[np.int64]]:
    """Return the positions in the corpus of the positives of each query that several rows have with different ones.

    Args:
        pairs: Hashes of each row's query and positive, (n, 2).
        corpus: Hashes of the corpus, sorted.
    """
    # Sorted by query: the positives of a query are neighbours.
    unique = np.unique(pairs, axis=0)
    queries, begins, counts = np.unique(unique[:, 0], return_index=True, return_counts=True)
    return {
        int(queries[i]): np.searchsorted(corpus, unique[begins[i] : begins[i] + counts[i], 1])
        for i in np.flatnonzero(counts > 1)
    }
