"""Whether a run goes on after a failure, and how soon. Pure; the driver asks, `driver/controller.py` acts."""

import re
import time
from collections.abc import Callable

from launcher.errors import TrainingError, WorkerLostError
from launcher.spec.fault_tolerance import FaultToleranceSpec

_LONGEST_S = 300.0


class FailurePolicy:
    """The failures that one command has seen.

    Args:
        spec: How many it bears, and within what time.
        clock: Seconds.
    """

    def __init__(self, spec: FaultToleranceSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._clock = spec, clock
        self._recent: list[float] = []
        self._same = self._without_progress = 0
        self._last: tuple[int, str] | None = None

    def decide(self, error: WorkerLostError, step: int) -> float:
        """Count one; returns the seconds to wait before the workers are started again.

        Args:
            error: what happened.
            step: last step that the run has logged.

        Raises:
            TrainingError: it is one too many, or always the same.
        """
        here = (step, have_same_cause(error.message))
        now = self._clock()
        self._recent = [at for at in self._recent if now - at < 3600 * self._spec.within_hours] + [now]
        self._same = self._same + 1 if here == self._last else 1
        progressed = self._last is None or step > self._last[0]
        self._without_progress = 0 if progressed else self._without_progress + 1
        self._last = here
        if len(self._recent) > self._spec.max_failures:
            raise TrainingError(
                f"{error.message}; this was failure {len(self._recent)} within {self._spec.within_hours:g} hours, and "
                f"fault_tolerance.max_failures is {self._spec.max_failures}; the same command goes on from the last "
                "checkpoint"
            )
        if self._same >= self._spec.same_step:
            times = f"{self._same} times in a row" if self._same > 1 else "once"
            raise TrainingError(
                f"{error.message}; it failed {times} after step {step} for the same reason, so it would again "
                f"(fault_tolerance.same_step is {self._spec.same_step}); mend the cause, and the same command goes on"
            )
        if not self._without_progress:
            return 0.0
        return float(min(_LONGEST_S, self._spec.backoff_s * 2.0 ** (self._without_progress - 1)))

    def said(self) -> str:
        """How many there were, for the console."""
        bears = f"{self._spec.max_failures} that it bears within {self._spec.within_hours:g} hours"
        return f"failure {len(self._recent)} of {bears}"


def have_same_cause(message: str) -> str:
    """A reason without what differs from one time to the next: addresses, process ids, ranks, times."""
    return re.sub(r"\b(?:0x)?[0-9a-f]*\d[0-9a-f]*\b", "#", message.lower())
