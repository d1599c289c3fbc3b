"""Metrics of regression, on torchmetrics. Runs in train workers.

Spearman compares ranks, so its state is the two numbers of each row (8 bytes a row), merged like the other states.
"""

import torch
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

from launcher.rundir.records import ClassRow, ConfusionMatrix


class RegressionMetrics:
    """Pearson, Spearman and the mean squared error."""

    def __init__(self, device: torch.device) -> None:
        self._pearson = PearsonCorrCoef().to(device)
        self._spearman = SpearmanCorrCoef().to(device)
        self._mse = MeanSquaredError().to(device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count B rows: logits (B, 1), labels (B,)."""
        values, truth = logits.float().squeeze(-1), labels.float()
        for metric in (self._pearson, self._spearman, self._mse):
            metric.update(values, truth)
        wide = truth.double()
        self._sums += torch.stack([torch.ones_like(wide).sum(), wide.sum(), (wide * wide).sum()])

    def compute(self) -> dict[str, float]:
        """Merge the workers' states; returns the metrics, Pearson first."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        return {
            "pearson": float(self._pearson.compute()),
            "spearman": float(self._spearman.compute()),
            "mse": float(self._mse.compute()),
        }

    def baseline(self) -> dict[str, float]:
        """Always the mean: its mean squared error is the variance."""
        rows, total, squares = self._sums.tolist()
        return {"pearson": 0.0, "spearman": 0.0, "mse": squares / rows - (total / rows) ** 2}

    def confusion(self) -> ConfusionMatrix | None:
        """Regression has no classes."""
        return None

    def classes(self) -> tuple[ClassRow, ...]:
        """Regression has no classes."""
        return ()
