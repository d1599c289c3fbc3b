"""SIGTERM and Ctrl-C while the driver waits for its workers. Runs on the head (the driver).

The first signal asks the workers to save a checkpoint and stop; the second stops at once.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType

from launcher.errors import RunInterrupted

_POLL_S = 0.2


# A wish of the user, not an error.
class ForcedStop(Exception):  # noqa: N818
    """Raised when a wait ends early: at the second signal, or when there is nothing to save."""


def run_interruptibly(work: Callable[[], object], request_stop: Callable[[], bool]) -> None:
    """Run `work` in its own thread, so that this thread can handle signals; raise what it raises.

    Args:
        work: Function that blocks until the workers have exited.
        request_stop: Function to call at the first signal; returns False if there is nothing to wait for.

    Raises:
        ForcedStop: A second signal arrived, or there was nothing to wait for.
    """
    outcome: Future[None] = Future()
    # A daemon: after a forced stop it still waits for Ray, and must not keep the process alive.
    thread = threading.Thread(target=_run_into_future, args=(work, outcome), daemon=True)
    with _received_signals() as received:
        thread.start()
        is_stop_requested = False
        while thread.is_alive():
            # A join without a timeout would keep Python from running signal handlers in this thread.
            thread.join(_POLL_S)
            # Here and not in the handler, which may interrupt any code, a call of Ray included.
            if received and not is_stop_requested:
                is_stop_requested = True
                if not request_stop():
                    raise ForcedStop
            if len(received) > 1:
                raise ForcedStop
    outcome.result()


def interruptible_sleep(seconds: float, message: str) -> None:
    """Sleep until the time is over or a signal arrives.

    Raises:
        RunInterrupted: A signal arrived; carries `message`.
    """
    try:
        # Nothing is running that could save a checkpoint, so the first signal ends the wait.
        run_interruptibly(lambda: time.sleep(seconds), lambda: False)
    except ForcedStop as stop:
        raise RunInterrupted(message) from stop


def _run_into_future(work: Callable[[], object], outcome: "Future[None]") -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 -- crosses to the waiting thread, which raises it
        outcome.set_exception(error)
    else:
        outcome.set_result(None)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Yield the list of SIGINT and SIGTERM received inside the block; it grows as they arrive."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        # Python runs signal handlers in the main thread only.
        yield received
        return

    def record(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
