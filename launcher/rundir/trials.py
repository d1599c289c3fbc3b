"""The typed records of a sweep: what is known of each trial, and what they have in common. Runs anywhere."""

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, JsonValue

from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record


class TrialEvaluation(Record):
    """One look at a trial."""

    step: int
    progress: float
    """Percent of the trial's steps done."""
    value: float
    """The sweep's metric."""
    loss: float


class TrialRecord(Record):
    """trial.json: what a sweep knows of one trial."""

    number: int
    """In the order of suggestion, from 0."""
    params: dict[str, JsonValue]
    """Values of the searched keys; of a trial whose values changed on the way (pbt) the last ones."""
    seed: int
    repeat_of: int | None = None
    """The trial that this one repeats with another seed."""
    status: Literal["running", "finished", "pruned", "failed"]
    reason: str = ""
    """Why it failed or was stopped."""
    evaluations: tuple[TrialEvaluation, ...] = ()
    total_steps: int = 0
    workers: int = 1
    gpus: float = 0.0
    """Of all its workers together."""
    seconds: float = 0.0
    """Spent on it, starting and saving included."""

    def best(self, mode: str) -> TrialEvaluation | None:
        """Its best look so far, the first of equals; None before the first."""
        sign = 1.0 if mode == "max" else -1.0
        seen = [look for look in self.evaluations if math.isfinite(look.value)]
        return max(seen, key=lambda look: sign * look.value) if seen else None

    def score(self, mode: str) -> float:
        """Its best value, so that more is better; -inf before its first look."""
        best = self.best(mode)
        if best is None:
            return -math.inf
        return best.value if mode == "max" else -best.value


class SweepRecord(Record):
    """sweep.json: what the trials have in common."""

    name: str
    metric: str
    mode: Literal["max", "min"]
    space: dict[str, dict[str, JsonValue]]
    """As in the job file."""
    trials: int
    """Asked for."""
    search: str
    scheduler: str
    seconds: float = 0.0
    """The sweep took, over all attempts."""
    stopped: str = ""
    """Why it ended before all its trials, if it did."""
    best: int | None = None
    """Number of the best trial, once the sweep is over."""
    importances: dict[str, float] = Field(default_factory=dict)
    """Share of the metric's variation that each searched key explains, most first; empty where nothing can be told."""
    cpus_per_worker: float = 1.0

    def ranked(self, trials: Iterable[TrialRecord]) -> list[TrialRecord]:
        """The trials that were searched, best first; those that failed or saw nothing last."""
        searched = [trial for trial in trials if trial.repeat_of is None]
        return sorted(searched, key=lambda t: (t.status == "failed", -t.score(self.mode), t.number))


def read_trials(run: RunDir) -> list[TrialRecord]:
    """What is known of each trial of a run's sweep, by number.

    Raises:
        RunError: a record is not one.
    """
    names = sorted(run.list("sweep/trials"))
    found = [run.find_record(f"sweep/trials/{name}/trial.json", TrialRecord) for name in names]
    return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)
