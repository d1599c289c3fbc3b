"""A trial as Ray Tune sees it: a warm worker that takes one trial after another. Train workers (rank 0 of each trial).

Tune decides when a trial starts, pauses, copies another and stops; the loop, the checkpoints and the records are those
of `launcher train`. A trial that was finished before the sweep was interrupted shows what it measured again, so that
search and scheduler know what they knew.
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
from launcher.tasks import params_of
from launcher.train.checkpoint import catalog
from launcher.train.loggers import trackers
from launcher.train.loop import EvaluationEvent, should_stop_early
from launcher.tune.pbt_checkpoints import keep_checkpoint, nearest_step, take_checkpoint
from launcher.tune.space import trial_job
from launcher.tune.trial_worker import CheckpointRef
from launcher.tune.worker_group import TrialWorkerGroup

VALUE, PROGRESS, BUDGET = "value", "progress", "budget"
"""Keys of a trial's results: the sweep's metric, the percent of its steps done, and the same in units of the grace."""

_log = logging.getLogger("launcher")


@dataclass(frozen=True)
class SweepContext:
    """What all trials of a sweep share; pickled to each worker once."""

    base: JobSpec
    """Resolved, without test data and without `tune:`."""
    trials: str
    """Directory that holds the trials."""
    metric: str
    worst: float
    """Value of a trial that failed."""
    threads: int
    grace: float
    """Share of its steps that a trial may do before it can be stopped."""
    parent: str | None = None
    """MLflow run of the sweep."""
    snapshots: str | None = None
    """Where checkpoints that other trials may go on from are kept: their owner soon removes its own (pbt)."""


def trial_name(number: int) -> str:
    """Name of a trial's directory."""
    return f"trial-{number:04d}"


def trial_number(config: Mapping[str, object], trial_id: str) -> int:
    """Which trial it is.

    Under pbt a trial takes over the whole config of the one it copies, so its number cannot stand there: Tune counts
    its trials in their ids, and `numbers` is the same for all.
    """
    numbers = config.get("numbers")
    if isinstance(numbers, list):
        return int(numbers[int(trial_id.rsplit("_", 1)[1])])
    return int(str(config["number"]))


def make_trial_job(order: SweepContext, number: int, params: dict[str, JsonValue], seed: int) -> JobSpec:
    """The job that a trial is: what `launcher train` would run with the same values."""
    job = trial_job(order.base, params, params_of)
    output = job.output.model_copy(update={"storage": order.trials})
    return job.model_copy(update={"name": trial_name(number), "seed": seed, "output": output})


