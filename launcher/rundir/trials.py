"""Typed records of a sweep and of its trials. Runs anywhere."""

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, JsonValue

from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record


class TrialEvaluation(Record):
    """One evaluation of a trial."""

    step: int
    progress: float
    """Percentage of the trial's steps completed."""
    value: float
    """Value of the sweep's metric."""
    loss: float


class TrialRecord(Record):
    """Content of trial.json: parameters, status and results of one trial."""

    number: int
    """Number in the order of suggestion, from 0."""
    params: dict[str, JsonValue]
    """Values of the searched keys; the last ones where PBT changed them."""
    seed: int
    repeat_of: int | None = None
    """Number of the trial that this one repeats with another seed."""
    status: Literal["running", "finished", "pruned", "failed"]
    reason: str = ""
    """Why it failed or was stopped."""
    evaluations: tuple[TrialEvaluation, ...] = ()
    total_steps: int = 0
    workers: int = 1
    gpus: float = 0.0
    """GPUs of all its workers together."""
    seconds: float = 0.0
    """Time spent on it, including start and checkpoints."""

    def best_evaluation(self, mode: str) -> TrialEvaluation | None:
        """Return the best evaluation so far, the first of equal ones; None if there is no finite value."""
        sign = 1.0 if mode == "max" else -1.0
        finite = [evaluation for evaluation in self.evaluations if math.isfinite(evaluation.value)]
        return max(finite, key=lambda evaluation: sign * evaluation.value) if finite else None

    def score(self, mode: str) -> float:
        """Return the best value with higher is better; -inf if there is none."""
        best = self.best_evaluation(mode)
        if best is None:
            return -math.inf
        return best.value if mode == "max" else -best.value


class SweepRecord(Record):
    """Content of sweep.json: settings and outcome of a sweep."""

    name: str
    metric: str
    mode: Literal["max", "min"]
    space: dict[str, dict[str, JsonValue]]
    """Search space, as in the job file."""
    trials: int
    """Number of trials in the job file."""
    search: str
    scheduler: str
    seconds: float = 0.0
    """Duration over all attempts."""
    stopped: str = ""
    """Why the sweep ended before all trials, if it did."""
    best: int | None = None
    """Number of the best trial, once the sweep is finished."""
    importances: dict[str, float] = Field(default_factory=dict)
    """Fraction of the metric's variance that each searched key explains, largest first; empty if unknown."""
    cpus_per_worker: float = 1.0

    def rank_trials(self, trials: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Return the trials without repetitions, best first; failed trials and those without evaluations last."""
        searched = [trial for trial in trials if trial.repeat_of is None]
        return sorted(searched, key=lambda t: (t.status == "failed", -t.score(self.mode), t.number))


def read_trials(run: RunDir) -> list[TrialRecord]:
    """Return the trials of a run's sweep, by number.

    Raises:
        RunError: A record is invalid.
    """
    names = sorted(run.list("sweep/trials"))
    # A trial that was killed before its first record has a directory alone.
    trials = [run.find_record(f"sweep/trials/{name}/trial.json", TrialRecord) for name in names]
    return sorted((trial for trial in trials if trial is not None), key=lambda trial: trial.number)
