"""Events of a run outside its metrics: a failed checkpoint, a lost worker. Runs anywhere.

Each event is a separate file in `events/`, so that driver and workers never write to the same one.
"""

import time
from contextlib import suppress

from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record

_FOLDER = "events"


class Event(Record):
    """Content of events/<time>-<kind>.json."""

    damage_remedy = "remove it, and the report does without it"

    kind: str
    """Type of event, such as `worker-lost`."""
    step: int
    """Step of the run, as far as known."""
    at: float
    """Seconds since the epoch."""
    text: str
    """Sentence for log and report."""


def record_event(run: RunDir, kind: str, step: int, text: str) -> Event:
    """Write an event and return it. A storage failure is ignored: the event may report that very failure."""
    event = Event(kind=kind, step=step, at=time.time(), text=text)
    with suppress(RunError):
        # Nanoseconds make the name unique and sort by time: their number of digits changes only in the year 2286.
        run.write_record(f"{_FOLDER}/{time.time_ns()}-{kind}.json", event)
    return event


def read_events(run: RunDir) -> tuple[Event, ...]:
    """Return all events of a run, oldest first.

    Raises:
        RunError: A file in the folder is not an event.
    """
    # A file that is being written, or was left by a killed process, has another ending.
    names = sorted(name for name in run.list(_FOLDER) if name.endswith(".json"))
    return tuple(run.read_record(f"{_FOLDER}/{name}", Event) for name in names)
