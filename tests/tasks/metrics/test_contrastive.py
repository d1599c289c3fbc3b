"""Losses over a batch of embeddings, beside loops that follow their definitions term by term."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from launcher.tasks.metrics.contrastive import cosent_losses, ranking_losses

_SCALE = 20.0


def _embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def _by_hand(
    query: torch.Tensor, documents: torch.Tensor, negatives_of: dict[int, list[tuple[int, int]]]
) -> list[float]:
    """Cross entropy of each row's first document among it and the listed (row, position)."""
    losses = []
    for row, others in negatives_of.items():
        own = _SCALE * float(query[row] @ documents[row, 0])
        scores = [own] + [_SCALE * float(query[row] @ documents[other]) for other in others]
        losses.append(math.log(sum(map(math.exp, scores))) - own)
    return losses


def test_positive_is_ranked_before_all_other_documents_of_the_batch() -> None:
    query, documents = _embeddings(4, 8), _embeddings(4, 3, 8, seed=1)
    hashes = torch.arange(1, 13).view(4, 3)
    losses = ranking_losses(query, documents, torch.arange(1, 5), hashes, scale=_SCALE, symmetric=False)
    places = [(row, position) for row in range(4) for position in range(3)]
    expected = _by_hand(query, documents, {row: [p for p in places if p != (row, 0)] for row in range(4)})
    assert losses.tolist() == pytest.approx(expected, abs=1e-9)


def test_absent_documents_and_true_ones_of_other_rows_are_no_negatives() -> None:
    query, documents = _embeddings(4, 8), _embeddings(4, 2, 8, seed=1)
    # Row 1 has the positive of row 0 as a negative, row 2 has it as its positive; row 3 has the query of row 1.
    hashes = torch.tensor([[5, 0], [6, 5], [5, 7], [8, 9]])
    losses = ranking_losses(query, documents, torch.tensor([1, 2, 3, 2]), hashes, scale=_SCALE, symmetric=False)
    expected = _by_hand(
        query,
        documents,
        {
            0: [(1, 0), (2, 1), (3, 0), (3, 1)],
            1: [(0, 0), (1, 1), (2, 0), (2, 1), (3, 1)],
            2: [(1, 0), (2, 1), (3, 0), (3, 1)],
            3: [(0, 0), (1, 1), (2, 0), (2, 1), (3, 1)],
        },
    )
    assert losses.tolist() == pytest.approx(expected, abs=1e-9)


def test_symmetric_loss_is_the_mean_of_both_directions() -> None:
    query, documents = _embeddings(5, 8), _embeddings(5, 1, 8, seed=1)
    hashes = torch.arange(1, 6)[:, None]
    one_way = ranking_losses(query, documents, torch.arange(1, 6), hashes, scale=_SCALE, symmetric=False)
    other_way = ranking_losses(
        documents[:, 0], query[:, None], torch.arange(1, 6), hashes, scale=_SCALE, symmetric=False
    )
    both = ranking_losses(query, documents, torch.arange(1, 6), hashes, scale=_SCALE, symmetric=True)
    assert both.tolist() == pytest.approx(((one_way + other_way) / 2).tolist(), abs=1e-9)


def test_cosent_is_the_log_of_all_pairs_in_the_wrong_order() -> None:
    cosines = torch.tensor([0.3, 0.9, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    truth = torch.tensor([5.0, 1.0, 1.0, 3.0])
    losses = cosent_losses(cosines, truth, _SCALE)
    values = cosines.tolist()
    terms = [
        math.exp(_SCALE * (values[i] - values[j]))
        for i in range(4)
        for j in range(4)
        if float(truth[i]) < float(truth[j])
    ]
    assert float(losses.detach().mean()) == pytest.approx(math.log(1 + sum(terms)), abs=1e-9)
    # Row 1 has the second largest cosine of all and the smallest score.
    assert losses.argmax() == 1
    losses.mean().backward()
    direct = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    pairs = [direct[i] - direct[j] for i in range(4) for j in range(4) if float(truth[i]) < float(truth[j])]
    (1 + (_SCALE * torch.stack(pairs)).exp().sum()).log().backward()
    assert cosines.grad is not None
    assert direct.grad is not None
    assert torch.allclose(cosines.grad, direct.grad, atol=1e-9)


def test_cosent_of_equal_scores_is_zero() -> None:
    cosines = torch.tensor([0.3, 0.9], requires_grad=True)
    losses = cosent_losses(cosines, torch.tensor([2.0, 2.0]), _SCALE)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert cosines.grad is not None
    assert cosines.grad.tolist() == [0.0, 0.0]