class TrialActor(tune.Trainable):
    """Ray Tune's class trainable; `config` has number, `params` and `seed` of a trial."""

    def setup(self, config: dict[str, object], order: SweepContext | None = None) -> None:
        assert order is not None
        self._order = order
        self._group: TrialWorkerGroup | None = None
        self._take(config)

    def reset_config(self, new_config: dict[str, object]) -> bool:
        """Another trial, or the same with other values; warm."""
        self._take(new_config)
        return True

    def _take(self, config: dict[str, object]) -> None:
        self._number, self._seed = trial_number(config, str(self.trial_id)), int(str(config["seed"]))
        params = config["params"]
        assert isinstance(params, dict)
        self._params: dict[str, JsonValue] = params
        self._prepared: PreparedJob | None = None
        self._start: CheckpointRef | None = None
        self._run = RunDir(join(self._order.trials, trial_name(self._number)))
        record = self._run.find_record("trial.json", TrialRecord)
        self._status = record.status if record is not None else "running"
        self._over = self._status != "running"
        self._seconds = record.seconds if record is not None else 0.0
        self._total_steps = record.total_steps if record is not None else 0
        seen = record.evaluations if record is not None else ()
        if not self._over:
            latest = catalog.latest_step(self._run)
            self._start = CheckpointRef(self._run.uri, latest) if latest else None
            seen = self._measured(latest)
        self._replayed = list(seen)
        self._seen = max((look.step for look in seen), default=0)

    def _measured(self, step: int) -> tuple[TrialEvaluation, ...]:
        """What was measured up to a step, by the trial's own log: trial.json may be behind it."""
        if not step or not self._run.exists("plan.json"):
            return ()
        total = self._run.read_record("plan.json", Plan).total_steps
        lines = [line for line in self._run.read_metrics() if isinstance(line, EvaluationRecord)]
        return tuple(_look(line, self._order.metric, total) for line in lines if line.step <= step)

    def step(self) -> dict[str, object]:
        """To the next evaluation."""
        if self._replayed:
            look = self._replayed.pop(0)
            return self._result(look, self._over and not self._replayed)
        if self._over:  # it failed before its first evaluation
            return self._end(failed="failed before the sweep was interrupted")
        started = time.monotonic()
        try:
            pause = self._advance()
            if pause is None:  # a checkpoint of the last step was found
                return self._end(finished=True)
            assert self._group is not None and self._prepared is not None
            look = _look(pause.evaluation, self._order.metric, self._prepared.plan.total_steps)
            stopped = pause.state.step >= self._prepared.plan.total_steps or should_stop_early(
                self._prepared.job, pause.state
            )
            if stopped:
                self._group.advance()
        except BaseException as error:
            if isinstance(error, TrainingError) and not isinstance(error, MicroBatchOOMError):
                return self._end(failed=error.message)  # the same on all workers: they stay warm
            self._run.write_bytes("error.txt", unwrap_ray_error(error).message.encode())
            self.cleanup()
            raise
        finally:
            self._seconds += time.monotonic() - started
        return self._result(look, stopped)

    def _advance(self) -> EvaluationEvent | None:
        """To the next evaluation that Tune has not seen; a worker that is alone begins anew where memory ran out.

        Raises:
            MicroBatchOOMError: it ran out on one of several, whose group is of no use then; Tune starts the trial again
                in other processes, with the smaller micro-batch that was written down.
        """
        while True:
            self._begin()
            assert self._group is not None
            try:
                pause = self._group.advance()
            except MicroBatchOOMError as error:
                if self._group.size > 1:
                    raise
                _log.warning("%s: %s", self._run.name, error.message)
                self._begin_again()
                continue
            if pause is None or pause.evaluation.step > self._seen:
                self._seen = pause.evaluation.step if pause is not None else self._seen
                return pause

    @property
    def _first_step(self) -> int:
        """Of the checkpoint that the trial goes on from; 0 for none."""
        return self._start.step if self._start is not None else 0

    def _begin_again(self) -> None:
        """From the last checkpoint, planned anew."""
        self._prepared = None
        latest = catalog.latest_step(self._run)
        if latest > self._first_step:
            self._start = CheckpointRef(self._run.uri, latest)

    def _begin(self) -> None:
        if self._prepared is not None:
            return
        job = make_trial_job(self._order, self._number, self._params, self._seed)
        prepared = prepare(job, cache=join(self._order.base.output.storage, ".cache"))
        self._run.delete("error.txt")  # of an attempt before this one
        self._run.write_bytes("job.yaml", dump_job(prepared.job).encode())
        self._run.write_record("plan.json", prepared.plan)
        try:
            trackers.begin(self._run, prepared.job, self._params, self._order.parent)
        except RunError as error:  # the sweep's own run could be made; a server that has gone since ends no trial
            _log.warning("%s", error.message)
        if self._group is None:
            self._group = TrialWorkerGroup(job.cluster.workers, self._order.threads)
        self._group.begin(prepared, self._start)
        self._prepared, self._total_steps = prepared, prepared.plan.total_steps

    def _result(self, look: TrialEvaluation, over: bool) -> dict[str, object]:
        return {
            VALUE: look.value,
            PROGRESS: look.progress,
            BUDGET: look.progress / (100 * self._order.grace),
            "look": look.model_dump(),
            "seconds": self._seconds,
            "total_steps": self._total_steps,
            "finished": over and self._status != "pruned",
            "done": over,
        }

    def _end(self, **facts: object) -> dict[str, object]:
        """There is nothing more to look at."""
        whole = {PROGRESS: 100.0, BUDGET: 1 / self._order.grace}
        return {VALUE: self._order.worst, **whole, "seconds": self._seconds, "done": True, **facts}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, object]:
        """The checkpoint lies in the trial's own directory; Tune carries where."""
        if self._group is None or self._prepared is None:
            seen = [look.model_dump() for look in self._replayed]
            return {"uri": self._run.uri, "step": self._first_step, "seen": seen}
        step = self._group.save()
        if self._order.snapshots is None:
            return {"uri": self._run.uri, "step": step, "seen": []}
        kept = RunDir(join(self._order.snapshots, trial_name(self._number)))
        keep_checkpoint(kept, self._run, step)
        return {"uri": kept.uri, "step": step, "seen": []}

    def load_checkpoint(self, saved: dict[str, object] | None) -> None:
        """Go on from a checkpoint: the trial's own after a pause, or that of a better one (pbt)."""
        assert saved is not None
        uri, step = str(saved["uri"]), int(str(saved["step"]))
        self._prepared = None
        seen = saved["seen"]
        assert isinstance(seen, list)
        self._replayed = [TrialEvaluation.model_validate(look) for look in seen]
        if uri == self._run.uri:
            self._start = CheckpointRef(uri, nearest_step(self._run, step)) if step else None
            self._seen = self._first_step
            return
        self._over, self._replayed = False, []
        mine = RunDir(join(parent(uri), f"{RunDir(uri).name}-for-{trial_name(self._number)}"))
        self._start = take_checkpoint(RunDir(uri), mine, step) if step else None
        self._seen = self._first_step
        _forget_after(self._run, self._first_step)

    def cleanup(self) -> None:
        """The last trial is over."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


def _look(line: EvaluationRecord, metric: str, total_steps: int) -> TrialEvaluation:
    value = line.loss if metric == "loss" else line.metrics.get(metric, math.nan)
    return TrialEvaluation(step=line.step, progress=100 * line.step / total_steps, value=value, loss=line.loss)


def _forget_after(run: RunDir, step: int) -> None:
    """A trial that takes another's state must not go on from its own later one."""
    for other in catalog.complete_steps(run):
        if other > step:
            catalog.remove(run, other)
