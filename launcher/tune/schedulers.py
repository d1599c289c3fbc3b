"""Ray Tune's trial schedulers, built from the job file. Runs on the head.

All count progress in percent of a trial's steps, because trials with other batch sizes have other numbers of steps.
"""

from collections.abc import Mapping

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from launcher.spec.tune import Dimension, TuneSpec
from launcher.tune.space import Params
from launcher.tune.trial import BUDGET, PROGRESS


def scheduler_name(spec: TuneSpec) -> str:
    """Return the name of the scheduler: bohb is a search that implies hyperband."""
    return "hyperband" if spec.search == "bohb" else spec.scheduler


def make_scheduler(spec: TuneSpec) -> TrialScheduler:
    """Build the scheduler of a sweep."""
    # At least 1: ASHA refuses a grace period of 0.
    grace = max(1, round(100 * spec.grace))
    name = scheduler_name(spec)
    if name == "asha":
        return AsyncHyperBandScheduler(
            time_attr=PROGRESS, max_t=100, grace_period=grace, reduction_factor=spec.reduction_factor
        )
    if name == "hyperband":
        # Its brackets start at one unit of time. With percent as the unit, the largest bracket would need 81 trials.
        rounds = max(1, round(1 / spec.grace))
        return HyperBandScheduler(time_attr=BUDGET, max_t=rounds, reduction_factor=spec.reduction_factor)
    if name == "median":
        return MedianStoppingRule(time_attr=PROGRESS, grace_period=grace, min_samples_required=3)
    if name == "pbt":
        return PopulationBasedTraining(
            time_attr=PROGRESS,
            perturbation_interval=grace,
            # Nested as in the trial's config: PBT looks each value up under the same keys.
            hyperparam_mutations={"params": {key: _make_domain(d) for key, d in spec.space.items()}},
            custom_explore_fn=lambda config: _clamp_params(config, spec.space),
        )
    return FIFOScheduler()


def _make_domain(d: Dimension) -> object:
    if d.ends is None:
        # PBT moves to a neighbour in this list, or draws anew, so the order of a choice matters under PBT.
        return list(d.choice or ())
    low, high = d.ends
    if d.is_whole:
        # `randint` excludes its upper end, unlike the job file.
        return tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if d.is_log else tune.uniform(low, high)


def _clamp_params(config: dict[str, Params], space: Mapping[str, Dimension]) -> dict[str, Params]:
    """Move values back into their ranges: PBT multiplies them by 0.8 or 1.2 without a limit."""
    for key, d in space.items():
        if d.ends is not None:
            value = min(max(float(str(config["params"][key])), d.ends[0]), d.ends[1])
            config["params"][key] = round(value) if d.is_whole else value
    return config
