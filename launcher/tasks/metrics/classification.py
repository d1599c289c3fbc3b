"""Metrics of classification, on torchmetrics, whose `compute` merges the states of all ranks. Runs in train workers.

No logits are kept: the states are counts per class and, for ROC-AUC, counts at fixed thresholds.
"""

import torch
import torch.distributed as dist
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
from launcher.tasks.results import TaskMetrics

# Logits from -16 to 16 in steps of 1/16. torchmetrics' own thresholds are evenly spaced probabilities, which cannot
# tell apart the scores of a confident model: nearly all of them are next to 0 and 1.
_THRESHOLDS = torch.linspace(-16, 16, 513, dtype=torch.float64).sigmoid().float()


class MulticlassMetrics(TaskMetrics):
    """Accuracy, precision, recall, F1, ROC-AUC and the confusion matrix of a single-label task.

    With two classes, `f1`, `precision` and `recall` are those of the second class, as usual, next to the macro means.

    Args:
        labels: Class names in order.
        device: Device of the states.
    """

    def __init__(self, labels: tuple[str, ...], device: torch.device) -> None:
        self._labels = labels
        self._matrix = MulticlassConfusionMatrix(len(labels)).to(device)
        # State: int64 (513, classes, 2, 2), 16 KiB a class, whatever the number of rows.
        self._auroc = MulticlassAUROC(len(labels), average=None, thresholds=_THRESHOLDS.to(device)).to(device)
        # Rows: truth, columns: prediction. On the CPU, filled by `compute`.
        self._counts_CC = torch.zeros(len(labels), len(labels), dtype=torch.float64)
        self._top5 = MulticlassAccuracy(len(labels), average="micro", top_k=5).to(device) if len(labels) > 5 else None

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows: logits (B, classes), labels (B,)."""
        # Takes the argmax itself. Each `update` also validates its arguments (`validate_args`), which waits for the
        # device.
        self._matrix.update(logits, labels)
        # Softmax here: torchmetrics 1.9 applies it only where a value is outside [0, 1] (`normalize_logits_if_needed`),
        # so logits that happen to be within would be taken for probabilities.
        self._auroc.update(logits.float().softmax(-1), labels)
        if self._top5 is not None:
            self._top5.update(logits, labels)

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, accuracy first. Collective."""
        # Collective, then a host-device sync.
        self._counts_CC = self._matrix.compute().cpu().double()
        metrics = _summarize(self._counts_CC)
        occurs_C = self._counts_CC.sum(1) > 0
        # All ranks have the merged counts, so all of them take the same branch: `compute` of ROC-AUC is a collective.
        # ROC-AUC is undefined with one class, and for a class that does not occur.
        if int(occurs_C.sum()) > 1:
            metrics["roc_auc"] = float(self._auroc.compute().cpu()[occurs_C].mean())
        return metrics if self._top5 is None else metrics | {"top5_accuracy": float(self._top5.compute())}

    def baseline(self) -> dict[str, float]:
        """Return the scores of always predicting the most frequent class; of the top five, the five most frequent."""
        # The frequencies are those of the scored split itself, so `compute` must come first.
        counts = torch.zeros_like(self._counts_CC)
        support_C = self._counts_CC.sum(1)
        counts[:, int(support_C.argmax())] = support_C
        scores = {**_summarize(counts), "roc_auc": 0.5}
        top5 = float(support_C.sort(descending=True).values[:5].sum() / support_C.sum().clamp(min=1))
        return scores if self._top5 is None else scores | {"top5_accuracy": top5}

    def confusion(self) -> ConfusionMatrix | None:
        counts = tuple(tuple(int(n) for n in row) for row in self._counts_CC.tolist())
        return ConfusionMatrix(labels=self._labels, counts=counts)

    def classes(self) -> tuple[ClassRow, ...]:
        return _class_rows(self._labels, *_per_class(self._counts_CC), self._counts_CC.sum(1))


