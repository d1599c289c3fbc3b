"""Whether two runs have the same curves, step by step. Pure; runs on the client or the head."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.report.collect import ReportData
from launcher.rundir.records import EvaluationRecord

TOLERANCE = 1e-5
"""Losses of one job under any cut of its batches differ by less (`tests/train/test_promise.py`: 1.3e-7 measured)."""


@dataclass(frozen=True)
class Divergence:
    """Where two runs differ.

    Args:
        step: of the loss or the evaluation.
        name: `loss`, or a metric of the validation data.
        one: value of the first run.
        other: value of the second run.
    """

    step: int
    name: str
    one: float
    other: float

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.one!r} and {self.other!r}"


@dataclass(frozen=True)
class Agreement:
    """Two curves, laid on each other.

    Args:
        steps: compared: those that both have.
        missing: steps that only one of them has.
        equal: of the compared, those with the same bits.
        largest: difference of the losses at any step.
        first: the first step whose losses differ by more than the tolerance.
        evaluations: compared.
        metric: the first value of an evaluation that differs by more than the tolerance.
    """

    steps: int
    missing: int
    equal: int
    largest: float
    first: Divergence | None
    evaluations: int
    metric: Divergence | None

    @property
    def agrees(self) -> bool:
        """Whether they are the same curve."""
        return bool(self.steps) and not self.missing and self.first is None and self.metric is None

    @property
    def sentences(self) -> tuple[str, ...]:
        """The outcome, the losses first."""
        if not self.steps:
            return ("the runs have no step in common",)
        if self.first is not None:
            loss = f"the loss curves differ: {self.first}; {self.equal} of {self.steps} steps have the same bits"
        elif self.equal == self.steps:
            loss = f"the losses of all {self.steps} steps have the same bits"
        else:
            loss = (
                f"the losses of all {self.steps} steps agree within {TOLERANCE:g} (largest difference "
                f"{self.largest:.2g}; {self.equal} have the same bits)"
            )
        said = [loss]
        if self.missing:
            said.append(f"{self.missing} steps are in one of the runs only")
        if self.metric is not None:
            said.append(f"the evaluations differ: {self.metric}")
        elif self.evaluations:
            said.append(f"the metrics of all {self.evaluations} evaluations agree within {TOLERANCE:g}")
        return tuple(said)


def agreement(one: ReportData, other: ReportData) -> Agreement:
    """Compare losses and evaluations; numbers beyond 1 by their relative difference, as perplexities are."""
    mine, its = ({line.step: line.loss for line in data.steps} for data in (one, other))
    both = sorted(mine.keys() & its.keys())
    gaps = [_gap(mine[step], its[step]) for step in both]
    at = next((i for i, gap in enumerate(gaps) if gap > TOLERANCE), None)
    evaluations = _paired(one.evaluations, other.evaluations)
    return Agreement(
        steps=len(both),
        missing=len(mine.keys() ^ its.keys()),
        equal=sum(_same(mine[step], its[step]) for step in both),
        largest=max(gaps, default=0.0),
        first=None if at is None else Divergence(both[at], "loss", mine[both[at]], its[both[at]]),
        evaluations=len(evaluations),
        metric=next((place for step, a, b in evaluations for place in _apart(step, a, b)), None),
    )


def _paired(
    one: Sequence[EvaluationRecord], other: Sequence[EvaluationRecord]
) -> list[tuple[int, Mapping[str, float], Mapping[str, float]]]:
    its = {line.step: line for line in other}
    return [
        (line.step, {"loss": line.loss, **line.metrics}, {"loss": its[line.step].loss, **its[line.step].metrics})
        for line in one
        if line.step in its
    ]


def _apart(step: int, one: Mapping[str, float], other: Mapping[str, float]) -> list[Divergence]:
    shared = [name for name in one if name in other]
    found = [
        Divergence(step, name, one[name], other[name]) for name in shared if _gap(one[name], other[name]) > TOLERANCE
    ]
    return [Divergence(place.step, f"validation {place.name}", place.one, place.other) for place in found]


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _gap(one: float, other: float) -> float:
    if _same(one, other):
        return 0.0
    gap = abs(one - other) / max(1.0, abs(one), abs(other))
    return gap if math.isfinite(gap) else math.inf
