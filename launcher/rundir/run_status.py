"""Whether a run is being worked on, for whoever looks at its directory: heartbeat.json, written by the driver.

Runs on the head; read anywhere. A run whose heartbeat has stopped is dead: its driver was killed, or its node.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from launcher.errors import LauncherError, RunInterrupted
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import AttemptRecord, is_alive, newest_attempt
from launcher.rundir.records import Record

FILE = "heartbeat.json"
_EVERY_S = 10.0
_DEAD_S = 60.0
"""Without a beat for so long a driver is dead: its clock may differ a little, its storage may be slow."""
State = Literal["running", "finished", "interrupted", "failed", "dead", "unknown"]


class HeartbeatRecord(Record):
    """heartbeat.json."""

    token: int
    """Of the attempt that beats."""
    at: float
    """Seconds since the epoch."""
    state: Literal["running", "finished", "interrupted", "failed"]
    reason: str = ""
    """How it ended, where it did so too early."""


@contextmanager
def publish_run_status(run: RunDir) -> Iterator[None]:
    """Beat until the block ends, then say how it ended; a newer attempt's heartbeat is left alone."""
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(run, stop), name="heartbeat", daemon=True)
    thread.start()

    def end(state: Literal["finished", "interrupted", "failed"], why: str = "") -> None:
        stop.set()
        thread.join()
        _write(run, state, why)

    try:
        yield
    except RunInterrupted as stopped:
        end("interrupted", stopped.message)
        raise
    except LauncherError as error:
        end("failed", error.message)
        raise
    except BaseException as error:
        end("failed", type(error).__name__)
        raise
    end("finished")


def _beat(run: RunDir, stop: threading.Event) -> None:
    while True:
        _write(run, "running")
        if stop.wait(_EVERY_S):
            return


def _write(run: RunDir, state: Literal["running", "finished", "interrupted", "failed"], why: str = "") -> None:
    with suppress(LauncherError):  # a storage that fails for a while must not end a training
        newest = newest_attempt(run)
        if newest is not None and is_own_heartbeat(newest):
            run.write_record(FILE, HeartbeatRecord(token=newest.token, at=time.time(), state=state, reason=why))


def is_own_heartbeat(attempt: AttemptRecord) -> bool:
    """Whether this very process began it."""
    mine = AttemptRecord.here(attempt.token)
    return (attempt.host, attempt.pid, attempt.process_began) == (mine.host, mine.pid, mine.process_began)


def run_state(run: RunDir) -> tuple[State, HeartbeatRecord | None]:
    """How a run is, and its last heartbeat."""
    last = run.find_record(FILE, HeartbeatRecord)
    if last is None:
        return "unknown", None
    if last.state != "running":
        return last.state, last
    attempt = newest_attempt(run)
    fresh = time.time() - last.at < _DEAD_S
    gone = attempt is not None and attempt.is_here and not is_alive(attempt)
    return ("running" if fresh and not gone else "dead"), last
