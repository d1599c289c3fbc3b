"""Metrics of regression, on torchmetrics. Runs in train workers."""

import torch
import torch.distributed as dist
from torchmetrics.functional.regression import mean_squared_error, pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities.distributed import gather_all_tensors

from launcher.tasks.results import TaskMetrics


class RegressionMetrics(TaskMetrics):
    """Pearson and Spearman correlation, and the mean squared error.

    Args:
        device: Device of the states.
    """

    def __init__(self, device: torch.device) -> None:
        # Spearman's correlation compares ranks, so the state is the two numbers of each row: 16 bytes.
        self._pairs: list[torch.Tensor] = [torch.zeros(0, 2, dtype=torch.float64, device=device)]

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows: logits (B, 1), labels (B,)."""
        # Only the last axis: a batch of one row must stay (1,).
        self._pairs.append(torch.stack([logits.float().squeeze(-1), labels.float()], 1).double())

    def compute(self) -> dict[str, float]:
        """Merge the rows of all ranks and return the metrics, Pearson first. Collective."""
        pairs_N2 = torch.cat(self._pairs)
        if dist.is_initialized():
            pairs_N2 = torch.cat(gather_all_tensors(pairs_N2))
        # Sorted, by truth and then by value: rounding must not depend on which rank has which rows.
        pairs_N2 = pairs_N2[pairs_N2[:, 0].argsort(stable=True)]
        pairs_N2 = pairs_N2[pairs_N2[:, 1].argsort(stable=True)]
        self._pairs = [pairs_N2]
        values, truth = pairs_N2.unbind(1)
        return {
            "pearson": float(pearson_corrcoef(values, truth)),
            "spearman": float(spearman_corrcoef(values, truth)),
            "mse": float(mean_squared_error(values, truth)),
        }

    def baseline(self) -> dict[str, float]:
        """Return the scores of always predicting the mean: its mean squared error is the variance."""
        truth = torch.cat(self._pairs)[:, 1]
        return {"pearson": 0.0, "spearman": 0.0, "mse": float(truth.var(correction=0))}
