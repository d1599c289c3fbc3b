"""The error tree. Every error pickles, so it crosses Ray processes whole. Runs anywhere.

What a user can mend is a `UserError`: its text is one clear sentence (what, where, value, remedy) and the
command ends with exit code 2. `TrainingError` is a run that stopped for a reason of its own: exit code 1.
"""

from launcher.formatting import mask_secrets


class LauncherError(Exception):
    """Base of all errors the launcher raises on purpose; keys in the URIs of its text are masked."""

    def __init__(self, message: str) -> None:
        self.message = mask_secrets(message)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message,))


class UserError(LauncherError, ValueError):
    """Something the user can mend: bad input, told in one sentence."""


class SpecError(UserError):
    """The job file is wrong; carries one sentence per problem, all found at once."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(mask_secrets(problem) for problem in problems)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.problems,))


class DataError(UserError):
    """A file or a row cannot be used; names the file, the row and the remedy."""


class ModelError(UserError):
    """The pretrained model cannot be loaded as asked."""


class ClusterError(UserError):
    """The cluster cannot give what the job asks for."""


class RunError(UserError):
    """The run directory does not allow what was asked (nothing there, made by another job file)."""


class StorageUnavailableError(RunError):
    """A storage did not answer, or refused for now: a later try may succeed, so a running job bears it."""


class CorruptRecordError(RunError):
    """A record is there and is none: cut short, or not what its name says."""


class TrainingError(LauncherError, RuntimeError):
    """The run stopped: a loss that is not finite, a lost worker, a broken invariant."""


class MicroBatchOOMError(TrainingError):
    """A micro-batch did not fit into memory; a smaller one is written down, with which the workers may start again."""


class WorkerLostError(TrainingError):
    """A worker, its node or the cluster under it broke down; the run can go on from its last checkpoint."""


class NonFiniteLossError(TrainingError):
    """A loss was no number; its batch is left out from now on, and the run goes on from its last checkpoint."""


class CorruptCheckpointError(TrainingError):
    """A checkpoint cannot be read and was put aside; the run goes on from the one before it."""


class StaleAttemptError(TrainingError):
    """Another attempt of the same run has begun since, so this one may not write any more."""


class RunInterrupted(LauncherError):  # a wish of the user, not an error
    """The user stopped the run (Ctrl-C); what is saved is kept."""


class WeightDivergenceError(TrainingError):
    """Workers hold different weights: they train apart. Names the ranks."""


class RowCountError(TrainingError):
    """Rows were lost or repeated: the promise is broken, so the run stops instead of reporting wrong numbers."""
