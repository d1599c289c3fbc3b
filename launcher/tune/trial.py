"""A trial as Ray Tune sees it: an actor that trains one trial after another. Train workers (rank 0 of each trial).

Tune decides when a trial starts, pauses, stops and copies another trial. Loop, checkpoints and records are those of
`launcher train`. When a sweep is resumed, a completed trial replays its recorded evaluations instead of training, so
that search and scheduler reach the same state again. Read `trial_worker.py` next for what is warm between trials.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue
from ray import tune

from launcher.driver.prepare import PreparedJob, prepare
from launcher.driver.ray_errors import unwrap_ray_error
from launcher.errors import MicroBatchOOMError, RunError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.records import EvaluationRecord
from launcher.rundir.trials import TrialEvaluation, TrialRecord
from launcher.rundir.uri import join, parent
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.tasks import params_class
from launcher.train.checkpoint import catalog
from launcher.train.loggers import trackers
from launcher.train.loop import EvaluationEvent, should_stop_early
from launcher.tune.pbt_checkpoints import fetch_snapshot, nearest_step, store_snapshot
from launcher.tune.space import trial_job
from launcher.tune.trial_worker import CheckpointRef, TrialWorkerGroup

VALUE, PROGRESS, BUDGET = "value", "progress", "budget"
"""Keys of a trial's results: the sweep's metric, the percentage of its steps done, and the same in units of `grace`."""

_log = logging.getLogger("launcher")


@dataclass(frozen=True)
class SweepContext:
    """Settings that all trials of a sweep share. Pickled once per actor."""

    base: JobSpec
    """Resolved job without test data and without `tune:`."""
    trials: str
    """Directory of the trials."""
    metric: str
    worst: float
    """Value that Tune gets for a failed trial."""
    grace: float
    """Fraction of its steps that a trial runs before it can be stopped."""
    mlflow_parent: str | None = None
    """MLflow run of the sweep."""
    snapshots: str | None = None
    """Directory of checkpoints that other trials may copy (PBT), because their owners prune their own."""


def trial_name(number: int) -> str:
    """Return the name of a trial's directory."""
    return f"trial-{number:04d}"


def trial_number(config: Mapping[str, object], trial_id: str) -> int:
    """Return the number of a Tune trial.

    Under PBT a trial takes over the whole config of the trial that it copies, so the config cannot hold its number.
    Tune numbers its trials in their ids, and `numbers` is the same in all configs.
    """
    numbers = config.get("numbers")
    if isinstance(numbers, list):
        return int(numbers[int(trial_id.rsplit("_", 1)[1])])
    return int(str(config["number"]))


