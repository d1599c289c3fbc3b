"""What happened to a run beside its curve: a checkpoint that failed, a worker that was lost. Runs anywhere.

Each event is a file of its own in `events/`, so that the driver and the workers never write to the same one.
"""

import time
from contextlib import suppress

from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record

_FOLDER = "events"


class Event(Record):
    """events/<time>-<kind>.json."""

    kind: str
    """As `worker-lost`."""
    step: int
    """Of the run, as far as it was known."""
    at: float
    """Seconds since the epoch."""
    text: str
    """For people."""


def record_event(run: RunDir, kind: str, step: int, text: str) -> Event:
    """Write an event down; where the storage refuses, the run goes on without it."""
    event = Event(kind=kind, step=step, at=time.time(), text=text)
    with suppress(RunError):  # it may be the storage's trouble that is told
        run.write_record(f"{_FOLDER}/{time.time_ns()}-{kind}.json", event)
    return event


def read_events(run: RunDir) -> tuple[Event, ...]:
    """All of a run's, in order.

    Raises:
        RunError: a file there is no event.
    """
    return tuple(run.read_record(f"{_FOLDER}/{name}", Event) for name in sorted(run.list(_FOLDER)))
