"""SIGTERM and Ctrl-C while the driver waits for its workers. Runs on the head (the driver).

The first asks the workers to save a checkpoint and stop; the second stops at once.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType

from launcher.errors import RunInterrupted

_LOOK_S = 0.2


class ForcedStop(Exception):
    """The wait ended before what was waited for: nothing could be saved, or somebody could not wait."""


def run_interruptibly(work: Callable[[], object], ask_stop: Callable[[], bool]) -> None:
    """Do `work` in a thread of its own, so that signals reach this one; raises what it raises.

    Args:
        work: blocks until the workers are done.
        ask_stop: called at the first signal; False when there is nothing to wait for.

    Raises:
        ForcedStop: at the second signal, or when there was nothing to wait for.
    """
    outcome: Future[None] = Future()
    thread = threading.Thread(target=_settle, args=(work, outcome), daemon=True)
    with _counted() as seen:
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(_LOOK_S)
            if seen and not asked:
                asked = True
                if not ask_stop():
                    raise ForcedStop
            if len(seen) > 1:
                raise ForcedStop
    outcome.result()


def interruptible_sleep(seconds: float, said: str) -> None:
    """Wait; a signal ends it.

    Raises:
        RunInterrupted: one came; says `said`.
    """
    try:
        run_interruptibly(lambda: time.sleep(seconds), lambda: False)
    except ForcedStop as stop:
        raise RunInterrupted(said) from stop


def _settle(work: Callable[[], object], outcome: "Future[None]") -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 -- crosses to the waiting thread, which raises it
        outcome.set_exception(error)
    else:
        outcome.set_result(None)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The signals that came so far."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # Python lets the main thread alone handle signals
        return

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
