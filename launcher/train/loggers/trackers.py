"""Experiment trackers of a run: MLflow (`mlflow.py`) and W&B (`wandb.py`) together. Runs on the head."""

from collections.abc import Mapping

from launcher.rundir.directory import RunDir
from launcher.spec.job import JobSpec
from launcher.train.loggers import mlflow, wandb


def begin(run: RunDir, job: JobSpec, params: Mapping[str, object], parent: str | None = None) -> None:
    """Create the run in the job's trackers, or find the one it already has there.

    Args:
        run: Run directory, which keeps the tracker's ids.
        job: Job that names the trackers.
        params: Parameters that the trackers show for the run.
        parent: MLflow run id of the sweep that the trial belongs to; None outside of a sweep.

    Raises:
        SpecError: A tracker's library is not installed.
        RunError: MLflow cannot be reached, or rejects the run.
    """
    wandb.begin(run, job, params)
    mlflow.begin(run, job, params, parent)


def end(run: RunDir, job: JobSpec, status: str, scores: Mapping[str, float] | None = None) -> None:
    """Close the run in the job's trackers. Returns at once; threads send the rest.

    Args:
        run: Run directory, which keeps the tracker's ids.
        job: Job that names the trackers.
        status: FINISHED, FAILED or KILLED.
        scores: Final numbers such as `test/accuracy`; None without any.
    """
    wandb.end(run, job, status, scores)
    mlflow.end(run, job, status, scores)
