"""Decides whether a run restarts after a failure, and after how long. Pure; runs on the head (the driver).

`driver/controller.py` asks, waits and restarts the workers.
"""

import re
import time
from collections.abc import Callable

from launcher.errors import TrainingError, WorkerLostError
from launcher.spec.fault_tolerance import FaultToleranceSpec

_MAX_WAIT_S = 300.0


class FailurePolicy:
    """Retry budget and backoff of one command (the counterpart of Ray Train V2's `FailurePolicy`).

    Args:
        spec: Limits on failures, and the first wait in seconds.
        clock: Clock in seconds; tests replace it.
    """

    def __init__(self, spec: FaultToleranceSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec = spec
        self._clock = clock
        self._failure_times: list[float] = []
        self._repeats = 0
        self._failures_without_progress = 0
        self._last_failure: tuple[int, str] | None = None

    def decide(self, error: WorkerLostError, step: int) -> float:
        """Count a failure and return the seconds to wait before the workers restart.

        The wait doubles with every failure that follows without a new step in between; it is 0 after progress.

        Args:
            error: Failure that ended the workers.
            step: Last step in the run's log.

        Raises:
            TrainingError: The failure exceeds `max_failures`, or repeats at the same step for the same reason.
        """
        # The step of the log, not of the newest checkpoint: two failures at different steps after one checkpoint are no
        # repeat.
        failure = (step, normalize_cause(error.message))
        now = self._clock()
        window_s = 3600 * self._spec.within_hours
        # A sliding window: a run of weeks may lose many nodes, and only a burst of failures is a reason to give up.
        self._failure_times = [at for at in self._failure_times if now - at < window_s] + [now]
        self._repeats = self._repeats + 1 if failure == self._last_failure else 1
        # Steps up to the last failure are trained again after it. Only those beyond are progress.
        has_progressed = self._last_failure is None or step > self._last_failure[0]
        self._failures_without_progress = 0 if has_progressed else self._failures_without_progress + 1
        self._last_failure = failure
        if len(self._failure_times) > self._spec.max_failures:
            raise TrainingError(
                f"{error.message}; this was failure {len(self._failure_times)} within {self._spec.within_hours:g} "
                f"hours, and fault_tolerance.max_failures is {self._spec.max_failures}; run the same command again to "
                "resume from the last checkpoint"
            )
        if self._repeats >= self._spec.same_step:
            times = f"{self._repeats} times in a row" if self._repeats > 1 else "once"
            raise TrainingError(
                f"{error.message}; it failed {times} after step {step} for the same reason, so it would fail again "
                f"(fault_tolerance.same_step is {self._spec.same_step}); fix the cause and run the same command again"
            )
        if not self._failures_without_progress:
            return 0.0
        return float(min(_MAX_WAIT_S, self._spec.backoff_s * 2.0 ** (self._failures_without_progress - 1)))

    def summary(self) -> str:
        """Return the number of recent failures and their limit, for the console."""
        spec = self._spec
        return f"failure {len(self._failure_times)} of at most {spec.max_failures} within {spec.within_hours:g} hours"


def normalize_cause(message: str) -> str:
    """Return a failure message with addresses, process ids, ranks and times masked, so that repeats compare equal."""
    # A digit is required: `dead` and `face` are words, not addresses.
    return re.sub(r"\b(?:0x)?[0-9a-f]*\d[0-9a-f]*\b", "#", message.lower())
