"""Metrics of the positive's rank among the candidates of its row."""

import math

import pytest
import torch

from launcher.tasks.metrics.ranks import CandidateMetrics


def test_metrics_of_candidates_follow_from_the_ranks_of_the_positives() -> None:
    metrics = CandidateMetrics(torch.device("cpu"))
    none = -math.inf
    metrics.update(
        torch.tensor([[3.0, 1.0, none], [1.0, 2.0, 0.0], [1.0, 1.0, none]]),
        torch.tensor([[True, True, False], [True, True, True], [True, True, False]]),
    )
    metrics.update(torch.tensor([[0.0, *[1.0] * 11]]), torch.ones(1, 12, dtype=torch.bool))
    # Ranks 1, 2, 2 (a tie counts against the positive) and 12.
    assert metrics.compute() == pytest.approx(
        {"mrr_at_10": 2 / 4, "ndcg_at_10": (1 + 2 / math.log2(3)) / 4, "accuracy_at_1": 1 / 4}
    )
    assert metrics.baseline()["accuracy_at_1"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 12) / 4)


def test_a_row_whose_scores_are_nan_is_last() -> None:
    metrics = CandidateMetrics(torch.device("cpu"))
    metrics.update(torch.full((1, 3), math.nan), torch.ones(1, 3, dtype=torch.bool))
    assert metrics.compute()["mrr_at_10"] == pytest.approx(1 / 3)
