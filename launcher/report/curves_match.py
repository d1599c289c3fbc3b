"""Step-by-step comparison of two runs' curves. Pure; runs on the client or the head."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.report.collect import ReportData
from launcher.rundir.records import EvaluationRecord

TOLERANCE = 1e-5
"""Largest accepted difference of a loss: however a global batch is split over workers and micro-batches, the losses of
one job differ by less (`tests/train/test_promise.py` measures 1.3e-7)."""


@dataclass(frozen=True)
class Divergence:
    """A value that differs between two runs.

    Args:
        step: Step of the loss or the evaluation.
        name: Name of the value: `loss`, or a metric of the validation data.
        first: Value of the first run.
        second: Value of the second run.
    """

    step: int
    name: str
    first: float
    second: float

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.first!r} and {self.second!r}"


@dataclass(frozen=True)
class CurveComparison:
    """The result of comparing two runs.

    Args:
        steps: Number of steps that both runs have.
        unmatched_steps: Number of steps that only one of them has.
        identical_steps: Number of common steps whose losses are bit-identical.
        largest_difference: Largest difference of the losses at any common step.
        loss_divergence: First loss that differs by more than the tolerance.
        evaluations: Number of evaluations that both runs have.
        metric_divergence: First value of an evaluation that differs by more than the tolerance.
    """

    steps: int
    unmatched_steps: int
    identical_steps: int
    largest_difference: float
    loss_divergence: Divergence | None
    evaluations: int
    metric_divergence: Divergence | None

    @property
    def is_same_curve(self) -> bool:
        """True if both runs have the same curve."""
        divergences = (self.loss_divergence, self.metric_divergence)
        # No common step is no evidence, and a step too few is another curve.
        return bool(self.steps) and not self.unmatched_steps and divergences == (None, None)

    @property
    def sentences(self) -> tuple[str, ...]:
        """Result in words, the losses first."""
        if not self.steps:
            return ("the runs have no step in common",)
        same = f"{self.identical_steps} of {self.steps} steps are bit-identical"
        if self.loss_divergence is not None:
            loss = f"the loss curves differ: {self.loss_divergence}; {same}"
        elif self.identical_steps == self.steps:
            loss = f"the losses of all {self.steps} steps are bit-identical"
        else:
            loss = (
                f"the losses of all {self.steps} steps agree within {TOLERANCE:g} (largest difference "
                f"{self.largest_difference:.2g}; {same})"
            )
        sentences = [loss]
        if self.unmatched_steps:
            sentences.append(f"{self.unmatched_steps} steps are in only one of the runs")
        if self.metric_divergence is not None:
            sentences.append(f"the evaluations differ: {self.metric_divergence}")
        elif self.evaluations:
            sentences.append(f"the metrics of all {self.evaluations} evaluations agree within {TOLERANCE:g}")
        return tuple(sentences)


def compare_curves(first: ReportData, second: ReportData) -> CurveComparison:
    """Compare the losses and evaluations of two runs at the steps that both have."""
    first_losses = {line.step: line.loss for line in first.steps}
    second_losses = {line.step: line.loss for line in second.steps}
    # By step, not by position: a run that logs every tenth step is compared at those.
    steps = sorted(first_losses.keys() & second_losses.keys())
    pairs = [(first_losses[step], second_losses[step]) for step in steps]
    differences = [_difference(*pair) for pair in pairs]
    diverged = (i for i, difference in enumerate(differences) if difference > TOLERANCE)
    # The first one: later differences follow from it.
    index = next(diverged, None)
    evaluated = {line.step for line in first.evaluations} & {line.step for line in second.evaluations}
    return CurveComparison(
        steps=len(steps),
        unmatched_steps=len(first_losses.keys() ^ second_losses.keys()),
        identical_steps=sum(_is_identical(*pair) for pair in pairs),
        largest_difference=max(differences, default=0.0),
        loss_divergence=None if index is None else Divergence(steps[index], "loss", *pairs[index]),
        evaluations=len(evaluated),
        metric_divergence=next(_find_metric_divergences(first.evaluations, second.evaluations), None),
    )


def find_first_difference(first: ReportData, second: ReportData) -> str | None:
    """Describe the first logged value whose bits differ between two runs; None if all are the same."""
    values, others = _list_values(first), _list_values(second)
    for key in sorted(values.keys() | others.keys()):
        step, _, name = key
        if key not in values or key not in others:
            return f"{name} at step {step} is in only one of the runs"
        if not _is_identical(values[key], others[key]):
            return str(Divergence(step, name, values[key], others[key]))
    return None


def _list_values(data: ReportData) -> dict[tuple[int, int, str], float]:
    """Return losses and metrics by (step, 0 for a loss or 1 for an evaluation, name)."""
    values = {(line.step, 0, "loss"): line.loss for line in data.steps}
    for line in data.evaluations:
        numbers = {"loss": line.loss, **line.metrics}
        values |= {(line.step, 1, f"{line.split} {name}"): number for name, number in numbers.items()}
    return values


def _find_metric_divergences(
    first: Sequence[EvaluationRecord], second: Sequence[EvaluationRecord]
) -> Iterator[Divergence]:
    by_step = {line.step: line for line in second}
    for line in first:
        other = by_step.get(line.step)
        if other is None:
            continue
        first_values = {"loss": line.loss, **line.metrics}
        second_values = {"loss": other.loss, **other.metrics}
        for name in first_values:
            # A metric that is undefined in one run only (ROC-AUC of one class) is left out there.
            if name in second_values and _difference(first_values[name], second_values[name]) > TOLERANCE:
                yield Divergence(line.step, f"validation {name}", first_values[name], second_values[name])


def _is_identical(first: float, second: float) -> bool:
    # Two runs that both diverged to NaN did the same, and 0 is not -0: `==` would say the opposite of both.
    return first.hex() == second.hex()


def _difference(first: float, second: float) -> float:
    """Return the absolute difference, relative beyond 1 (perplexities are large); inf if only one value is finite."""
    if _is_identical(first, second):
        return 0.0
    difference = abs(first - second) / max(1.0, abs(first), abs(second))
    # NaN against a number would compare as no difference: `NaN > tolerance` is false.
    return difference if math.isfinite(difference) else math.inf
