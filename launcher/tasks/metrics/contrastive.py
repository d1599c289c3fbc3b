"""Losses of embeddings that compare the rows of a global batch with each other. Runs in train workers.

Defined as sentence-transformers defines them, on the global batch instead of a process's part of it.
"""

import torch
from torch.nn.functional import cross_entropy


def ranking_losses(
    query_ND: torch.Tensor,
    documents_NPD: torch.Tensor,
    query_hash_N: torch.Tensor,
    document_hash_NP: torch.Tensor,
    *,
    scale: float,
    symmetric: bool,
) -> torch.Tensor:
    """Return the multiple negatives ranking loss of each row (Henderson et al. 2017, arXiv:1705.00652).

    It is the cross entropy of the row's positive among the documents of all rows. A document with the text of the
    row's positive, and the positive of a row with the same query, are no negatives of it: they are left out.

    Args:
        query_ND: Embeddings of the queries, of length 1.
        documents_NPD: Embeddings of the documents, the positive first.
        query_hash_N: Hash of each query's tokens, int64.
        document_hash_NP: Hash of each document's tokens, int64; 0 where there is no document.
        scale: Factor of the cosine similarities, the inverse of a temperature.
        symmetric: True to also rank the queries of all rows for each positive, and take the mean of both losses.

    Returns:
        float32 (N,).
    """
    rows, width = document_hash_NP.shape
    positive_hash_N = document_hash_NP[:, 0]
    is_other = ~torch.eye(rows, dtype=torch.bool, device=query_ND.device)
    has_same_query = query_hash_N[:, None] == query_hash_N
    is_masked = document_hash_NP == positive_hash_N[:, None, None]
    is_masked[:, :, 0] = (is_masked[:, :, 0] | has_same_query) & is_other
    is_masked |= document_hash_NP == 0
    scores = scale * query_ND @ documents_NPD.reshape(rows * width, -1).T
    own = torch.arange(rows, device=query_ND.device)
    scores = scores.masked_fill(is_masked.view(rows, -1), -torch.inf)
    losses = cross_entropy(scores, own * width, reduction="none")
    if not symmetric:
        return losses
    is_masked = ((positive_hash_N[:, None] == positive_hash_N) | has_same_query) & is_other
    scores = (scale * documents_NPD[:, 0] @ query_ND.T).masked_fill(is_masked, -torch.inf)
    return (losses + cross_entropy(scores, own, reduction="none")) / 2


def cosent_losses(cosines_N: torch.Tensor, truth_N: torch.Tensor, scale: float) -> torch.Tensor:
    """Return each row's part of the CoSENT loss, whose mean over the rows is the loss of the batch.

    The loss is log(1 + sum of exp(scale * (cosine of i - cosine of j))) over all pairs of rows in which the truth of i
    is below that of j: only the order of the true scores counts. A row's part is proportional to its terms.

    Args:
        cosines_N: Cosine similarities.
        truth_N: True scores, in any range.
        scale: Factor of the cosines.

    Returns:
        float32 (N,).
    """
    # N x N in fp32: 4 MB for a global batch of 1,024.
    is_below = truth_N[:, None] < truth_N
    terms = (scale * (cosines_N[:, None] - cosines_N)).masked_fill(~is_below, -torch.inf)
    loss = torch.cat([terms.new_zeros(1), terms.flatten()]).logsumexp(0)
    # Detached: the gradient must be that of the loss, not of how it is divided among the rows for the report.
    shares = (terms - loss).exp().detach()
    shares = shares.sum(0) + shares.sum(1)
    # Without any pair the loss is 0, and so are the shares.
    return len(truth_N) * loss * shares / shares.sum().clamp(min=1e-30)
