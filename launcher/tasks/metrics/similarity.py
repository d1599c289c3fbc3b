"""Metrics of scored pairs of texts: how well cosine similarities follow the true scores. Runs in train workers."""

import torch

from launcher.tasks.metrics.regression import RegressionMetrics
from launcher.tasks.results import TaskMetrics


class SimilarityMetrics(TaskMetrics):
    """Spearman and Pearson correlation of cosine similarities with true scores, whatever the range of these.

    Args:
        device: Device of the states.
    """

    def __init__(self, device: torch.device) -> None:
        self._regression = RegressionMetrics(device)

    def update(self, cosines: torch.Tensor, truth: torch.Tensor) -> None:
        """Add B pairs: cosine similarities (B,), true scores (B,)."""
        self._regression.update(cosines[:, None], truth)

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, Spearman first. Collective."""
        values = self._regression.compute()
        return {name: values[name] for name in ("spearman", "pearson")}

    def baseline(self) -> dict[str, float]:
        """Return the scores of a model to which all pairs are equally similar."""
        return {"spearman": 0.0, "pearson": 0.0}
