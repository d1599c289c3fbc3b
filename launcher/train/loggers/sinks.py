"""Sinks: where a run's numbers go in addition to metrics.jsonl. Runs on rank 0 of the train workers.

A sink must not stop the training it watches: each one logs its own failures. TensorBoard's sink is here; `mlflow.py`,
`wandb.py` and `prometheus.py` have the others, and `run_log.py` feeds them all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, GenerationRecord, MetricsLine, TimesRecord
from launcher.spec.job import JobSpec
from launcher.train.loggers import mlflow, wandb
from launcher.train.loggers.prometheus import PrometheusSink


class Sink(Protocol):
    """Receiver of a run's numbers."""

    def write(self, line: MetricsLine, scalars: Mapping[str, float]) -> None:
        """Take one line of metrics.jsonl; must not block on a network.

        Args:
            line: Line of metrics.jsonl.
            scalars: Numbers of the line as `scalars_of` names them; may be empty.
        """

    def close(self) -> None:
        """Send what is pending and release resources. A later attempt of the run may open the sink again."""


def scalars_of(line: MetricsLine) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl under their names in trackers, `group/name`; {} without any."""
    if isinstance(line, GenerationRecord):
        return {}
    if isinstance(line, EvaluationRecord):
        return {f"{line.split}/{name}": value for name, value in {"loss": line.loss, **line.metrics}.items()}
    if isinstance(line, TimesRecord):
        # The maximum over ranks: the others wait for the slowest one.
        return {
            "time/data_s": max(line.data_s),
            "time/communication_s": max(line.communication_s, default=0.0),
            "time/evaluation_s": max(line.evaluation_s),
            "time/checkpoint_s": max(line.checkpoint_s),
        }
    scalars = {
        "train/loss": line.loss,
        "train/learning_rate": line.learning_rate,
        "train/samples_per_s": line.samples_per_s,
    }
    scalars |= {f"train/loss/{source}": loss for source, loss in (line.sources or {}).items()}
    return scalars if line.grad_norm is None else scalars | {"train/grad_norm": line.grad_norm}


class TensorBoardSink:
    """TensorBoard event files in the run directory.

    Args:
        folder: Directory of the event files.
        resumed_step: Step that the run resumes from; TensorBoard hides what an earlier attempt wrote after it.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        # From the next step on: the resumed step itself was written before its checkpoint was saved.
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, line: MetricsLine, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, line.step)

    def close(self) -> None:
        self._writer.close()


def open_sinks(run: RunDir, job: JobSpec, resumed_step: int) -> list[Sink]:
    """Open all sinks that the job asks for."""
    sinks: list[Sink] = []
    # An event file grows, and object stores cannot append; metrics.jsonl has the same numbers.
    if run.local is not None:
        sinks.append(TensorBoardSink(Path(run.local) / "tensorboard", resumed_step))
    mlflow_run = mlflow.find(run, job)
    if mlflow_run is not None:
        sinks.append(mlflow.MlflowSink(mlflow_run.uri, mlflow_run.run_id))
    wandb_run = wandb.find(run, job)
    if wandb_run is not None:
        sinks.append(wandb.WandbSink(run, wandb_run))
    if job.logging.prometheus:
        sinks.append(PrometheusSink(job.name))
    return sinks
