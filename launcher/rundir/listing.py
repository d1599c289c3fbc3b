"""States of all runs of a storage, read from their directories. Runs on the client."""

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from launcher.errors import RunError
from launcher.rundir.directory import RunDir, run_at
from launcher.rundir.metrics_log import summarize
from launcher.rundir.plan import Plan
from launcher.rundir.records import Record, ResultRecord
from launcher.rundir.run_status import State, run_state

_READERS = 16


class RunSummary(Record):
    """One run."""

    name: str
    state: State | Literal["unreadable"]
    why: str = ""
    """How it ended, where it did so too early."""
    task: str = ""
    step: int = 0
    total_steps: int = 0
    metric: str = ""
    best: float | None = None
    """Of the metric that decides, on the validation data."""
    best_step: int | None = None
    heartbeat: float | None = None
    """Of its driver, seconds since the epoch."""


def runs_of(storage: str) -> list[RunSummary]:
    """All runs of a storage, by name.

    Raises:
        RunError: there is no such storage.
    """
    place = run_at(storage)
    if not place.exists(""):
        raise RunError(f"{place.uri}: not found; give the output.storage of your job files")
    if place.exists("job.yaml"):
        raise RunError(f"{place.uri}: is a run itself; give the directory that holds it")
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda name: _summary(RunDir(place.path(name)), name), place.list(""))
        return [run for run in found if run is not None]


def _summary(run: RunDir, name: str) -> RunSummary | None:
    """None where there is no run."""
    if not run.exists("job.yaml"):
        return None
    try:
        return _read(run, name)
    except RunError as error:
        return RunSummary(name=name, state="unreadable", why=error.message)


def _read(run: RunDir, name: str) -> RunSummary:
    plan = run.find_record("plan.json", Plan)
    state, beat = run_state(run)
    if state == "unknown" and run.find_record("result.json", ResultRecord) is not None:
        state = "finished"
    seen = summarize(run)
    bests = [line for line in seen.evaluations if line.split == "validation" and line.best]
    best = bests[-1] if bests else None
    metric = plan.metric if plan is not None else ""
    value = None if best is None else best.loss if metric == "loss" else best.metrics.get(metric)
    return RunSummary(
        name=name,
        state=state,
        why=beat.reason if beat is not None else "",
        task=plan.task if plan is not None else "",
        step=seen.step,
        total_steps=plan.total_steps if plan is not None else 0,
        metric=metric,
        best=value,
        best_step=best.step if best is not None and value is not None else None,
        heartbeat=beat.at if beat is not None else None,
    )
