"""Regression metrics equal scipy's and scikit-learn's, however the rows are cut into updates."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mean_squared_error

from launcher.tasks.metrics.regression import RegressionMetrics

_CUTS = [0, 2, 5, 40, 41, 300, 777, 900]


def _sample(seed: int, offset: float = 0.0, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(offset, 2, 900)
    if ties:
        truth = truth.round()
    values = 0.5 * truth + rng.normal(0, 1, 900)
    return torch.from_numpy(values[:, None]).float(), torch.from_numpy(truth).float()


def _metrics(logits: torch.Tensor, truth: torch.Tensor, cuts: list[int]) -> RegressionMetrics:
    metrics = RegressionMetrics(torch.device("cpu"))
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        metrics.update(logits[begin:end], truth[begin:end])
    return metrics


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_match_scipy(seed: int, offset: float, ties: bool) -> None:
    logits, truth = _sample(seed, offset, ties)
    values, y = logits[:, 0].double().numpy(), truth.double().numpy()
    computed = _metrics(logits, truth, [0, 900]).compute()
    expected = {
        "pearson": stats.pearsonr(values, y).statistic,
        "spearman": stats.spearmanr(values, y).statistic,
        "mse": mean_squared_error(y, values),
    }
    assert computed == pytest.approx(expected, abs=1e-5)
    assert list(computed) == ["pearson", "spearman", "mse"]


@pytest.mark.parametrize("cuts", [_CUTS, list(range(31))], ids=["uneven pieces", "single rows"])
def test_metrics_do_not_depend_on_batches(cuts: list[int]) -> None:
    logits, truth = _sample(2, 1.0)
    whole, pieces = _metrics(logits, truth, [0, cuts[-1]]), _metrics(logits, truth, cuts)
    assert pieces.compute() == pytest.approx(whole.compute(), abs=1e-5)
    assert pieces.baseline() == pytest.approx(whole.baseline(), abs=1e-9)


def test_baseline_predicts_the_mean() -> None:
    logits, truth = _sample(4, 5.0)
    metrics = _metrics(logits, truth, [0, 900])
    assert metrics.baseline().keys() == metrics.compute().keys()
    assert metrics.baseline() == pytest.approx(
        {"pearson": 0.0, "spearman": 0.0, "mse": float(np.var(truth.double().numpy()))}, abs=1e-9
    )


def test_regression_has_no_confusion_matrix_and_no_classes() -> None:
    metrics = _metrics(*_sample(5), [0, 900])
    assert metrics.confusion() is None
    assert metrics.classes() == ()


def test_half_precision_predictions_give_the_metrics_of_float32() -> None:
    logits, truth = _sample(6)
    half = logits.bfloat16()
    assert _metrics(half, truth, [0, 900]).compute() == _metrics(half.float(), truth, [0, 900]).compute()
