"""Summary of every run in a storage, for `launcher runs`. Runs on the client."""

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from launcher.errors import RunError
from launcher.rundir.directory import RunDir, run_at
from launcher.rundir.metrics_log import summarize
from launcher.rundir.plan import Plan
from launcher.rundir.records import Record, ResultRecord
from launcher.rundir.run_status import State, run_state

# Each run takes several requests one after the other, so the time of a listing is that of waiting for answers.
_READERS = 16


class RunSummary(Record):
    """State and progress of one run."""

    name: str
    state: State | Literal["unreadable"]
    why: str = ""
    """Why it ended early, if it did."""
    task: str = ""
    step: int = 0
    total_steps: int = 0
    metric: str = ""
    best: float | None = None
    """Best validation value of the job's metric."""
    best_step: int | None = None
    heartbeat: float | None = None
    """Last heartbeat of the driver, seconds since the epoch."""


def list_runs(storage: str) -> list[RunSummary]:
    """Return the runs of a storage, sorted by name.

    Raises:
        RunError: The storage does not exist, or is itself a run.
    """
    place = run_at(storage)
    if not place.exists(""):
        raise RunError(f"{place.uri}: not found; give the output.storage of your job files")
    if place.exists("job.yaml"):
        raise RunError(f"{place.uri}: is itself a run; give the directory that holds it")
    with ThreadPoolExecutor(_READERS) as readers:
        # `map` raises the first error and drops the rest, so `_summarize_run` returns its own errors as a state.
        summaries = readers.map(lambda name: _summarize_run(RunDir(place.path(name)), name), place.list(""))
        return [summary for summary in summaries if summary is not None]


def _summarize_run(run: RunDir, name: str) -> RunSummary | None:
    """Return the summary of a directory; None if it is not a run."""
    if not run.exists("job.yaml"):
        return None
    try:
        return _read_summary(run, name)
    except RunError as error:
        return RunSummary(name=name, state="unreadable", why=error.message)


def _read_summary(run: RunDir, name: str) -> RunSummary:
    plan = run.find_record("plan.json", Plan)
    state, heartbeat = run_state(run)
    if state == "unknown" and run.find_record("result.json", ResultRecord) is not None:
        state = "finished"
    log = summarize(run)
    bests = [line for line in log.evaluations if line.split == "validation" and line.best]
    best = bests[-1] if bests else None
    metric = plan.metric if plan is not None else ""
    value = None if best is None else best.loss if metric == "loss" else best.metrics.get(metric)
    return RunSummary(
        name=name,
        state=state,
        why=heartbeat.reason if heartbeat is not None else "",
        task=plan.task if plan is not None else "",
        step=log.step,
        total_steps=plan.total_steps if plan is not None else 0,
        metric=metric,
        best=value,
        best_step=best.step if best is not None and value is not None else None,
        heartbeat=heartbeat.at if heartbeat is not None else None,
    )
