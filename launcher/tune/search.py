"""Which values the next trial gets. Runs on the head.

What random search and a grid suggest is a function of (space, seed, number of the trial) alone. Optuna's TPE also looks
at what the trials before it reached; a sweep that goes on tells it again. No state is kept but the trials themselves.
"""

import warnings
from collections.abc import Iterable, Mapping

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState, create_trial
from pydantic import JsonValue

from launcher.data.sampler import generator
from launcher.rundir.trials import TrialRecord
from launcher.spec.tune import Dimension, TuneSpec
from launcher.tune.space import Params, grid

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Search:
    """Suggests trials by number.

    Args:
        spec: the space and how it is searched.
        seed: the job's.
        mode: `max` or `min`.
    """

    def __init__(self, spec: TuneSpec, seed: int, mode: str) -> None:
        self._spec, self._seed = spec, seed
        self._grid = grid(spec.space) if spec.search == "grid" else None
        self._distributions = distributions(spec.space)
        self._study = _new_study(mode)
        self._open: dict[int, Trial] = {}

    @property
    def trials(self) -> int:
        """How many trials there are."""
        return min(self._spec.trials, len(self._grid)) if self._grid is not None else self._spec.trials

    def suggest(self, number: int) -> Params:
        """The values of one trial."""
        if self._grid is not None:
            return self._grid[number]
        self._study.sampler = self._sampler(number)
        trial = self._study.ask(self._distributions)
        self._open[number] = trial
        return {key: self._value(key, trial.params[key]) for key in self._spec.space}

    def replay(self, number: int, params: Params) -> None:
        """Take note of a trial that was suggested before the sweep was interrupted."""
        if self._grid is None:
            self._study.enqueue_trial(_drawn(self._spec.space, params))
            self._open[number] = self._study.ask(self._distributions)

    def report(self, number: int, value: float | None) -> None:
        """Tell what a trial reached in the end; None if it failed."""
        trial = self._open.pop(number, None)
        if trial is not None:
            self._study.tell(trial, value, TrialState.FAIL if value is None else TrialState.COMPLETE)

    def _sampler(self, number: int) -> BaseSampler:
        # Anew for each trial: what is drawn must not depend on how many were drawn before in this process.
        seed = int(generator("trial", self._seed, number).integers(2**31))
        if self._spec.search == "random":
            return RandomSampler(seed=seed)
        # Trials that run at the same time are told apart (constant liar), learning rate and batch size are not taken
        # for independent (multivariate).
        return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=8)

    def _value(self, key: str, drawn: float) -> JsonValue:
        choice = self._spec.space[key].choice
        return choice[int(drawn)] if choice is not None else drawn


def distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """The space as Optuna has it; a choice is drawn by its index, as Optuna's choices must be plain values."""
    found: dict[str, BaseDistribution] = {}
    for key, d in space.items():
        if d.ends is None:
            found[key] = CategoricalDistribution(tuple(range(len(d.choice or ()))))
        elif d.is_whole:
            found[key] = IntDistribution(int(d.ends[0]), int(d.ends[1]), log=d.is_log)
        else:
            found[key] = FloatDistribution(*d.ends, log=d.is_log)
    return found


def _drawn(space: Mapping[str, Dimension], params: Params) -> Params:
    """A trial's values as Optuna drew them: those of a choice by their index."""
    choices = {key: dimension.choice for key, dimension in space.items()}
    return {key: params[key] if choice is None else choice.index(params[key]) for key, choice in choices.items()}


def _new_study(mode: str) -> optuna.Study:
    return optuna.create_study(direction="maximize" if mode == "max" else "minimize")


def importances(space: Mapping[str, Dimension], trials: Iterable[TrialRecord], mode: str) -> dict[str, float]:
    """How much of the metric's variation each key explains, most first (PED-ANOVA, arXiv:2304.10255).

    Returns:
        Shares that sum to 1; empty where there are too few trials to tell.
    """
    study = _new_study(mode)
    known = distributions(space)
    for trial in trials:
        best = trial.best(mode)
        if best is None or trial.repeat_of is not None or set(known) - set(trial.params):
            continue
        study.add_trial(create_trial(params=_drawn(space, trial.params), distributions=known, value=best.value))
    varied = [key for key in known if len({repr(t.params[key]) for t in study.trials}) > 1]
    if len(study.trials) < 4 or not varied:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
        except UserWarning:  # good trials and bad ones are the same: nothing can be told
            return {}
    total = sum(found.values())
    return {key: value / total for key, value in found.items()} if total else {}