class MultilabelMetrics(TaskMetrics):
    """Micro and macro F1, precision, recall, exact match and ROC-AUC of a multi-label task.

    Has no confusion matrix: a row may have several classes.

    Args:
        labels: Class names in order.
        device: Device of the states.
    """

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
        # Until `compute`, the counts of this rank.
        self._merged = self._support

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add B rows: logits and 0/1 labels (B, classes)."""
        # Sigmoid here, for the same reason as softmax in `MulticlassMetrics.update`.
        scores, truth = logits.float().sigmoid(), labels.long()
        for metric in (self._f1, self._precision, self._recall, self._micro, self._exact, self._auroc):
            metric.update(scores, truth)
        self._support += truth.sum(0)
        self._rows += len(truth)

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return the metrics, micro F1 first. Collective."""
        # `cat` copies, and all_reduce writes in place: the states of this rank stay as they are.
        self._merged = torch.cat([self._support, self._rows[None]])
        if dist.is_initialized():
            dist.all_reduce(self._merged)
        metrics = {
            "f1": float(self._micro.compute()),
            "macro_f1": float(self._f1.compute().mean()),
            "macro_precision": float(self._precision.compute().mean()),
            "macro_recall": float(self._recall.compute().mean()),
            "exact_match": float(self._exact.compute()),
        }
        # From merged counts, so that all ranks take the same branch: `compute` of ROC-AUC is a collective.
        has_curve_C = (self._merged[:-1] > 0) & (self._merged[:-1] < self._merged[-1])
        # A label that all rows have, or none, has no ROC curve.
        if bool(has_curve_C.any()):
            metrics["roc_auc"] = float(self._auroc.compute()[has_curve_C].mean())
        return metrics

    def baseline(self) -> dict[str, float]:
        """Return the scores of always predicting the labels that more than half of the rows have."""
        support_C, rows = self._merged[:-1], self._merged[-1]
        is_predicted_C = support_C * 2 > rows
        hits, predicted = support_C[is_predicted_C].sum(), is_predicted_C.sum() * rows
        f1 = 2 * hits / (predicted + support_C.sum()).clamp(min=1)
        return {"f1": float(f1), "roc_auc": 0.5}

    def classes(self) -> tuple[ClassRow, ...]:
        # No second collective: torchmetrics 1.9 caches the result of `compute` until the next `update`.
        precision, recall, f1 = self._precision.compute(), self._recall.compute(), self._f1.compute()
        return _class_rows(self._labels, precision, recall, f1, self._merged[:-1])


def _per_class(counts_CC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return precision, recall and F1 of each class, 0 where they are undefined."""
    hits = counts_CC.diagonal()
    precision = hits / counts_CC.sum(0).clamp(min=1)
    recall = hits / counts_CC.sum(1).clamp(min=1)
    # The clamp turns 0 / 0 into 0; no score above 0 is that small.
    return precision, recall, 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def _summarize(counts_CC: torch.Tensor) -> dict[str, float]:
    precision, recall, f1 = _per_class(counts_CC)
    accuracy = float(counts_CC.diagonal().sum() / counts_CC.sum().clamp(min=1))
    # A class that neither occurs nor is predicted has no score and is not counted in the mean (as in scikit-learn).
    is_scored = counts_CC.sum(0) + counts_CC.sum(1) > 0
    macro = [float(scores[is_scored].sum() / is_scored.sum().clamp(min=1)) for scores in (precision, recall, f1)]
    # With one label per row micro F1 equals accuracy; it is listed for those who look for it.
    summary = {"accuracy": accuracy, "macro_f1": macro[2], "micro_f1": accuracy}
    summary |= {"macro_precision": macro[0], "macro_recall": macro[1]}
    if len(counts_CC) == 2:
        summary |= {"f1": float(f1[1]), "precision": float(precision[1]), "recall": float(recall[1])}
    return summary


def _class_rows(
    labels: tuple[str, ...], precision: torch.Tensor, recall: torch.Tensor, f1: torch.Tensor, support: torch.Tensor
) -> tuple[ClassRow, ...]:
    table = zip(labels, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return tuple(ClassRow(label=n, precision=p, recall=r, f1=f, support=int(s)) for n, p, r, f, s in table)
