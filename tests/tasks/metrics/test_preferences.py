"""Losses and metrics of preferences against the papers' formulas, written out number by number."""

import math

import pytest
import torch

from launcher.tasks.metrics.preferences import (
    JudgedMetrics,
    PairMetrics,
    dpo_losses,
    ipo_losses,
    kto_losses,
    odds_ratio_losses,
    reward_losses,
    simpo_losses,
)

_MARGINS = (-30.0, -2.0, -0.1, 0.0, 0.3, 4.0, 50.0)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_log_probability_of_the_preference(smoothing: float) -> None:
    losses = dpo_losses(torch.tensor(_MARGINS), 0.3, smoothing).tolist()
    for margin, loss in zip(_MARGINS, losses, strict=True):
        right, wrong = _sigmoid(0.3 * margin), _sigmoid(-0.3 * margin)
        assert loss == pytest.approx(-(1 - smoothing) * math.log(right) - smoothing * math.log(wrong), rel=1e-5)


def test_ipo_is_the_squared_distance_to_the_target_margin() -> None:
    losses = ipo_losses(torch.tensor(_MARGINS), 0.25).tolist()
    assert losses == pytest.approx([(margin - 2) ** 2 for margin in _MARGINS], rel=1e-5)


def test_simpo_asks_for_a_margin() -> None:
    losses = simpo_losses(torch.tensor(_MARGINS), 2.0, 0.5).tolist()
    assert losses == pytest.approx([-math.log(_sigmoid(2 * m - 0.5)) for m in _MARGINS], rel=1e-5, abs=1e-7)
    assert reward_losses(torch.tensor([0.7])).item() == pytest.approx(-math.log(_sigmoid(0.7)))


def test_orpo_compares_odds() -> None:
    chosen, rejected = (-0.01, -0.5, -0.69, -0.7, -5.0), (-0.3, -0.2, -3.0, -0.7, -0.001)
    losses = odds_ratio_losses(torch.tensor(chosen), torch.tensor(rejected), 0.1).tolist()
    for c, r, loss in zip(chosen, rejected, losses, strict=True):
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (c, r)]
        ratio = math.log(odds[0]) - math.log(odds[1])
        assert loss == pytest.approx(-0.1 * math.log(_sigmoid(ratio)), rel=1e-4)


def test_odds_have_finite_gradients_at_both_ends() -> None:
    means = torch.tensor([-1e-9, 0.0, -0.6931472, -200.0], requires_grad=True)
    odds_ratio_losses(means, means.detach().flip(0), 0.1).sum().backward()
    assert means.grad is not None
    assert bool(means.grad.isfinite().all())


def test_kto_compares_each_row_with_the_divergence_of_the_batch() -> None:
    ratios, mismatched, labels = [0.5, -1.0, 2.0], [0.3, 1.5, -0.3], [1, 0, 0]
    losses = kto_losses(torch.tensor(ratios), torch.tensor(mismatched), torch.tensor(labels), 0.4, (1.5, 0.5)).tolist()
    assert losses == pytest.approx(
        [1.5 * (1 - _sigmoid(0.4 * 0.0)), 0.5 * (1 - _sigmoid(0.4 * 1.5)), 0.5 * (1 - _sigmoid(0.4 * -1.5))], rel=1e-5
    )


def test_the_divergence_is_not_negative_and_has_no_gradient() -> None:
    mismatched = torch.tensor([-3.0, -1.0], requires_grad=True)
    ratios = torch.tensor([1.0, 1.0], requires_grad=True)
    losses = kto_losses(ratios, mismatched, torch.tensor([1, 1]), 1.0, (1.0, 1.0))
    assert losses.tolist() == pytest.approx([1 - _sigmoid(1.0)] * 2)
    assert torch.autograd.grad(losses.sum(), [ratios, mismatched], allow_unused=True)[1] is None


def test_metrics_of_pairs_are_means_over_rows() -> None:
    metrics = PairMetrics(has_reference=True)
    metrics.update(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]), torch.tensor([2.0, 4.0]))
    metrics.update(torch.tensor([-2.0]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert metrics.compute() == pytest.approx({
        "reward_accuracy": 1 / 3, "reward_margin": -2.5 / 3, "chosen_reward": -1 / 3, "rejected_reward": 0.5,
        "log_ratio": 2.0,
    })  # fmt: skip
    assert "log_ratio" not in PairMetrics().compute()


def test_the_histogram_of_margins_has_a_border_at_zero() -> None:
    metrics = PairMetrics()
    assert metrics.histogram() is None
    metrics.update(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    metrics.compute()
    histogram = metrics.histogram()
    assert histogram is not None
    assert len(histogram.edges) == len(histogram.counts) + 1
    zero = histogram.edges.index(0.0)
    assert (sum(histogram.counts[:zero]), sum(histogram.counts)) == (1, 3)
    assert histogram.edges[0] <= -0.5 < 1.0 <= histogram.edges[-1]


def test_metrics_of_judged_rows_compare_with_the_divergence_of_the_split() -> None:
    metrics = JudgedMetrics(0.5)
    metrics.update(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0]), torch.tensor([1, 0]))
    metrics.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
    # The divergence is 1: the first row is above it and the second below, as they should be.
    assert metrics.compute() == pytest.approx({
        "reward_accuracy": 0.5, "reward_margin": 0.75 - 0.875, "desirable_reward": 0.75, "undesirable_reward": 0.875,
        "kl": 1.0,
    })  # fmt: skip
    assert metrics.baseline() == {"reward_accuracy": 0.5}
    one_kind = JudgedMetrics(0.5)
    one_kind.update(torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([1]))
    assert one_kind.compute() == pytest.approx({"reward_accuracy": 1.0, "desirable_reward": 1.0, "kl": 0.0})
