"""Where the numbers of a run go beside metrics.jsonl. Rank 0 of the train workers.

A sink that fails must not stop the training it watches: `train/loggers/mlflow.py` and TensorBoard's writer see to
that themselves.
"""

from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from launcher.rundir.directory import RunDir
from launcher.rundir.records import MetricsLine
from launcher.spec.job import JobSpec
from launcher.train.loggers import mlflow, wandb
from launcher.train.loggers.prometheus import PrometheusSink
from launcher.train.loggers.scalars import scalars_of


class Sink(Protocol):
    """Takes numbers as they come."""

    def write(self, line: MetricsLine) -> None:
        """Take a line of metrics.jsonl."""

    def close(self) -> None:
        """Finish; more may come from another attempt."""


class TensorBoardSink:
    """TensorBoard's event files, below the run directory.

    Args:
        folder: where they go.
        resumed_step: what was written after it is taken back.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, line: MetricsLine) -> None:
        for name, value in scalars_of(line).items():
            self._writer.add_scalar(name, value, line.step)

    def close(self) -> None:
        self._writer.close()


def open_sinks(run: RunDir, job: JobSpec, resumed_step: int) -> list[Sink]:
    """All sinks of a run."""
    sinks: list[Sink] = []
    # Event files cannot grow on an object store; metrics.jsonl holds the same numbers there.
    if run.local is not None:
        sinks.append(TensorBoardSink(Path(run.local) / "tensorboard", resumed_step))
    found = mlflow.find(run, job)
    if found is not None:
        sinks.append(mlflow.MlflowSink(found.uri, found.run_id))
    at_wandb = wandb.find(run, job)
    if at_wandb is not None:
        sinks.append(wandb.WandbSink(run, at_wandb))
    if job.logging.prometheus:
        sinks.append(PrometheusSink(job.name))
    return sinks
