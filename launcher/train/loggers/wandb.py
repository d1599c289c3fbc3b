"""Weights & Biases: one W&B run per launcher run, the trials of a sweep in one group. Runs on the head and on rank 0.

https://docs.wandb.ai/ref/python/. The id is kept in wandb.json of the run directory, so that a resumed run continues
its W&B run. wandb's own variables choose account and server (WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE=offline).
Training never waits: a thread opens the run and sends, and a server that does not answer costs one warning.
"""

import logging
import os
import queue
import tempfile
import threading
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from launcher.errors import SpecError
from launcher.formatting import mask_secrets
from launcher.rundir.directory import RunDir
from launcher.rundir.records import MetricsLine, Record
from launcher.spec.job import JobSpec

if TYPE_CHECKING:
    import wandb

_FILE = "wandb.json"
_MAX_PARAM_CHARS = 500
_INIT_S = 30.0
_CLOSE_S = 60.0
# 255 is wandb's own code for Ctrl-C.
_EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}
_TRIALS = "/sweep/trials/"
_LOG = logging.getLogger("launcher")


class WandbRecord(Record):
    """wandb.json: identity of a run at W&B."""

    project: str
    """PROJECT or ENTITY/PROJECT, as in the job file."""
    run_id: str
    name: str
    group: str | None
    """Sweep that a trial belongs to; None outside of a sweep."""
    params: dict[str, str]


def find(run: RunDir, job: JobSpec) -> WandbRecord | None:
    """Return the record of a run at W&B; None if it has none in the job's project, or the job does not use W&B."""
    if job.logging.wandb is None:
        return None
    record = run.find_record(_FILE, WandbRecord)
    return record if record is not None and record.project == job.logging.wandb else None


def begin(run: RunDir, job: JobSpec, params: Mapping[str, object]) -> None:
    """Write a run's W&B record, unless it has one. Does not contact the server.

    Raises:
        SpecError: wandb is not installed.
    """
    if job.logging.wandb is None:
        return
    if find_spec("wandb") is None:
        raise SpecError(("logging.wandb: wandb is not installed; `pip install launcher[wandb]`, or drop it",))
    if find(run, job) is not None:
        return
    sweep, separator, trial = run.uri.partition(_TRIALS)
    group = RunDir(sweep).name if separator else None
    record = WandbRecord(
        project=job.logging.wandb,
        run_id=uuid.uuid4().hex[:12],
        name=f"{group}/{RunDir(trial).name}" if group else job.name,
        group=group,
        params={key: mask_secrets(str(value))[:_MAX_PARAM_CHARS] for key, value in params.items()},
    )
    run.write_record(_FILE, record)


def end(run: RunDir, job: JobSpec, status: str, scores: Mapping[str, float] | None = None) -> None:
    """Close a run at W&B, if it has one. Returns at once; the process waits for the thread before it exits.

    Arguments as for `trackers.end`.
    """
    record = find(run, job)
    if record is not None:
        threading.Thread(target=_end, args=(run, record, status, scores or {}), name="wandb-end").start()


def _end(run: RunDir, record: WandbRecord, status: str, scores: Mapping[str, float]) -> None:
    try:
        connection = _open(run, record)
        connection.summary.update(dict(scores))
        connection.finish(exit_code=_EXIT_CODES[status])
    except Exception as error:  # noqa: BLE001  # wandb raises errors of its service and the network: a warning is enough
        _warn(record, error)


def _open(run: RunDir, record: WandbRecord) -> "wandb.Run":
    """Create the run at W&B, or continue the one it has."""
    import wandb

    entity, _, project = record.project.rpartition("/")
    local = run.local
    connection = wandb.init(
        project=project,
        entity=entity or None,
        id=record.run_id,
        name=record.name,
        group=record.group,
        config={**record.params, "launcher.run": run.name},
        dir=os.environ.get("WANDB_DIR") or (str(local) if local is not None else tempfile.mkdtemp(prefix="wandb-")),
        # Creates the run in the first attempt, and continues it in later ones.
        resume="allow",
        # A warm worker of a sweep opens several runs in one process.
        reinit="create_new",
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, init_timeout=_INIT_S),
    )
    # W&B's own step counter cannot go back, and a run that resumes from a checkpoint repeats some steps.
    connection.define_metric("*", step_metric="step")
    return connection


def _warn(record: WandbRecord, error: Exception) -> None:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    _LOG.warning("W&B accepts no numbers of %s (%s); metrics.jsonl has them", record.name, reason)


class WandbSink:
    """Sink that sends numbers to W&B from its own thread.

    Args:
        run: Run directory; offline files go to its `wandb/`.
        record: Identity of the run at W&B.
    """

    def __init__(self, run: RunDir, record: WandbRecord) -> None:
        self._run = run
        self._record = record
        self._queue: queue.Queue[dict[str, float] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def write(self, line: MetricsLine, scalars: Mapping[str, float]) -> None:
        if scalars:
            self._queue.put({"step": line.step, **scalars})

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=_CLOSE_S)

    def _send(self) -> None:
        try:
            # In the thread, as it waits for the server for up to half a minute.
            connection = _open(self._run, self._record)
            while (scalars := self._queue.get()) is not None:
                connection.log(scalars)
            # This ends the worker's part only: the head opens the run again and gives it its final status (`end`).
            connection.finish(exit_code=0)
        except Exception as error:  # noqa: BLE001  # wandb raises errors of its service and the network: a warning is enough
            _warn(self._record, error)
