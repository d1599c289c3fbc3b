"""The trackers of a run, together: MLflow (`train/loggers/mlflow.py`) and W&B (`train/loggers/wandb.py`). Head."""

from collections.abc import Mapping

from launcher.rundir.directory import RunDir
from launcher.spec.job import JobSpec
from launcher.train.loggers import mlflow, wandb


def begin(run: RunDir, job: JobSpec, params: Mapping[str, object], parent: str | None = None) -> None:
    """Give a run its names in the job's trackers, or find the ones it has.

    Args:
        run: whose directory remembers them.
        job: names the trackers.
        params: what they show as the run's parameters.
        parent: MLflow run of the sweep that the trial belongs to.

    Raises:
        SpecError: a tracker's library is not installed.
        RunError: MLflow cannot be reached, or refuses.
    """
    wandb.begin(run, job, params)
    mlflow.begin(run, job, params, parent)


def end(run: RunDir, job: JobSpec, status: str, scores: Mapping[str, float] | None = None) -> None:
    """Close a run in the job's trackers; returns at once.

    Args:
        run: whose directory remembers its names.
        job: names the trackers.
        status: FINISHED, FAILED or KILLED.
        scores: last numbers, as `test/accuracy`.
    """
    wandb.end(run, job, status, scores)
    mlflow.end(run, job, status, scores)
