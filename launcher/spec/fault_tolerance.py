"""`fault_tolerance:` in the job file: when and how often a run restarts after a failure. Runs anywhere.

Nothing here changes the loss curve.
"""

from pydantic import Field

from launcher.spec.base import Section


class FaultToleranceSpec(Section):
    """`fault_tolerance:` Limits of automatic restarts. Each restart resumes from the newest valid checkpoint."""

    max_failures: int = Field(default=8, ge=0)
    """Failures (lost workers, nodes or processes) allowed within `within_hours`; 0 stops at the first. Preempted nodes
    and out-of-memory errors are not counted."""

    within_hours: float = Field(default=24.0, gt=0.0)
    """Hours after which a failure no longer counts, since a long run on many nodes loses one now and then."""

    same_step: int = Field(default=3, ge=1)
    """Stop after this many failures in a row at the same step for the same reason."""

    hang_s: float | None = Field(default=900.0, ge=30.0)
    """Seconds without progress of any worker after which the run reports which workers it waits for, writes the stacks
    of all workers to `hangs/` and restarts them. A worker without a heartbeat counts as hung after one minute. Null
    waits for ever."""

    backoff_s: float = Field(default=2.0, ge=0.0, le=3600.0)
    """Seconds before a restart if no step was completed since the previous failure, doubled each time up to five
    minutes. After progress the run restarts at once."""
