"""Metrics of a run for Prometheus, exported by Ray at each node's metrics port. Runs on rank 0 and in the driver.

Ray adds the prefix `ray_` to each name and a label for the node; `cluster/monitoring/` has a dashboard and alerts.
https://docs.ray.io/en/latest/ray-observability/user-guides/add-app-metrics.html
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge

from launcher.errors import LauncherError, RunInterrupted
from launcher.rundir.records import EvaluationRecord, MetricsLine, StepRecord, TimesRecord
from launcher.spec.job import JobSpec

_RUN_LABEL = ("run",)

GAUGES = {
    "launcher_step": "Optimizer steps completed.",
    "launcher_epoch": "Current epoch, counted from 1.",
    "launcher_loss": "Loss of the latest step over its global batch.",
    "launcher_learning_rate": "Learning rate of the latest step.",
    "launcher_grad_norm": "L2 norm of the latest global gradient before clipping.",
    "launcher_samples_per_second": "Samples trained per second, all workers together.",
}
"""Gauges and their help text; the label is `run`."""

COUNTERS = {
    "launcher_samples": "Samples trained.",
    "launcher_data_wait_seconds": "Seconds the slowest worker waited for data.",
    "launcher_communication_seconds": "Largest time that a worker waited in collectives, in seconds.",
    "launcher_evaluation_seconds": "Seconds spent in evaluations.",
    "launcher_checkpoint_seconds": "Seconds that training waited for checkpoints.",
    "launcher_training_seconds": "Seconds of training, including all of the above.",
}
"""Counters and their help text; Prometheus appends `_total` to each name. The label is `run`."""

SCORE = "launcher_validation"
"""Gauge of the latest evaluation, labels `run`, `split` and `metric`."""

FAILURES = "launcher_failures"
"""Counter of the driver: attempts that ended early, labels `run` and `kind`."""

STOPPED, PREEMPTED, LOST, FAILED = "stopped", "preempted", "lost", "error"
"""Kinds of early ends: a requested stop, a drained node, lost workers, any other error."""


class PrometheusSink:
    """Sink that exports the numbers of one run through Ray.

    Args:
        run: Name of the run, which becomes a label.
    """

    def __init__(self, run: str) -> None:
        self._labels = {"run": run}
        self._gauges = {name: Gauge(name, text, _RUN_LABEL) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, text, _RUN_LABEL) for name, text in COUNTERS.items()}
        self._score = Gauge(SCORE, "Loss and metrics of the latest evaluation.", ("run", "split", "metric"))

    def write(self, line: MetricsLine, scalars: Mapping[str, float]) -> None:
        if isinstance(line, StepRecord):
            self._write_step(line)
        elif isinstance(line, TimesRecord):
            self._increase("launcher_training_seconds", line.seconds)
            # The slowest rank, as the others wait for it.
            self._increase("launcher_data_wait_seconds", max(line.data_s))
            self._increase("launcher_communication_seconds", max(line.communication_s, default=0.0))
            self._increase("launcher_evaluation_seconds", max(line.evaluation_s))
            self._increase("launcher_checkpoint_seconds", max(line.checkpoint_s))
        elif isinstance(line, EvaluationRecord):
            for metric, value in {"loss": line.loss, **line.metrics}.items():
                self._score.set(value, self._labels | {"split": line.split, "metric": metric})

    def close(self) -> None:
        """Keep the metrics; Ray drops them when this process exits."""

    def _write_step(self, line: StepRecord) -> None:
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
                self._gauges[name].set(float(value), self._labels)
        self._increase("launcher_samples", line.samples)

    def _increase(self, name: str, amount: float) -> None:
        # Ray's counters raise for an increment of zero (ray 2.60, util/metrics.py).
        if amount > 0:
            self._counters[name].inc(amount, self._labels)


@contextmanager
def count_attempt(job: JobSpec) -> Iterator[None]:
    """Count an early end of the block by its exception. Needs the driver's Ray session."""
    try:
        yield
    # First: it is a LauncherError too.
    except RunInterrupted:
        count_failure(job, STOPPED)
        raise
    except LauncherError:
        count_failure(job, FAILED)
        raise


def count_failure(job: JobSpec, kind: str) -> None:
    """Count an early end of a run's workers, if the job exports metrics.

    Args:
        job: Job of the run.
        kind: `STOPPED`, `PREEMPTED`, `LOST` or `FAILED`.
    """
    if job.logging.prometheus:
        failures = Counter(FAILURES, "Attempts of a run that ended early.", ("run", "kind"))
        failures.inc(1, {"run": job.name, "kind": kind})