class TrialActor(tune.Trainable):
    """Ray Tune's class trainable. `config` holds number, `params` and `seed` of a trial."""

    def setup(self, config: dict[str, object], context: SweepContext | None = None) -> None:
        """Start with the first trial of this actor."""
        assert context is not None
        self._context = context
        self._group: TrialWorkerGroup | None = None
        self._load_trial(config)

    def reset_config(self, new_config: dict[str, object]) -> bool:
        """Switch to another trial, or to other values of the same one, and keep the workers warm."""
        # Tune fails the trial if this returns False.
        self._load_trial(new_config)
        return True

    def _load_trial(self, config: dict[str, object]) -> None:
        # Every field but the group belongs to one trial and is reset here.
        self._number = trial_number(config, str(self.trial_id))
        self._seed = int(str(config["seed"]))
        params = config["params"]
        assert isinstance(params, dict)
        self._params: dict[str, JsonValue] = params
        self._prepared: PreparedJob | None = None
        self._start: CheckpointRef | None = None
        self._run = RunDir(join(self._context.trials, trial_name(self._number)))
        record = self._run.find_record("trial.json", TrialRecord)
        self._status = record.status if record is not None else "running"
        self._is_completed = self._status != "running"
        self._seconds = record.seconds if record is not None else 0.0
        self._total_steps = record.total_steps if record is not None else 0
        evaluations = record.evaluations if record is not None else ()
        # The newest checkpoint decides where a trial resumes. Evaluations after it are measured again and replace the
        # recorded ones.
        if not self._is_completed:
            latest = catalog.latest_step(self._run)
            self._start = CheckpointRef(self._run.uri, latest) if latest else None
            evaluations = self._read_evaluations(latest)
        # Replayed one per `step`, as the schedulers must see every result.
        self._to_replay = list(evaluations)
        self._last_reported = max((evaluation.step for evaluation in evaluations), default=0)

    def _read_evaluations(self, step: int) -> tuple[TrialEvaluation, ...]:
        """Return the evaluations up to a step from the trial's own log: trial.json may be older than the checkpoint."""
        if not step or not self._run.exists("plan.json"):
            return ()
        total = self._run.read_record("plan.json", Plan).total_steps
        lines = [line for line in self._run.read_metrics() if isinstance(line, EvaluationRecord)]
        return tuple(_to_evaluation(line, self._context.metric, total) for line in lines if line.step <= step)

    def step(self) -> dict[str, object]:
        """Train to the next evaluation, or replay a recorded one, and return Tune's result."""
        if self._to_replay:
            evaluation = self._to_replay.pop(0)
            return self._make_result(evaluation, self._is_completed and not self._to_replay)
        if self._is_completed:
            # It failed before its first evaluation.
            return self._make_last_result(failed="failed before the sweep was interrupted")
        started = time.monotonic()
        try:
            event = self._advance()
            if event is None:
                # Resumed from a checkpoint of the last step.
                return self._make_last_result(finished=True)
            assert self._group is not None and self._prepared is not None
            total_steps = self._prepared.plan.total_steps
            evaluation = _to_evaluation(event.evaluation, self._context.metric, total_steps)
            is_last = event.state.step >= total_steps or should_stop_early(self._prepared.job, event.state)
            if is_last:
                # Collective: the loop ends, waits for its checkpoint writer and flushes the log. Tune may end the
                # process after the last result, so this cannot wait for the next call.
                self._group.advance()
        # BaseException: after a KeyboardInterrupt, too, the other ranks would wait for this one.
        except BaseException as error:
            if isinstance(error, TrainingError) and not isinstance(error, MicroBatchOOMError):
                # Raised on all ranks at the same step (a non-finite loss), so the group stays usable and warm.
                return self._make_last_result(failed=error.message)
            # Before the cleanup: `_Recorder.on_trial_error` reads the reason once Tune sees this error.
            self._run.write_bytes("error.txt", unwrap_ray_error(error).message.encode())
            # Other ranks may wait inside a collective, so no process of this group can be reused.
            self.cleanup()
            raise
        finally:
            self._seconds += time.monotonic() - started
        return self._make_result(evaluation, is_last)

    def _advance(self) -> EvaluationEvent | None:
        """Train to the next evaluation that Tune has not seen; after an OOM a single worker retries from a checkpoint.

        Raises:
            MicroBatchOOMError: One of several workers ran out of memory, and the group is unusable. Tune restarts the
                trial in other processes, with the smaller micro-batch that was recorded.
        """
        while True:
            self._begin()
            assert self._group is not None
            try:
                event = self._group.advance()
            except MicroBatchOOMError as error:
                if self._group.size > 1:
                    raise
                _log.warning("%s: %s", self._run.name, error.message)
                self._restart_from_latest()
                continue
            if event is None:
                return None
            # After a restart from an earlier checkpoint, the loop repeats evaluations that Tune has seen.
            if event.evaluation.step > self._last_reported:
                self._last_reported = event.evaluation.step
                return event

    @property
    def _first_step(self) -> int:
        """Step of the checkpoint that the trial resumes from; 0 without one."""
        return self._start.step if self._start is not None else 0

    def _restart_from_latest(self) -> None:
        self._prepared = None  # plans again, with the smaller micro-batch
        latest = catalog.latest_step(self._run)
        if latest > self._first_step:
            self._start = CheckpointRef(self._run.uri, latest)

    def _begin(self) -> None:
        if self._prepared is not None:
            return
        job = self._make_job()
        # The cache of the sweep's storage: a trial's own storage is `sweep/trials`, with a cache below it.
        prepared = prepare(job, cache=join(self._context.base.output.storage, ".cache"))
        # Of an earlier attempt: `_Recorder.on_trial_error` would report it for a worker that was lost.
        self._run.delete("error.txt")
        self._run.write_bytes("job.yaml", dump_job(prepared.job).encode())
        self._run.write_record("plan.json", prepared.plan)
        try:
            trackers.begin(self._run, prepared.job, self._params, self._context.mlflow_parent)
        except RunError as error:
            # The server worked when the sweep began: losing it later does not fail a trial.
            _log.warning("%s", error.message)
        if self._group is None:
            self._group = TrialWorkerGroup(job.cluster.workers)
        # Collective: the ranks build the engine together.
        self._group.begin(prepared, self._start)
        self._prepared = prepared
        self._total_steps = prepared.plan.total_steps

    def _make_job(self) -> JobSpec:
        """Return the job that `launcher train` would run with the same values."""
        job = trial_job(self._context.base, self._params, params_class)
        output = job.output.model_copy(update={"storage": self._context.trials})
        return job.model_copy(update={"name": trial_name(self._number), "seed": self._seed, "output": output})

    def _make_result(self, evaluation: TrialEvaluation, is_last: bool) -> dict[str, object]:
        return {
            VALUE: evaluation.value,
            PROGRESS: evaluation.progress,
            BUDGET: evaluation.progress / (100 * self._context.grace),
            "evaluation": evaluation.model_dump(),
            "seconds": self._seconds,
            "total_steps": self._total_steps,
            # A pruned trial ends here again when it replays its last evaluation.
            "finished": is_last and self._status != "pruned",
            "done": is_last,
        }

    def _make_last_result(self, **facts: object) -> dict[str, object]:
        """Return the result of a trial that ends without another evaluation."""
        complete = {PROGRESS: 100.0, BUDGET: 1 / self._context.grace}
        return {VALUE: self._context.worst, **complete, "seconds": self._seconds, "done": True, **facts}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, object]:
        """Save a checkpoint in the trial's own directory, and return its location for Tune to keep."""
        if self._group is None or self._prepared is None:
            # A trial may be paused while it replays. The rest of its evaluations travels in Tune's checkpoint.
            evaluations = [evaluation.model_dump() for evaluation in self._to_replay]
            return {"uri": self._run.uri, "step": self._first_step, "evaluations": evaluations}
        # Collective. The checkpoint is complete on return, so it can be copied: only a run with a lease writes in the
        # background.
        step = self._group.save()
        if self._context.snapshots is None:
            return {"uri": self._run.uri, "step": step, "evaluations": []}
        snapshots = RunDir(join(self._context.snapshots, trial_name(self._number)))
        # This actor may prune its own checkpoint before the other trial reads it.
        store_snapshot(snapshots, self._run, step)
        return {"uri": snapshots.uri, "step": step, "evaluations": []}

    def load_checkpoint(self, saved: dict[str, object] | None) -> None:
        """Resume from a checkpoint: the trial's own after a pause, or that of a better trial (PBT)."""
        assert saved is not None
        uri = str(saved["uri"])
        step = int(str(saved["step"]))
        self._prepared = None
        evaluations = saved["evaluations"]
        assert isinstance(evaluations, list)
        self._to_replay = [TrialEvaluation.model_validate(evaluation) for evaluation in evaluations]
        if uri == self._run.uri:
            # The trial may have pruned that checkpoint since; its newest one lies on the same curve.
            self._start = CheckpointRef(uri, nearest_step(self._run, step)) if step else None
            self._last_reported = self._first_step
            return
        self._is_completed = False
        self._to_replay = []
        # Next to the snapshots: on one file system, so that files are hard-linked, and deleted with them (`run_phase`).
        copy = RunDir(join(parent(uri), f"{RunDir(uri).name}-for-{trial_name(self._number)}"))
        self._start = fetch_snapshot(RunDir(uri), copy, step) if step else None
        self._last_reported = self._first_step
        # Else a restart would resume from the trial's own later checkpoint instead of the copied one.
        for own_step in catalog.complete_steps(self._run):
            if own_step > self._first_step:
                catalog.remove(self._run, own_step)

    def cleanup(self) -> None:
        """Stop the workers, after the last trial of this actor or after a failure."""
        group = self._group
        self._group = None
        if group is not None:
            group.close()


def _to_evaluation(line: EvaluationRecord, metric: str, total_steps: int) -> TrialEvaluation:
    value = line.loss if metric == "loss" else line.metrics.get(metric, math.nan)
    return TrialEvaluation(step=line.step, progress=100 * line.step / total_steps, value=value, loss=line.loss)
