"""MLflow: one MLflow run per launcher run, with a child run per trial of a sweep. Runs on the head and on rank 0.

https://mlflow.org/docs/latest/ml/tracking/. The id is kept in tracker.json of the run directory, so that a resumed run
continues its MLflow run. Training never waits for the server: a thread sends the numbers, and a server that does not
answer costs one warning. `trackers.py` calls this on the head, `sinks.py` in the workers.
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

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

_FILE = "tracker.json"
# Limits of one `log_batch` request (mlflow/utils/validation.py).
_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
# Accepted by every MLflow store.
_MAX_PARAM_CHARS = 500
# A server that does not answer delays the end of the training by this much at most.
_CLOSE_S = 60.0
_LOG = logging.getLogger("launcher")


def client(uri: str) -> "MlflowClient":
    """Return a client of a tracking server or store.

    Raises:
        SpecError: MLflow is not installed here.
        RunError: MLflow does not support the store.
    """
    # MLflow's default is seven attempts with a growing delay: minutes until a wrong address is reported.
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
    reason = " ".join(str(error).split())[:200]
    return RunError(f"logging.mlflow: {uri} cannot be used ({reason}); fix it, or drop logging.mlflow")


def find(run: RunDir, job: JobSpec) -> TrackerRecord | None:
    """Return the record of a run's MLflow run; None if it has none in the job's MLflow, or the job does not use it."""
    if job.logging.mlflow is None:
        return None
    record = run.find_record(_FILE, TrackerRecord)
    return record if record is not None and record.uri == job.logging.mlflow else None


def begin(run: RunDir, job: JobSpec, params: Mapping[str, object], parent: str | None = None) -> str | None:
    """Create a run's MLflow run, or find the one it has; arguments as for `trackers.begin`.

    Returns:
        MLflow run id; None if the job does not use MLflow.

    Raises:
        SpecError: MLflow is not installed.
        RunError: The server cannot be reached, or rejects the run.
    """
    uri = job.logging.mlflow
    if uri is None:
        return None
    record = find(run, job)
    if record is not None:
        return record.run_id
    connection = client(uri)
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    tags = {"launcher.run": str(run)} | ({"mlflow.parentRunId": parent} if parent else {})
    try:
        experiment = _experiment_id(connection, job.logging.experiment)
        run_id: str = connection.create_run(experiment, run_name=job.name, tags=tags).info.run_id
        logged = [Param(key, mask_secrets(str(value))[:_MAX_PARAM_CHARS]) for key, value in params.items()]
        for first in range(0, len(logged), _PARAMS_PER_REQUEST):
            connection.log_batch(run_id, params=logged[first : first + _PARAMS_PER_REQUEST])
    except MlflowException as error:
        raise _unusable(uri, error) from error
    # After the parameters: a run whose record exists is complete. A failure before it leaves an orphan at the server.
    run.write_record(_FILE, TrackerRecord(uri=uri, run_id=run_id))
    return run_id


def _experiment_id(connection: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = connection.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(connection.create_experiment(name))
        except MlflowException:
            # Another run has created it in the meantime.
            experiment = connection.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def end(run: RunDir, job: JobSpec, status: str, scores: Mapping[str, float] | None = None) -> None:
    """Close a run's MLflow run, if it has one. Returns at once; the process waits for the thread before it exits.

    Arguments as for `trackers.end`.
    """
    record = find(run, job)
    if record is not None:
        threading.Thread(target=_end, args=(record, status, scores or {}), name="mlflow-end").start()


def _end(record: TrackerRecord, status: str, scores: Mapping[str, float]) -> None:
    from mlflow.exceptions import MlflowException

    connection = client(record.uri)
    try:
        for name, value in scores.items():
            connection.log_metric(record.run_id, name, value)
        connection.set_terminated(record.run_id, status)
    except MlflowException as error:
        _LOG.warning("MLflow at %s did not accept the end of the run (%s)", mask_secrets(record.uri), error)


class MlflowSink:
    """Sink that sends numbers to MLflow from its own thread.

    Args:
        uri: Tracking server or store.
        run_id: Id of the MLflow run.

    Raises:
        SpecError: MLflow is not installed on this node.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._client = client(uri)
        self._queue: queue.Queue[tuple[int, int, Mapping[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, line: MetricsLine, scalars: Mapping[str, float]) -> None:
        if scalars:
            # Stamped here, as the thread may send it much later.
            self._queue.put((line.step, int(time.time() * 1000), scalars))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=_CLOSE_S)

    def _send(self) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        is_last = False
        while not is_last:
            # All that has gathered while the last request was under way: one request instead of one per line.
            batch: list[Metric] = []
            is_last = self._drain_queue(batch, Metric)
            try:
                for first in range(0, len(batch), _METRICS_PER_REQUEST):
                    self._client.log_batch(self._run_id, metrics=batch[first : first + _METRICS_PER_REQUEST])
            except (MlflowException, OSError) as error:
                _LOG.warning(
                    "MLflow at %s accepts no more numbers (%s); metrics.jsonl has them", mask_secrets(self._uri), error
                )
                # Nobody reads the queue any more. It grows by a few numbers per line of the log, which memory can hold.
                return

    def _drain_queue(self, batch: "list[Metric]", metric: "type[Metric]") -> bool:
        """Append all queued numbers to the batch, waiting for at least one; return True after the last ones."""
        item = self._queue.get()
        while item is not None:
            step, timestamp_ms, scalars = item
            batch += [metric(name, value, timestamp_ms, step) for name, value in scalars.items()]
            if self._queue.empty():
                return False
            item = self._queue.get()
        return True
