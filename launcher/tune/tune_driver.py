"""Ray Tune's driver: values in, results out, records written to the sweep directory. Runs on the head.

Tune schedules and stops the trials. Its own experiment snapshots are not used: a resumed sweep replays the trials'
recorded evaluations to Tune. Read `trial.py` next (a trial), then `search.py` (values) and `sweep_dir.py` (records).
"""

import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from launcher.errors import RunInterrupted
from launcher.rundir.trials import TrialEvaluation, TrialRecord
from launcher.spec.job import JobSpec
from launcher.spec.tune import TuneSpec
from launcher.tasks import params_class
from launcher.tune.schedulers import make_scheduler, scheduler_name
from launcher.tune.search import Search
from launcher.tune.space import Params, trial_job
from launcher.tune.sweep_dir import SweepDir
from launcher.tune.tables import write_hparams
from launcher.tune.trial import VALUE, SweepContext, TrialActor, trial_number

TIME_LIMIT_REACHED = "the time limit was reached"

Listener = Callable[[TrialRecord], None]
"""Receives each changed trial."""


@dataclass(frozen=True)
class Phase:
    """A set of trials that Tune runs in one call.

    Args:
        spec: Scheduler, search and limits.
        context: Settings that the trials share.
        numbers: Numbers of the trials, in the order of their start.
        suggest: Function that returns values and seed of a trial when it starts.
        max_concurrent: Maximum trials at the same time.
        seconds: Time limit; None for no limit.
        repeat_of: Number of the trial that these trials repeat with other seeds, if any.
    """

    spec: TuneSpec
    context: SweepContext
    numbers: tuple[int, ...]
    suggest: Callable[[int], tuple[Params, int]]
    max_concurrent: int
    seconds: float | None = None
    repeat_of: int | None = None


def run_phase(phase: Phase, sweep: SweepDir, search: Search | None, listener: Listener) -> str:
    """Run the trials of a phase to completion.

    Returns:
        Reason of an early end, or "".

    Raises:
        RunInterrupted: The user pressed Ctrl-C. All results so far are recorded.
    """
    os.environ.update(
        # trial.json and metrics.jsonl have the same content.
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        # Tune's handler would swallow Ctrl-C.
        TUNE_DISABLE_SIGINT_HANDLER="1",
        # Seconds between Tune's own snapshots, which no one reads: practically never.
        TUNE_GLOBAL_CHECKPOINT_S="1e9",
        TUNE_RESULT_BUFFER_LENGTH="0",
        # Otherwise each actor changes into its trial's directory, where relative paths of a user's code fail.
        RAY_CHDIR_TO_TRIAL_DIR="0",
        RAY_AIR_NEW_OUTPUT="0",
    )
    # Failed trials are reported by the listener.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Ray Tune's PBT (2.60) has no seed argument and draws from these two global generators.
    random.seed(phase.context.base.seed)
    np.random.seed(phase.context.base.seed)
    recorder = _Recorder(phase, sweep, search, listener)
    stopper = _Stopper(phase, sweep)
    trainable = tune.with_parameters(TrialActor, context=phase.context)
    try:
        tune.run(
            tune.with_resources(trainable, lambda config: make_bundles(phase.context.base, config)),
            name="state",
            storage_path=sweep.run.path("sweep/tune"),
            metric=VALUE,
            mode=sweep.record.mode,
            scheduler=make_scheduler(phase.spec),
            **_trial_source(phase, sweep.record.mode, recorder),
            # Hyperband pauses trials until a bracket is full, and paused trials would count as concurrent.
            max_concurrent_trials=None if scheduler_name(phase.spec) == "hyperband" else phase.max_concurrent,
            stop=stopper,
            max_failures=phase.spec.retries,
            reuse_actors=True,
            raise_on_failed_trial=False,
            callbacks=[recorder],
            verbose=0,
        )
    except (KeyboardInterrupt, SystemExit) as stop:
        raise RunInterrupted(
            f"interrupted; run the same command to resume the sweep in {sweep.run.path('sweep')}"
        ) from stop
    finally:
        sweep.run.delete("sweep/tune")
        sweep.run.delete("sweep/snapshots")
    return stopper.reason


def make_bundles(base: JobSpec, config: Mapping[str, object]) -> tune.PlacementGroupFactory:
    """Return the resources of a trial, one bundle per worker. Ray reserves all of them or none."""
    params = config["params"]
    assert isinstance(params, dict)
    cluster = trial_job(base, params, params_class).cluster
    bundle = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        bundle["GPU"] = cluster.gpus_per_worker
    return tune.PlacementGroupFactory([bundle] * cluster.workers, strategy="PACK")


def max_concurrent_trials(base: JobSpec, limit: int | None) -> int:
    """Return how many trials of the job's own size fit on the cluster, at most `limit`."""
    available = ray.cluster_resources()
    cluster = base.cluster
    trials = available.get("CPU", 0.0) / (cluster.workers * cluster.cpus_per_worker)
    if cluster.gpus_per_worker:
        trials = min(trials, available.get("GPU", 0.0) / (cluster.workers * cluster.gpus_per_worker))
    # The addition undoes rounding: 0.3 CPUs hold three workers of 0.1, but 0.3 / 0.1 is below 3.
    return max(1, min(int(trials + 1e-6), limit or 1 << 16))


def _trial_source(phase: Phase, mode: str, recorder: "_Recorder") -> dict[str, Any]:
    """Return the arguments of `tune.run` that define the trials.

    Ray Tune's PBT refuses search algorithms, so its trials are all defined at the start: a grid over their ids, from
    which `sample_from` looks up the values.
    """
    if phase.spec.scheduler != "pbt":
        return {"search_alg": _Suggestions(phase, mode, recorder), "num_samples": -1}
    configs = {number: _start_trial(phase, recorder, number) for number in phase.numbers}

    # Tune resolves grid values before functions, so `first` is known when they run.
    def look_up(key: str) -> object:
        return tune.sample_from(lambda spec: configs[spec.config.first][key])  # type: ignore[attr-defined]

    config = {"first": tune.grid_search(list(configs)), "numbers": list(configs)}
    return {"config": config | {key: look_up(key) for key in ("params", "seed")}, "num_samples": 1}


