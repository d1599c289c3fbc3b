"""The search algorithms: which values the next trial gets. Runs on the head.

Under random search and grid search, the values are a function of space, seed and trial number alone. Optuna's TPE also
uses the results of earlier trials, and a resumed sweep replays them. Nothing is stored but the trials themselves.
"""

import warnings
from collections.abc import Iterable, Mapping

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState, create_trial

from launcher.data.sampler import generator
from launcher.rundir.trials import TrialRecord
from launcher.spec.tune import Dimension, TuneSpec
from launcher.tune.space import Params, list_grid

# At its default level Optuna logs every new study to stderr, in the middle of the live table.
optuna.logging.set_verbosity(optuna.logging.ERROR)

_STARTUP_TRIALS = 8
"""Random trials before TPE begins."""
_MIN_TRIALS_FOR_IMPORTANCE = 4


class Search:
    """Suggests the values of trials by their number.

    Args:
        spec: Space and search algorithm.
        seed: Seed of the job.
        mode: Direction of the metric, `max` or `min`.
    """

    def __init__(self, spec: TuneSpec, seed: int, mode: str) -> None:
        self._spec = spec
        self._seed = seed
        self._grid = list_grid(spec.space) if spec.search == "grid" else None
        self._distributions = _make_distributions(spec.space)
        self._study = _make_study(mode)
        self._running: dict[int, Trial] = {}

    @property
    def trials(self) -> int:
        """Number of trials: the job's, or the size of a smaller grid."""
        return min(self._spec.trials, len(self._grid)) if self._grid is not None else self._spec.trials

    def suggest(self, number: int) -> Params:
        """Return the values of a new trial."""
        if self._grid is not None:
            return self._grid[number]
        self._study.sampler = self._make_sampler(number)
        trial = self._study.ask(self._distributions)
        self._running[number] = trial
        params: Params = {}
        for key, dimension in self._spec.space.items():
            drawn = trial.params[key]
            params[key] = dimension.choice[int(drawn)] if dimension.choice is not None else drawn
        return params

    def replay(self, number: int, params: Params) -> None:
        """Add a trial that was suggested before the sweep was interrupted."""
        if self._grid is None:
            # The next `ask` takes the queued values instead of drawing, so no other `ask` may come between the two
            # calls.
            self._study.enqueue_trial(_to_optuna(self._spec.space, params))
            self._running[number] = self._study.ask(self._distributions)

    def report(self, number: int, value: float | None) -> None:
        """Report the result of a trial, or None if it failed."""
        trial = self._running.pop(number, None)
        if trial is not None:
            self._study.tell(trial, value, TrialState.FAIL if value is None else TrialState.COMPLETE)

    def _make_sampler(self, number: int) -> BaseSampler:
        # A new sampler for each trial: a draw must not depend on how many draws this process made before.
        seed = int(generator("trial", self._seed, number).integers(2**31))
        if self._spec.search == "random":
            return RandomSampler(seed=seed)
        # constant_liar keeps concurrent trials apart; multivariate models the dependence of, for example, learning
        # rate and batch size.
        return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=_STARTUP_TRIALS)


def compute_importances(space: Mapping[str, Dimension], trials: Iterable[TrialRecord], mode: str) -> dict[str, float]:
    """Return the fraction of the metric's variance that each key explains (PED-ANOVA, arXiv:2304.10255).

    Returns:
        Fractions that sum to 1, the largest first. Empty if the trials are too few or too similar.
    """
    study = _make_study(mode)
    distributions = _make_distributions(space)
    for trial in trials:
        best = trial.best_evaluation(mode)
        # Repetitions vary the seed alone, and would count the best values several times.
        if best is None or trial.repeat_of is not None or set(distributions) - set(trial.params):
            continue
        params = _to_optuna(space, trial.params)
        study.add_trial(create_trial(params=params, distributions=distributions, value=best.value))
    varied = [key for key in distributions if len({repr(t.params[key]) for t in study.trials}) > 1]
    if len(study.trials) < _MIN_TRIALS_FOR_IMPORTANCE or not varied:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        # PED-ANOVA warns if the good trials cannot be told from the others.
        warnings.simplefilter("error", UserWarning)
        try:
            importances = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
        except UserWarning:
            return {}
    total = sum(importances.values())
    return {key: value / total for key, value in importances.items()} if total else {}


def _make_distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """Return the space as Optuna's distributions. A choice is drawn by index: Optuna's choices must be plain values."""
    distributions: dict[str, BaseDistribution] = {}
    for key, d in space.items():
        if d.ends is None:
            distributions[key] = CategoricalDistribution(tuple(range(len(d.choice or ()))))
        elif d.is_whole:
            distributions[key] = IntDistribution(int(d.ends[0]), int(d.ends[1]), log=d.is_log)
        else:
            distributions[key] = FloatDistribution(*d.ends, log=d.is_log)
    return distributions


def _to_optuna(space: Mapping[str, Dimension], params: Params) -> Params:
    """Return a trial's values as Optuna drew them, with the index of each choice."""
    choices = {key: dimension.choice for key, dimension in space.items()}
    # `index` is unambiguous: a choice with equal values (1 and True are equal) is refused by `Dimension`.
    return {key: params[key] if choice is None else choice.index(params[key]) for key, choice in choices.items()}


def _make_study(mode: str) -> optuna.Study:
    return optuna.create_study(direction="maximize" if mode == "max" else "minimize")
