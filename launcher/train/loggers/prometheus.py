"""A run's numbers for Prometheus, through Ray: each node tells them at its metrics port. Rank 0, and the driver.

Ray puts `ray_` before each name and adds the node; `cluster/monitoring/` has a dashboard and alerts made of them.
https://docs.ray.io/en/latest/ray-observability/user-guides/add-app-metrics.html
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge

from launcher.errors import LauncherError, RunInterrupted
from launcher.rundir.records import EvaluationRecord, MetricsLine, StepRecord, TimesRecord
from launcher.spec.job import JobSpec

_RUN = ("run",)

GAUGES = {
    "launcher_step": "Optimizer steps done.",
    "launcher_epoch": "Pass over the training data, counted from 1.",
    "launcher_loss": "Loss of the latest step over its global batch.",
    "launcher_learning_rate": "Learning rate of the latest step.",
    "launcher_grad_norm": "L2 norm of the latest global gradient before clipping.",
    "launcher_samples_per_second": "Samples trained per second, all workers together.",
}
"""Name and meaning of what goes up and down; the label is `run`."""

COUNTERS = {
    "launcher_samples": "Samples trained.",
    "launcher_data_wait_seconds": "Seconds the slowest worker waited for data.",
    "launcher_communication_seconds": "Seconds the fastest worker waited for the others, and for the network.",
    "launcher_evaluation_seconds": "Seconds spent in evaluations.",
    "launcher_checkpoint_seconds": "Seconds training stood still for checkpoints.",
    "launcher_training_seconds": "Seconds of training, with all of the above.",
}
"""Name and meaning of what only grows; Prometheus shows them with `_total` behind, the label is `run`."""

SCORE = "launcher_validation"
"""Gauge of the latest evaluation, labels `run`, `split` and `metric`."""

FAILURES = "launcher_failures"
"""Counter of the driver: what ended the workers early, labels `run` and `kind`."""

STOPPED, PREEMPTED, LOST, FAILED = "stopped", "preempted", "lost", "error"
"""Kinds of failures: asked for, a node was taken away, anything else."""


class PrometheusSink:
    """Hands the lines of one run to Ray; a `sinks.Sink`.

    Args:
        run: the run's name, which becomes a label.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._gauges = {name: Gauge(name, text, _RUN) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, text, _RUN) for name, text in COUNTERS.items()}
        self._score = Gauge(SCORE, "Loss and metrics of the latest evaluation.", ("run", "split", "metric"))

    def write(self, line: MetricsLine) -> None:
        if isinstance(line, StepRecord):
            self._step(line)
        elif isinstance(line, TimesRecord):
            self._count("launcher_training_seconds", line.seconds)
            self._count("launcher_data_wait_seconds", max(line.data_s))
            self._count("launcher_communication_seconds", max(line.communication_s, default=0.0))
            self._count("launcher_evaluation_seconds", max(line.evaluation_s))
            self._count("launcher_checkpoint_seconds", max(line.checkpoint_s))
        elif isinstance(line, EvaluationRecord):
            for metric, value in {"loss": line.loss, **line.metrics}.items():
                self._score.set(value, self._run | {"split": line.split, "metric": metric})

    def close(self) -> None:
        """Ray lets go of the numbers when this process ends."""

    def _step(self, line: StepRecord) -> None:
        values = {
            "launcher_step": line.step,
            "launcher_epoch": line.epoch,
            "launcher_loss": line.loss,
            "launcher_learning_rate": line.learning_rate,
            "launcher_grad_norm": line.grad_norm,
            "launcher_samples_per_second": line.samples_per_s,
        }
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(float(value), self._run)
        self._count("launcher_samples", line.samples)

    def _count(self, name: str, amount: float) -> None:
        if amount > 0:
            self._counters[name].inc(amount, self._run)


@contextmanager
def count_attempt(job: JobSpec) -> Iterator[None]:
    """Count what ends the block early, within the session of Ray that the driver holds."""
    try:
        yield
    except RunInterrupted:
        count_failure(job, STOPPED)
        raise
    except LauncherError:
        count_failure(job, FAILED)
        raise


def count_failure(job: JobSpec, kind: str) -> None:
    """Tell that the workers of a run ended early.

    Args:
        job: the run's; nothing happens when it tells Prometheus nothing.
        kind: `STOPPED`, `PREEMPTED`, `LOST` or `FAILED`.
    """
    if job.logging.prometheus:
        failures = Counter(FAILURES, "What ended the workers of a run early.", ("run", "kind"))
        failures.inc(1, {"run": job.name, "kind": kind})
