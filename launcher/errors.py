"""All errors of the launcher. Each can be pickled, so it passes between Ray processes. Runs anywhere.

A `UserError` is something the user can fix: its text is one sentence (what, where, value, what is allowed, how to fix
it), and the command exits with code 2. A `TrainingError` stops a run: exit code 1.
"""

from launcher.formatting import mask_secrets


class LauncherError(Exception):
    """Base of all errors that the launcher raises deliberately. Secrets in URIs are masked."""

    def __init__(self, message: str) -> None:
        # Masked at the source: from here the text goes to logs, to records and through Ray.
        self.message = mask_secrets(message)
        super().__init__(self.message)

    # BaseException would call the class with `args`. A subclass whose __init__ takes something else needs its own.
    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message,))


class UserError(LauncherError, ValueError):
    """Invalid input that the user can fix, described in one sentence."""


class SpecError(UserError):
    """Invalid job file, with one sentence for each problem."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(mask_secrets(problem) for problem in problems)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.problems,))


class DataError(UserError):
    """Unusable data file or row. The text names the file, the row and the fix."""


class ModelError(UserError):
    """Model that cannot be loaded as the job file asks."""


class ClusterError(UserError):
    """Cluster that cannot provide what the job needs."""


class RunError(UserError):
    """Run directory that does not fit the command (no run there, or the run of another job file)."""


class StorageUnavailableError(RunError):
    """Storage that did not answer or failed temporarily. Running jobs tolerate it, since a retry may succeed."""


class CorruptRecordError(RunError):
    """Record file that exists but is truncated or not of its type."""


class TrainingError(LauncherError, RuntimeError):
    """Failure that stops a run: a non-finite loss, a lost worker, a broken invariant."""


class MicroBatchOOMError(TrainingError):
    """Micro-batch that did not fit into memory. A smaller size is recorded, with which the workers can restart."""


class WorkerLostError(TrainingError):
    """Loss of a worker, its node or the cluster. The run can resume from its last checkpoint."""


class NonFiniteLossError(TrainingError):
    """Non-finite loss whose batch is skipped from now on. The run resumes from its last checkpoint."""


class CorruptCheckpointError(TrainingError):
    """Unreadable checkpoint, now quarantined. The run resumes from the previous one."""


class StaleAttemptError(TrainingError):
    """Attempt that must stop writing, because a newer attempt of the same run has started."""


# Not named ...Error: the user asked for it.
class RunInterrupted(LauncherError):  # noqa: N818
    """Run stopped by the user (Ctrl-C). Saved checkpoints stay valid."""


class WeightDivergenceError(TrainingError):
    """Different weights on different workers. The text names the ranks."""


class RowCountError(TrainingError):
    """Lost or repeated rows. The run stops instead of reporting wrong metrics."""