def _start_trial(phase: Phase, recorder: "_Recorder", number: int) -> dict[str, object]:
    """Choose the values of a trial, record it, and return its Tune config."""
    params, seed = phase.suggest(number)
    recorder.begin(number, params, seed)
    return {"number": number, "params": params, "seed": seed}


class _Suggestions(Searcher):
    """Passes the trials of a phase to Tune, one after another."""

    def __init__(self, phase: Phase, mode: str, recorder: "_Recorder") -> None:
        super().__init__(metric=VALUE, mode=mode)
        self._phase = phase
        self._waiting = list(phase.numbers)
        self._recorder = recorder

    def suggest(self, trial_id: str) -> dict[str, object]:
        if not self._waiting:
            return Searcher.FINISHED  # type: ignore[return-value]  # a string, as Tune documents
        return _start_trial(self._phase, self._recorder, self._waiting.pop(0))

    def on_trial_complete(self, trial_id: str, result: object = None, error: bool = False) -> None:
        """Ignore the result: `_Recorder` reports it to the search, with the trial's values."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a resumed sweep replays its trials."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: Tune never restores this searcher."""


class _Stopper(Stopper):
    """Stops the sweep when a trial reaches the target, or at the time limit."""

    def __init__(self, phase: Phase, sweep: SweepDir) -> None:
        self._target = phase.spec.target
        self._is_max = sweep.record.mode == "max"
        self._deadline = None if phase.seconds is None else time.monotonic() + phase.seconds
        self.reason = ""

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        # Tune calls the stopper before `_Recorder.on_trial_result`, which still gets this result. NaN reaches no
        # target, as it compares false.
        value = float(str(result[VALUE]))
        if self._target is not None and (value >= self._target if self._is_max else value <= self._target):
            self.reason = f"a trial reached the target {self._target:g}"
        return bool(self.reason)

    def stop_all(self) -> bool:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = self.reason or TIME_LIMIT_REACHED
        return bool(self.reason)


class _Recorder(tune.Callback):
    """Writes the record of each trial, and reports to search and listener."""

    def __init__(self, phase: Phase, sweep: SweepDir, search: Search | None, listener: Listener) -> None:
        self._phase = phase
        self._sweep = sweep
        self._search = search
        self._listener = listener
        self._completed: set[int] = set()

    def begin(self, number: int, params: Params, seed: int) -> None:
        """Record a trial that is about to wait for its resources."""
        if number not in self._sweep.trials:
            cluster = trial_job(self._phase.context.base, params, params_class).cluster
            self._sweep.record_trial(
                TrialRecord(
                    number=number, params=params, seed=seed, repeat_of=self._phase.repeat_of, status="running",
                    workers=cluster.workers, gpus=cluster.gpus_per_worker * cluster.workers,
                )
            )  # fmt: skip
        self._listener(self._sweep.trials[number])

    def on_trial_result(
        self, iteration: int, trials: object, trial: "tune.experiment.Trial", result: dict[str, object], **info: object
    ) -> None:
        record = self._record_of(trial)
        if record.status != "running":
            # Replayed from an earlier attempt.
            return
        update: dict[str, object] = {"seconds": result.get("seconds", record.seconds)}
        if result.get("evaluation") is not None:
            evaluation = TrialEvaluation.model_validate(result["evaluation"])
            # A restarted trial repeats evaluations: the new ones replace the old.
            earlier = tuple(old for old in record.evaluations if old.step < evaluation.step)
            update |= {"evaluations": (*earlier, evaluation), "total_steps": result["total_steps"]}
            # PBT changes them during a trial.
            update["params"] = trial.config["params"]
        if result.get("failed"):
            update |= {"status": "failed", "reason": result["failed"]}
        elif result.get("finished"):
            update["status"] = "finished"
        self._put(record.model_copy(update=update))

    def on_trial_complete(self, iteration: int, trials: object, trial: "tune.experiment.Trial", **info: object) -> None:
        record = self._record_of(trial)
        if record.status == "running":
            record = record.model_copy(update={"status": "pruned", "reason": "stopped early"})
            self._put(record)
        self._complete(record)

    def on_trial_error(self, iteration: int, trials: object, trial: "tune.experiment.Trial", **info: object) -> None:
        record = self._record_of(trial)
        run = self._sweep.trial_run(record.number)
        # Called when no retry is left. Without the file the process was killed before it could write one.
        reason = run.read_bytes("error.txt").decode() if run.exists("error.txt") else "its worker was lost"
        record = record.model_copy(update={"status": "failed", "reason": reason})
        self._put(record)
        self._complete(record)

    def _record_of(self, trial: "tune.experiment.Trial") -> TrialRecord:
        return self._sweep.trials[trial_number(trial.config, trial.trial_id)]

    def _put(self, record: TrialRecord) -> None:
        self._sweep.record_trial(record)
        self._listener(record)

    def _complete(self, record: TrialRecord) -> None:
        if record.number in self._completed:
            return
        self._completed.add(record.number)
        mode = self._sweep.record.mode
        write_hparams(self._sweep.trial_run(record.number), record, self._sweep.record.metric, mode)
        if self._search is not None:
            best = record.best_evaluation(mode)
            self._search.report(record.number, None if record.status == "failed" or best is None else best.value)
        self._sweep.free_space(self._phase.spec.storage_budget_gib)
