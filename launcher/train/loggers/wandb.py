"""Weights & Biases: one run per launcher run, the trials of a sweep in one group. Head, and rank 0 of the workers.

https://docs.wandb.ai/ref/python/. The run's id stands in wandb.json of the run directory, so that a run that goes on
goes on there too. Account and server are wandb's own variables (WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE=offline).
Training never waits: a thread of its own opens the run and sends, and a server that is gone costs one warning.
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
from launcher.train.loggers.scalars import scalars_of

if TYPE_CHECKING:
    import wandb

_FILE = "wandb.json"
_LONGEST = 500  # characters of a parameter
_INIT_S, _CLOSE_S = 30.0, 60.0
_EXITS = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}  # 255 is what wandb makes of Ctrl-C
_TRIALS = "/sweep/trials/"
_log = logging.getLogger("launcher")


class WandbRecord(Record):
    """What a run is called at W&B: wandb.json."""

    project: str
    """PROJECT or ENTITY/PROJECT, as in the job file."""
    run_id: str
    name: str
    group: str | None
    """The sweep that a trial belongs to."""
    params: dict[str, str]


def find(run: RunDir, job: JobSpec) -> WandbRecord | None:
    """What a run is called at W&B; None when it has no name there, or the job logs to none."""
    if job.logging.wandb is None:
        return None
    known = run.find_record(_FILE, WandbRecord)
    return known if known is not None and known.project == job.logging.wandb else None


def begin(run: RunDir, job: JobSpec, params: Mapping[str, object]) -> None:
    """Give a run its id, unless it has one; no server is asked.

    Raises:
        SpecError: wandb is not installed.
    """
    if job.logging.wandb is None:
        return
    if find_spec("wandb") is None:
        raise SpecError(("logging.wandb: wandb is not installed; `pip install launcher[wandb]`, or drop it",))
    if find(run, job) is not None:
        return
    sweep, mark, trial = run.uri.partition(_TRIALS)
    group = RunDir(sweep).name if mark else None
    record = WandbRecord(
        project=job.logging.wandb,
        run_id=uuid.uuid4().hex[:12],
        name=f"{group}/{RunDir(trial).name}" if group else job.name,
        group=group,
        params={key: mask_secrets(str(value))[:_LONGEST] for key, value in params.items()},
    )
    run.write_record(_FILE, record)


def end(run: RunDir, job: JobSpec, status: str, scores: Mapping[str, float] | None = None) -> None:
    """Close a run at W&B; returns at once, the process waits for the server when it ends.

    Args:
        run: whose directory remembers the id; nothing happens when there is none.
        job: names the project.
        status: FINISHED, FAILED or KILLED.
        scores: last numbers, as `test/accuracy`.
    """
    known = find(run, job)
    if known is not None:
        threading.Thread(target=_end, args=(run, known, status, scores or {}), name="wandb-end").start()


def _end(run: RunDir, known: WandbRecord, status: str, scores: Mapping[str, float]) -> None:
    try:
        opened = _open(run, known)
        opened.summary.update(dict(scores))
        opened.finish(exit_code=_EXITS[status])
    except Exception as error:  # noqa: BLE001  # wandb raises what its service and the network raise; told, not raised
        _warn(known, error)


def _open(run: RunDir, known: WandbRecord) -> "wandb.Run":
    """The run at W&B, made or gone on with."""
    import wandb

    entity, _, project = known.project.rpartition("/")
    local = run.local
    opened = wandb.init(
        project=project,
        entity=entity or None,
        id=known.run_id,
        name=known.name,
        group=known.group,
        config={**known.params, "launcher.run": run.name},
        dir=os.environ.get("WANDB_DIR") or (str(local) if local is not None else tempfile.mkdtemp(prefix="wandb-")),
        resume="allow",
        reinit="create_new",  # warm workers have one run after the other
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, init_timeout=_INIT_S),
    )
    # W&B's own counter only grows; a run that goes on from a checkpoint does some steps again, with the same numbers.
    opened.define_metric("*", step_metric="step")
    return opened


def _warn(known: WandbRecord, error: Exception) -> None:
    what = " ".join(str(error).split())[:200] or type(error).__name__
    _log.warning("W&B takes no numbers of %s (%s); metrics.jsonl has them", known.name, what)


class WandbSink:
    """Sends numbers to W&B from a thread of its own; a `sinks.Sink`.

    Args:
        run: where offline files go, in `wandb/`.
        known: the run's name at W&B.
    """

    def __init__(self, run: RunDir, known: WandbRecord) -> None:
        self._run, self._known = run, known
        self._waiting: queue.Queue[dict[str, float] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def write(self, line: MetricsLine) -> None:
        scalars = scalars_of(line)
        if scalars:
            self._waiting.put({"step": line.step, **scalars})

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(timeout=_CLOSE_S)

    def _send(self) -> None:
        try:
            opened = _open(self._run, self._known)
            while (scalars := self._waiting.get()) is not None:
                opened.log(scalars)
            opened.finish(exit_code=0)
        except Exception as error:  # noqa: BLE001  # wandb raises what its service and the network raise; told, not raised
            _warn(self._known, error)
