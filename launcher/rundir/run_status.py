"""Status of a run, visible from its directory: heartbeat.json, written by the driver every 10 s.

Written on the head, read anywhere. A run whose heartbeat has stopped is dead: its driver or node was killed.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from launcher.errors import LauncherError, RunError, RunInterrupted
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import AttemptRecord, is_alive, newest_attempt
from launcher.rundir.records import Record

FILE = "heartbeat.json"
_EVERY_S = 10.0
_DEAD_S = 60.0
"""Age of the last heartbeat from which a driver counts as dead. Allows for clock skew and a slow storage."""
_Recorded = Literal["running", "finished", "interrupted", "failed"]
State = Literal[_Recorded, "dead", "unknown"]


class HeartbeatRecord(Record):
    """Content of heartbeat.json."""

    damage_remedy = "remove it; a driver writes it every 10 s"

    token: int
    """Token of the attempt that wrote it."""
    at: float
    """Seconds since the epoch."""
    state: _Recorded
    reason: str = ""
    """Why the run ended early, if it did."""


@contextmanager
def publish_run_status(run: RunDir) -> Iterator[None]:
    """Write heartbeats from a thread until the block ends, then its outcome. Never overwrites a newer attempt's."""
    stop = threading.Event()
    # A daemon, as a write to a storage that hangs must not keep the process from exiting.
    thread = threading.Thread(target=_write_heartbeats, args=(run, stop), name="heartbeat", daemon=True)
    thread.start()

    def finish(state: _Recorded, why: str = "") -> None:
        stop.set()
        # Before the last write, or the thread could overwrite it with "running".
        thread.join()
        _write(run, state, why)

    try:
        yield
    except RunInterrupted as stopped:
        finish("interrupted", stopped.message)
        raise
    except LauncherError as error:
        finish("failed", error.message)
        raise
    # Also Ctrl-C and SystemExit. A process that is killed leaves "running" behind, which grows old (`_DEAD_S`).
    except BaseException as error:
        finish("failed", type(error).__name__)
        raise
    finish("finished")


def _write_heartbeats(run: RunDir, stop: threading.Event) -> None:
    while True:
        _write(run, "running")
        if stop.wait(_EVERY_S):
            return


def _write(run: RunDir, state: _Recorded, why: str = "") -> None:
    # A temporary storage failure must not stop training. Looking up the newest attempt costs more requests than the
    # heartbeat itself, and keeps an attempt that does not know it is stale from hiding the newer one.
    with suppress(LauncherError):
        newest = newest_attempt(run)
        if newest is not None and _is_own_attempt(newest):
            run.write_record(FILE, HeartbeatRecord(token=newest.token, at=time.time(), state=state, reason=why))


def _is_own_attempt(attempt: AttemptRecord) -> bool:
    """Return True if this process started the attempt."""
    # Not by its token, which grows whenever this driver renews the lease.
    own = AttemptRecord.here(attempt.token)
    return (attempt.host, attempt.pid, attempt.process_began) == (own.host, own.pid, own.process_began)


def run_state(run: RunDir) -> tuple[State, HeartbeatRecord | None]:
    """Return the state of a run and its last heartbeat."""
    last = run.find_record(FILE, HeartbeatRecord)
    if last is None:
        return "unknown", None
    if last.state != "running":
        return last.state, last
    attempt = newest_attempt(run)
    # Wall clocks, as a monotonic clock means nothing on another machine.
    is_recent = time.time() - last.at < _DEAD_S
    # On this machine a killed driver is seen at once; on another one only when its heartbeat is old.
    is_killed = attempt is not None and attempt.is_here and not is_alive(attempt)
    return ("running" if is_recent and not is_killed else "dead"), last


def check_finished(run: RunDir) -> None:
    """Check that a run is finished.

    Raises:
        RunError: It is not.
    """
    if not run.exists("result.json") or not run.exists("metrics.jsonl"):
        raise RunError(f"{run.uri}: is not finished; finish it with `launcher train` before replaying it")
