"""Fingerprint of a run's training data as they are now. Runs on the client (`launcher verify`)."""

from launcher.driver.prepare import open_splits
from launcher.rundir.directory import RunDir, runnable_job


def read_fingerprint(run: RunDir) -> str:
    """Return the fingerprint of the training data that a run's job file names.

    Raises:
        UserError: The data cannot be read here, or the job file asks for a permission.
    """
    # The training data alone: the other splits may be gone.
    return open_splits(runnable_job(run), names=("train",))["train"].fingerprint
