"""`fault_tolerance:` in the job file: what a run does when something breaks; nothing here changes the curve."""

from pydantic import Field

from launcher.spec.base import Section


class FaultToleranceSpec(Section):
    """How long a run goes on by itself: each failure starts the workers again from the last checkpoint."""

    max_failures: int = Field(default=8, ge=0)
    """Lost workers, nodes and processes within `within_hours` after which the command gives up; 0 gives up at the
    first. Nodes that say beforehand that they go away, and memory that ran out, are not counted."""

    within_hours: float = Field(default=24.0, gt=0.0)
    """Hours after which a failure is forgotten: a long run on many nodes loses one now and then."""

    same_step: int = Field(default=3, ge=1)
    """Give up when the same step fails so often in a row for the same reason: what always fails is no accident."""

    hang_s: float | None = Field(default=900.0, ge=30.0)
    """Seconds without any progress of any worker after which the run says for whom it waits, dumps the stacks of all
    workers to `hangs/` and starts them again; a worker that is not even heard of counts after one minute. Null waits
    for ever."""

    backoff_s: float = Field(default=2.0, ge=0.0, le=3600.0)
    """Seconds before the workers are started again where no step was gained since the failure before, else they are
    at once; doubled with each further such failure, up to five minutes."""
