"""Ray Tune at work: suggestions in, results out, what is learned written to the sweep. Runs on the head.

Tune schedules trials and stops them; `trial.py` is a trial, `search.py` chooses values, `sweep_dir.py` remembers.
Tune's own snapshots are not used: a sweep that goes on shows Tune what its trials measured, from their own records.
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
from launcher.tasks import params_of
from launcher.tune.board import write_hparams
from launcher.tune.schedulers import make_scheduler, scheduler_name
from launcher.tune.search import Search
from launcher.tune.space import Params, trial_job
from launcher.tune.sweep_dir import SweepDir
from launcher.tune.trial import VALUE, SweepContext, TrialActor, trial_number

Listener = Callable[[TrialRecord], None]


@dataclass(frozen=True)
class Phase:
    """A set of trials that Tune runs in one go.

    Args:
        spec: how they are scheduled.
        order: what they share.
        numbers: of the trials, in the order of their start.
        suggest: gives a trial's values and seed when its turn comes.
        concurrent: trials at the same time.
        seconds: time left for them; None has no end.
        repeat_of: the trial they repeat with other seeds, if they do.
    """

    spec: TuneSpec
    order: SweepContext
    numbers: tuple[int, ...]
    suggest: Callable[[int], tuple[Params, int]]
    concurrent: int
    seconds: float | None = None
    repeat_of: int | None = None


def run_phase(phase: Phase, sweep: SweepDir, search: Search | None, listener: Listener) -> str:
    """Run the trials of a phase to their end; why it ended early, or nothing.

    Raises:
        RunInterrupted: by Ctrl-C; what is measured is kept.
    """
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",  # trial.json and metrics.jsonl say it all
        TUNE_DISABLE_SIGINT_HANDLER="1",  # Ctrl-C is told by us
        TUNE_GLOBAL_CHECKPOINT_S="1e9",
        TUNE_RESULT_BUFFER_LENGTH="0",
        RAY_CHDIR_TO_TRIAL_DIR="0",
        RAY_AIR_NEW_OUTPUT="0",
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is told by us
    random.seed(phase.order.base.seed)  # pbt draws from these two
    np.random.seed(phase.order.base.seed)
    watcher = _Watcher(phase, sweep, search, listener)
    stopper = _Stopper(phase, sweep)
    scratch = sweep.run.path("sweep/tune")
    try:
        tune.run(
            tune.with_resources(
                tune.with_parameters(TrialActor, order=phase.order), lambda config: bundles(phase.order.base, config)
            ),
            name="state",
            storage_path=scratch,
            metric=VALUE,
            mode=sweep.record.mode,
            scheduler=make_scheduler(phase.spec),
            **_source(phase, sweep.record.mode, watcher),
            # Hyperband lets trials wait until a bracket is full; waiting, they must not count.
            max_concurrent_trials=None if scheduler_name(phase.spec) == "hyperband" else phase.concurrent,
            stop=stopper,
            max_failures=phase.spec.retries,
            reuse_actors=True,
            raise_on_failed_trial=False,
            callbacks=[watcher],
            verbose=0,
        )
    except (KeyboardInterrupt, SystemExit) as stop:
        raise RunInterrupted(
            f"interrupted; the same command goes on with the sweep in {sweep.run.path('sweep')}"
        ) from stop
    finally:
        sweep.run.delete("sweep/tune")
        sweep.run.delete("sweep/snapshots")
    return stopper.why


def bundles(base: JobSpec, config: Mapping[str, object]) -> tune.PlacementGroupFactory:
    """What a trial reserves, all of it or nothing: one bundle per worker."""
    params = config["params"]
    assert isinstance(params, dict)
    cluster = trial_job(base, params, params_of).cluster
    bundle = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        bundle["GPU"] = cluster.gpus_per_worker
    return tune.PlacementGroupFactory([bundle] * cluster.workers, strategy="PACK")


def _source(phase: Phase, mode: str, watcher: "_Watcher") -> dict[str, Any]:
    """Where Tune takes trials from; its pbt refuses search algorithms, so its trials are all given at once."""
    if phase.spec.scheduler != "pbt":
        return {"search_alg": _Suggestions(phase, mode, watcher), "num_samples": -1}
    configs = {number: _config(phase, watcher, number) for number in phase.numbers}
    first = {"first": tune.grid_search(list(configs)), "numbers": list(configs)}

    def value_of(key: str) -> object:
        return tune.sample_from(lambda spec: configs[spec.config.first][key])  # type: ignore[attr-defined]

    rest = {key: value_of(key) for key in ("params", "seed")}
    return {"config": first | rest, "num_samples": 1}


def _config(phase: Phase, watcher: "_Watcher", number: int) -> dict[str, object]:
    params, seed = phase.suggest(number)
    watcher.begin(number, params, seed)
    return {"number": number, "params": params, "seed": seed}


class _Suggestions(Searcher):
    """Hands Tune the trials of a phase, one after another."""

    def __init__(self, phase: Phase, mode: str, watcher: "_Watcher") -> None:
        super().__init__(metric=VALUE, mode=mode)
        self._phase, self._waiting, self._watcher = phase, list(phase.numbers), watcher

    def suggest(self, trial_id: str) -> dict[str, object]:
        if not self._waiting:
            return Searcher.FINISHED  # type: ignore[return-value]  # a string, as Tune documents
        return _config(self._phase, self._watcher, self._waiting.pop(0))

    def on_trial_complete(self, trial_id: str, result: object = None, error: bool = False) -> None:
        """The watcher is told the same with the trial's values."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep."""

    def restore(self, checkpoint_path: str) -> None:
        """Never asked for."""


