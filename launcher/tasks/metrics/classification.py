"""Metrics of classification, on torchmetrics, with states that merge over workers. Runs in train workers.

No logits are kept: counts per class, and for ROC-AUC counts at fixed thresholds spaced evenly in logits.
"""

import torch
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MultilabelAUROC,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

from launcher.rundir.records import ClassRow, ConfusionMatrix

# Evenly spaced logits, -16 to 16 in steps of 1/16: fine where confident models crowd, at constant memory.
_THRESHOLDS = torch.linspace(-16, 16, 513, dtype=torch.float64).sigmoid().float()


class MulticlassMetrics:
    """Accuracy, precision, recall, F1, ROC-AUC and the confusion matrix of a single-label task.

    With two classes, `f1`, `precision` and `recall` are those of the second class, as is usual, beside the macro means.
    """

    def __init__(self, labels: tuple[str, ...], device: torch.device) -> None:
        self._labels = labels
        self._matrix = MulticlassConfusionMatrix(len(labels)).to(device)
        self._auroc = MulticlassAUROC(len(labels), average=None, thresholds=_THRESHOLDS.to(device)).to(device)
        self._counts = torch.zeros(len(labels), len(labels), dtype=torch.float64)
        self._top5 = MulticlassAccuracy(len(labels), average="micro", top_k=5).to(device) if len(labels) > 5 else None

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count B rows: logits (B, classes), labels (B,)."""
        self._matrix.update(logits, labels)
        self._auroc.update(logits.float().softmax(-1), labels)
        if self._top5 is not None:
            self._top5.update(logits, labels)

    def compute(self) -> dict[str, float]:
        """Merge the workers' states; returns the metrics, accuracy first."""
        self._counts = self._matrix.compute().cpu().double()
        metrics = _summary(self._counts)
        present = self._counts.sum(1) > 0
        if int(present.sum()) > 1:  # ROC-AUC has no meaning where only one class occurs, nor for a class that does not
            metrics["roc_auc"] = float(self._auroc.compute().cpu()[present].mean())
        return metrics if self._top5 is None else metrics | {"top5_accuracy": float(self._top5.compute())}

    def baseline(self) -> dict[str, float]:
        """Always the most frequent class; among five, the five most frequent."""
        counts = torch.zeros_like(self._counts)
        support = self._counts.sum(1)
        counts[:, int(support.argmax())] = support
        best = {**_summary(counts), "roc_auc": 0.5}
        five = float(support.sort(descending=True).values[:5].sum() / support.sum().clamp(min=1))
        return best if self._top5 is None else best | {"top5_accuracy": five}

    def confusion(self) -> ConfusionMatrix | None:
        """Counts by true and predicted class."""
        counts = tuple(tuple(int(n) for n in row) for row in self._counts.tolist())
        return ConfusionMatrix(labels=self._labels, counts=counts)

    def classes(self) -> tuple[ClassRow, ...]:
        """Precision, recall and F1 of each class."""
        precision, recall, f1 = _per_class(self._counts)
        return _class_rows(self._labels, precision, recall, f1, self._counts.sum(1))


class MultilabelMetrics:
    """Micro and macro F1, precision, recall, exact match and ROC-AUC of a multi-label task."""

    def __init__(self, labels: tuple[str, ...], device: torch.device) -> None:
        n = len(labels)
        self._labels = labels
        self._support = torch.zeros(n, dtype=torch.float64, device=device)
        self._rows = torch.zeros((), dtype=torch.float64, device=device)
        self._f1 = MultilabelF1Score(n, average=None).to(device)
        self._precision = MultilabelPrecision(n, average=None).to(device)
        self._recall = MultilabelRecall(n, average=None).to(device)
        self._micro = MultilabelF1Score(n, average="micro").to(device)
        self._exact = MultilabelExactMatch(n).to(device)
        self._auroc = MultilabelAUROC(n, average=None, thresholds=_THRESHOLDS.to(device)).to(device)
        self._merged = self._support

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count B rows: logits and 0/1 labels (B, classes)."""
        scores, truth = logits.float().sigmoid(), labels.long()
        for metric in (self._f1, self._precision, self._recall, self._micro, self._exact, self._auroc):
            metric.update(scores, truth)
        self._support += truth.sum(0)
        self._rows += len(truth)

    def compute(self) -> dict[str, float]:
        """Merge the workers' states; returns the metrics, micro F1 first."""
        self._merged = torch.cat([self._support, self._rows[None]])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._merged)
        metrics = {
            "f1": float(self._micro.compute()),
            "macro_f1": float(self._f1.compute().mean()),
            "macro_precision": float(self._precision.compute().mean()),
            "macro_recall": float(self._recall.compute().mean()),
            "exact_match": float(self._exact.compute()),
        }
        usable = (self._merged[:-1] > 0) & (self._merged[:-1] < self._merged[-1])
        if bool(usable.any()):  # a label that all rows have, or none, has no ROC curve
            metrics["roc_auc"] = float(self._auroc.compute()[usable].mean())
        return metrics

    def baseline(self) -> dict[str, float]:
        """Always the labels that more than half of the rows have."""
        support, rows = self._merged[:-1], self._merged[-1]
        chosen = support * 2 > rows
        hits, given = support[chosen].sum(), chosen.sum() * rows
        f1 = 2 * hits / (given + support.sum()).clamp(min=1)
        return {"f1": float(f1), "roc_auc": 0.5}

    def confusion(self) -> ConfusionMatrix | None:
        """A multi-label task has no confusion matrix over classes."""
        return None

    def classes(self) -> tuple[ClassRow, ...]:
        """Precision, recall and F1 of each label."""
        return _class_rows(
            self._labels, self._precision.compute(), self._recall.compute(), self._f1.compute(), self._merged[:-1]
        )


def _per_class(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hits = counts.diagonal()
    precision = hits / counts.sum(0).clamp(min=1)
    recall = hits / counts.sum(1).clamp(min=1)
    return precision, recall, 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def _summary(counts: torch.Tensor) -> dict[str, float]:
    precision, recall, f1 = _per_class(counts)
    accuracy = float(counts.diagonal().sum() / counts.sum().clamp(min=1))
    # Micro F1 equals accuracy when each row has exactly one label; it is named so that nobody misses it.
    # A class that neither occurs nor is predicted has no score, so it is no zero in the mean (as in scikit-learn).
    known = counts.sum(0) + counts.sum(1) > 0
    macro = [float(scores[known].sum() / known.sum().clamp(min=1)) for scores in (precision, recall, f1)]
    summary = {"accuracy": accuracy, "macro_f1": macro[2], "micro_f1": accuracy}
    summary |= {"macro_precision": macro[0], "macro_recall": macro[1]}
    if len(counts) == 2:
        summary |= {"f1": float(f1[1]), "precision": float(precision[1]), "recall": float(recall[1])}
    return summary


def _class_rows(
    labels: tuple[str, ...], precision: torch.Tensor, recall: torch.Tensor, f1: torch.Tensor, support: torch.Tensor
) -> tuple[ClassRow, ...]:
    table = zip(labels, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return tuple(ClassRow(label=n, precision=p, recall=r, f1=f, support=int(s)) for n, p, r, f, s in table)
