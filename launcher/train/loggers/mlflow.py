"""MLflow: one run per launcher run, one child run per trial of a sweep. Head, and rank 0 of the train workers.

https://mlflow.org/docs/latest/ml/tracking/. The run's id stands in tracker.json of the run directory, so that a run
that goes on goes on in MLflow too. Training never waits for the server: numbers leave in a thread of their own, and a
server that is gone costs one warning.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from launcher.errors import RunError, SpecError
from launcher.formatting import mask_secrets
from launcher.rundir.directory import RunDir
from launcher.rundir.records import MetricsLine, TrackerRecord
from launcher.spec.job import JobSpec
from launcher.train.loggers.scalars import scalars_of

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

_FILE = "tracker.json"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100  # that MLflow takes in one request
_LONGEST = 500  # characters of a parameter that every MLflow store takes
_log = logging.getLogger("launcher")


def client(uri: str) -> "MlflowClient":
    """A client of a tracking server or store.

    Raises:
        SpecError: MLflow is not installed here.
        RunError: MLflow knows no such store.
    """
    # A dead server answers a person in seconds, not after MLflow's seven patient attempts.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise SpecError(
            ("logging.mlflow: MLflow is not installed; `pip install launcher[mlflow]`, or drop it",)
        ) from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise _unusable(uri, error) from error


def _unusable(uri: str, error: Exception) -> RunError:
    what = " ".join(str(error).split())[:200]
    return RunError(f"logging.mlflow: {uri} cannot be used ({what}); mend it, or drop logging.mlflow")


def find(run: RunDir, job: JobSpec) -> TrackerRecord | None:
    """What a run is called in the job's MLflow; None when it has no name there, or the job logs to none."""
    if job.logging.mlflow is None:
        return None
    known = run.find_record(_FILE, TrackerRecord)
    return known if known is not None and known.uri == job.logging.mlflow else None


def begin(run: RunDir, job: JobSpec, params: Mapping[str, object], parent: str | None = None) -> str | None:
    """Create a run's MLflow run, or find the one it has; its id, None when the job logs to none.

    Args:
        run: whose directory remembers the id.
        job: names the server and the experiment.
        params: what MLflow shows as the run's parameters.
        parent: MLflow run of the sweep that the trial belongs to.

    Raises:
        SpecError: MLflow is not installed.
        RunError: the server cannot be reached, or refuses.
    """
    uri = job.logging.mlflow
    if uri is None:
        return None
    known = find(run, job)
    if known is not None:
        return known.run_id
    made = client(uri)
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    tags = {"launcher.run": str(run)} | ({"mlflow.parentRunId": parent} if parent else {})
    try:
        experiment = _experiment(made, job.logging.experiment)
        run_id: str = made.create_run(experiment, run_name=job.name, tags=tags).info.run_id
        shown = [Param(key, mask_secrets(str(value))[:_LONGEST]) for key, value in params.items()]
        for first in range(0, len(shown), _PARAMS_AT_ONCE):
            made.log_batch(run_id, params=shown[first : first + _PARAMS_AT_ONCE])
    except MlflowException as error:
        raise _unusable(uri, error) from error
    run.write_record(_FILE, TrackerRecord(uri=uri, run_id=run_id))
    return run_id


def _experiment(made: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = made.get_experiment_by_name(name)
    if found is None:
        try:
            return str(made.create_experiment(name))
        except MlflowException:
            found = made.get_experiment_by_name(name)  # another run was faster
            if found is None:
                raise
    return str(found.experiment_id)


def end(run: RunDir, job: JobSpec, status: str, scores: Mapping[str, float] | None = None) -> None:
    """Close a run's MLflow run; returns at once, the process waits for the server when it ends.

    Args:
        run: whose directory remembers the id; nothing happens when there is none.
        job: names the server.
        status: FINISHED, FAILED or KILLED.
        scores: last numbers, as `test/accuracy`.
    """
    known = find(run, job)
    if known is not None:
        threading.Thread(target=_end, args=(known, status, scores or {}), name="mlflow-end").start()


def _end(known: TrackerRecord, status: str, scores: Mapping[str, float]) -> None:
    from mlflow.exceptions import MlflowException

    made = client(known.uri)
    try:
        for name, value in scores.items():
            made.log_metric(known.run_id, name, value)
        made.set_terminated(known.run_id, status)
    except MlflowException as error:
        _log.warning("MLflow at %s did not take the end of the run (%s)", mask_secrets(known.uri), error)


class MlflowSink:
    """Sends numbers to MLflow from a thread of its own; a `sinks.Sink`.

    Args:
        uri: tracking server or store.
        run_id: of the MLflow run.

    Raises:
        SpecError: MLflow is not installed on this node.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id, self._client = uri, run_id, client(uri)
        self._waiting: queue.Queue[tuple[int, int, dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, line: MetricsLine) -> None:
        scalars = scalars_of(line)
        if scalars:
            self._waiting.put((line.step, int(time.time() * 1000), scalars))

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(timeout=60)

    def _send(self) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        over = False
        while not over:
            batch: list[Metric] = []
            over = self._take(batch, Metric)
            try:
                for first in range(0, len(batch), _METRICS_AT_ONCE):
                    self._client.log_batch(self._run_id, metrics=batch[first : first + _METRICS_AT_ONCE])
            except (MlflowException, OSError) as error:
                _log.warning(
                    "MLflow at %s takes no more numbers (%s); metrics.jsonl has them", mask_secrets(self._uri), error
                )
                return

    def _take(self, batch: "list[Metric]", metric: "type[Metric]") -> bool:
        """All that waits, at least one; whether that was the end."""
        item = self._waiting.get()
        while item is not None:
            step, when, scalars = item
            batch += [metric(name, value, when, step) for name, value in scalars.items()]
            if self._waiting.empty():
                return False
            item = self._waiting.get()
        return True
