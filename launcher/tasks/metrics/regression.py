"""Metrics of regression, on torchmetrics. Runs in train workers."""

import torch
import torch.distributed as dist
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

from launcher.tasks.results import TaskMetrics


class RegressionMetrics(TaskMetrics):
    """Pearson and Spearman correlation, and the mean squared error."""

    def __init__(self, device: torch.device) -> None:
        self._pearson = PearsonCorrCoef().to(device)
        # Compares ranks, so its state is the two numbers of each row (8 bytes a row); the others are sums.
        self._spearman = SpearmanCorrCoef().to(device)
        self._mse = MeanSquaredError().to(device)
        # Rows, truth, squared truth. float64, as the variance is a difference of two large sums.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows: logits (B, 1), labels (B,)."""
        # Only the last axis: a batch of one row must stay (1,).
        values, truth = logits.float().squeeze(-1), labels.float()
        for metric in (self._pearson, self._spearman, self._mse):
            metric.update(values, truth)
        truth = truth.double()
        self._sums += torch.stack([torch.ones_like(truth).sum(), truth.sum(), (truth * truth).sum()])

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, Pearson first. Collective."""
        if dist.is_initialized():
            # In place: a second call of `compute` would add the sums of all ranks once more.
            dist.all_reduce(self._sums)
        return {
            "pearson": float(self._pearson.compute()),
            # Gathers all rows of the split on every rank. A rank without rows takes part with an empty tensor, which
            # torchmetrics 1.9 makes for it (`Metric._sync_dist`).
            "spearman": float(self._spearman.compute()),
            "mse": float(self._mse.compute()),
        }

    def baseline(self) -> dict[str, float]:
        """Return the scores of always predicting the mean: its mean squared error is the variance."""
        rows, total, squares = self._sums.tolist()
        return {"pearson": 0.0, "spearman": 0.0, "mse": squares / rows - (total / rows) ** 2}