class _Stopper(Stopper):
    """Ends the sweep at its target or when its time is over."""

    def __init__(self, phase: Phase, sweep: SweepDir) -> None:
        self._target, self._more = phase.spec.target, sweep.record.mode == "max"
        self._ends = None if phase.seconds is None else time.monotonic() + phase.seconds
        self.why = ""

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        value = float(str(result[VALUE]))
        if self._target is not None and (value >= self._target if self._more else value <= self._target):
            self.why = f"a trial reached the target {self._target:g}"
        return bool(self.why)

    def stop_all(self) -> bool:
        if self._ends is not None and time.monotonic() > self._ends:
            self.why = self.why or "the time was over"
        return bool(self.why)


class _Watcher(tune.Callback):
    """Writes down what becomes of each trial; tells search and console."""

    def __init__(self, phase: Phase, sweep: SweepDir, search: Search | None, listener: Listener) -> None:
        self._phase, self._sweep, self._search, self._listener = phase, sweep, search, listener
        self._done: set[int] = set()

    def begin(self, number: int, params: Params, seed: int) -> None:
        """A trial is about to wait for its place."""
        if number not in self._sweep.trials:
            cluster = trial_job(self._phase.order.base, params, params_of).cluster
            self._sweep.put(
                TrialRecord(
                    number=number, params=params, seed=seed, repeat_of=self._phase.repeat_of, status="running",
                    workers=cluster.workers, gpus=cluster.gpus_per_worker * cluster.workers,
                )
            )  # fmt: skip
        self._listener(self._sweep.trials[number])

    def on_trial_result(
        self, iteration: int, trials: object, trial: "tune.experiment.Trial", result: dict[str, object], **info: object
    ) -> None:
        record = self._of(trial)
        if record.status != "running":
            return  # shown again
        update: dict[str, object] = {"seconds": result.get("seconds", record.seconds)}
        look = result.get("look")
        if look is not None:
            seen = TrialEvaluation.model_validate(look)
            kept = tuple(old for old in record.evaluations if old.step < seen.step)
            update |= {"evaluations": (*kept, seen), "total_steps": result["total_steps"]}
            update["params"] = trial.config["params"]
        if result.get("failed"):
            update |= {"status": "failed", "reason": result["failed"]}
        elif result.get("finished"):
            update["status"] = "finished"
        self._put(record.model_copy(update=update))

    def on_trial_complete(self, iteration: int, trials: object, trial: "tune.experiment.Trial", **info: object) -> None:
        record = self._of(trial)
        if record.status == "running":
            record = record.model_copy(update={"status": "pruned", "reason": "stopped early"})
            self._put(record)
        self._end(record)

    def on_trial_error(self, iteration: int, trials: object, trial: "tune.experiment.Trial", **info: object) -> None:
        record = self._of(trial)
        run = self._sweep.trial_run(record.number)
        said = run.read_bytes("error.txt").decode() if run.exists("error.txt") else "its worker was lost"
        record = record.model_copy(update={"status": "failed", "reason": said})
        self._put(record)
        self._end(record)

    def _of(self, trial: "tune.experiment.Trial") -> TrialRecord:
        return self._sweep.trials[trial_number(trial.config, trial.trial_id)]

    def _put(self, record: TrialRecord) -> None:
        self._sweep.put(record)
        self._listener(record)

    def _end(self, record: TrialRecord) -> None:
        if record.number in self._done:
            return
        self._done.add(record.number)
        write_hparams(self._sweep.trial_run(record.number), record, self._sweep.record.metric, self._sweep.record.mode)
        if self._search is not None:
            best = record.best(self._sweep.record.mode)
            self._search.report(record.number, None if record.status == "failed" or best is None else best.value)
        self._sweep.free_space(self._phase.spec.storage_budget_gib)


def max_concurrent_trials(base: JobSpec, wanted: int | None) -> int:
    """How many trials of the job's own size run at the same time."""
    have = ray.cluster_resources()
    cluster = base.cluster
    room = have.get("CPU", 0.0) / (cluster.workers * cluster.cpus_per_worker)
    if cluster.gpus_per_worker:
        room = min(room, have.get("GPU", 0.0) / (cluster.workers * cluster.gpus_per_worker))
    return max(1, min(int(room + 1e-6), wanted or 1 << 16))
