"""Results of a task in evaluations: metric states, and rows in words for the report. Runs in train workers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from launcher.rundir.records import ClassRow, ConfusionMatrix, Histogram, SpanMark

# Data workers encode without the cost of importing torch.
if TYPE_CHECKING:
    import torch

_STEP = 2.0**-22
"""Step of rounded sums, far below a digit that anybody reads. In float64 their sums are exact up to 2**31."""


def rounded(sums: "torch.Tensor") -> "torch.Tensor":
    """Return the sums of a micro-batch, float64, rounded so that adding many of them, in any order, rounds nothing.

    So a metric has the same bits for any number of workers, which have the same micro-batches in another order.
    """
    return (sums / _STEP).round() * _STEP


@dataclass(frozen=True)
class RankedDocument:
    """Document at a rank for one query, for the report; `Task.document_text` has its text.

    Args:
        rank: Rank from 1.
        score: Score of the model.
        is_true: True if it is what should come first.
        position: Position among the documents of its row, from 0.
        row: Row of the split that has it; None for the query's own.
    """

    rank: int
    score: float
    is_true: bool
    position: int
    row: int | None = None


MetricMode = Literal["max", "min"]


@dataclass(frozen=True)
class RowResult:
    """Truth and prediction of one row in words, for the report.

    Args:
        target: Truth.
        prediction: Prediction of the model.
        marks: Spans of the row's first displayed text that were found, missed or wrong.
        documents: Documents that the model ranks first, for tasks that rank.
    """

    target: str
    prediction: str
    marks: tuple[SpanMark, ...] = ()
    documents: tuple[RankedDocument, ...] = ()


@dataclass(frozen=True)
class RowInputs:
    """Inputs of one row as the report displays them.

    Args:
        texts: Text of each input column; marks point into the first.
        image: Content of an image file (PNG, JPEG, WebP), or None.
    """

    texts: dict[str, str]
    image: bytes | None = None


class TaskMetrics(Protocol):
    """Metric states of one pass over a split, merged over all ranks at its end. Fillers are never passed in.

    `Task.update_metrics` adds each batch, then `compute` is called once, and the other methods after it. States should
    be counts or sums of the whole split (words, n-grams, edit distances), fractions `rounded`, never means of batches,
    which would depend on their size; and never logits, which would fill the memory. Lives in train workers.
    """

    def compute(self) -> dict[str, float]:
        """Merge the states of all ranks and return each metric, the main one first.

        Collective: every rank must call it, a rank that had no rows too.
        """

    def baseline(self) -> dict[str, float]:
        """Return the scores of a model that knows the label frequencies only. A metric may be left out."""

    def confusion(self) -> ConfusionMatrix | None:
        """Return counts by true and predicted class, or None where there is no such matrix."""
        return None

    def classes(self) -> tuple[ClassRow, ...]:
        """Return precision, recall and F1 of each class; empty for tasks without classes."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """Return how metrics were computed where several ways exist (the signature of a BLEU score)."""
        return ()

    def complete(self, row: int, result: RowResult) -> RowResult:
        """Return the result of one of this rank's rows, with what only the whole split shows. After `compute`.

        Args:
            row: Row id, as in the column `__row` of the samples.
            result: Result of `Task.row_results`.
        """
        return result

    def histogram(self) -> Histogram | None:
        """Return the distribution of a value that the metrics are means of, or None."""
        return None
