"""The search space is checked, and the suggested values are reproducible (`launcher/tune/space.py`, `search.py`)."""

from math import log10
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launcher.errors import SpecError, UserError
from launcher.rundir.trials import TrialEvaluation, TrialRecord
from launcher.spec.job import JobSpec
from launcher.spec.tune import Dimension, TuneSpec
from launcher.tasks import params_class
from launcher.tune.search import Search, compute_importances
from launcher.tune.space import check_space, choose_metric, list_grid, trial_job

_SPACE: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [1e-6, 1e-3]},
    "train.batch_size": {"choice": [16, 32, 64]},
    "train.epochs": {"int": [1, 3]},
}


def _spec(space: dict[str, Any] | None = None, **more: Any) -> TuneSpec:
    return TuneSpec.model_validate({"space": space or _SPACE, **more})


def _job(tmp_path: Path) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "sweep",
            "task": {"type": "text-classification", "max_length": 32},
            "model": {"name": str(tmp_path)},
            "data": {"train": "train.parquet", "validation": "validation.parquet"},
        }
    )


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({}, "exactly one of"),
        ({"uniform": [0, 1], "choice": [1]}, "exactly one of"),
        ({"uniform": [1, 0]}, "lower bound first"),
        ({"loguniform": [0, 1]}, "bounds above 0"),
        ({"logint": [0, 4]}, "bounds above 0"),
        ({"choice": []}, "at least one value"),
        ({"choice": [1, 1]}, "no value twice"),
    ],
)
def test_an_invalid_dimension_is_refused(dimension: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Dimension.model_validate(dimension)


@pytest.mark.parametrize(
    ("space", "more", "message"),
    [
        ({"train.learning_rat": {"uniform": [0.1, 0.2]}}, {}, "tune.space: train.learning_rat"),
        ({"train.batch_size": {"choice": [8, 0]}}, {}, "tune.space: train.batch_size"),
        ({"task.max_length": {"choice": [32, 2]}}, {}, "tune.space: task.max_length is 2, which is below 4"),
        ({"name": {"choice": ["a", "b"]}}, {}, "name cannot be searched"),
        ({"data.train": {"choice": ["a", "b"]}}, {}, "data.train cannot be searched"),
        ({"seed.low": {"choice": [1, 2]}}, {}, "seed has no keys"),
        ({"train.batch_size": {"choice": [8, 16]}}, {"scheduler": "pbt"}, "cannot change during a trial"),
        (_SPACE, {"search": "grid"}, "train.learning_rate is a continuous range"),
    ],
)
def test_a_space_with_an_impossible_trial_is_refused(
    space: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        check_space(_job(tmp_path), _spec(space, **more), params_class)


def test_a_trial_is_the_job_with_its_values(tmp_path: Path) -> None:
    job = _job(tmp_path)
    trial = trial_job(job, {"train.learning_rate": 3e-4, "task.max_length": 64, "model.name": "other"}, params_class)
    assert (trial.train.learning_rate, trial.task.parameters()["max_length"], trial.model.name) == (3e-4, 64, "other")
    back = trial_job(
        trial, {"train.learning_rate": 2e-5, "task.max_length": 32, "model.name": str(tmp_path)}, params_class
    )
    assert back == job
    assert trial_job(job, {"model.lora.rank": 4}, params_class).model.lora.rank == 4  # the job has no `model.lora`


def test_a_grid_has_every_combination_once() -> None:
    space = _spec({"a.x": {"choice": ["p", "q"]}, "a.y": {"int": [1, 3]}}).space
    rows = list_grid(space)
    assert len(rows) == 6 and len({tuple(row.items()) for row in rows}) == 6
    assert rows[0] == {"a.x": "p", "a.y": 1} and rows[1] == {"a.x": "p", "a.y": 2}
    assert Search(_spec({"a.y": {"int": [1, 3]}}, search="grid", trials=50), 0, "max").trials == 3


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), order=st.permutations(range(6)))
def test_a_random_trial_is_a_function_of_its_number(seed: int, order: list[int]) -> None:
    """Show that neither the order of suggestions nor earlier ones in the process change a trial."""
    ordered = Search(_spec(), seed, "max")
    expected = [ordered.suggest(number) for number in range(6)]
    shuffled = Search(_spec(), seed, "max")
    assert {number: shuffled.suggest(number) for number in order} == dict(enumerate(expected))
    for trial in expected:
        assert 1e-6 <= float(str(trial["train.learning_rate"])) <= 1e-3
        assert trial["train.batch_size"] in (16, 32, 64) and trial["train.epochs"] in (1, 2, 3)
    assert len({repr(trial) for trial in expected}) == 6


@pytest.mark.parametrize("search", ["optuna", "bohb"])
def test_tpe_finds_good_values_and_repeats_its_suggestions_after_a_replay(search: str) -> None:
    """Use a metric that is best at a learning rate of 1e-4."""
    spec = _spec(search=search)

    def score(params: dict[str, Any]) -> float:
        return -abs(log10(params["train.learning_rate"]) + 4)

    search_all = Search(spec, 3, "max")
    trials = []
    for number in range(30):
        params = search_all.suggest(number)
        trials.append(params)
        search_all.report(number, score(params))
    late = [score(params) for params in trials[20:]]
    early = [score(params) for params in trials[:8]]  # before TPE begins
    assert sum(late) / 10 > sum(early) / 8 + 0.3
    resumed = Search(spec, 3, "max")
    for number in range(20):
        resumed.replay(number, trials[number])
        resumed.report(number, score(trials[number]))
    assert resumed.suggest(20) == trials[20]


def test_the_most_important_key_is_the_one_that_changes_the_metric() -> None:
    spec = _spec()
    search = Search(spec, 0, "max")
    trials = []
    for number in range(40):
        params = search.suggest(number)
        value = 1000 * float(str(params["train.learning_rate"]))
        evaluation = TrialEvaluation(step=1, progress=100, value=value, loss=0)
        trials.append(TrialRecord(number=number, params=params, seed=0, status="finished", evaluations=(evaluation,)))
    shares = compute_importances(spec.space, trials, "max")
    assert next(iter(shares)) == "train.learning_rate" and shares["train.learning_rate"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)
    assert compute_importances(spec.space, trials[:2], "max") == {}


def test_the_metric_is_one_of_the_tasks_own(tmp_path: Path) -> None:
    job = _job(tmp_path)
    assert choose_metric(_spec(), job, {"accuracy": "max"}) == ("accuracy", "max")
    assert choose_metric(_spec(metric="loss"), job, {"accuracy": "max"}) == ("loss", "min")
    with pytest.raises(UserError, match=r"tune\.metric"):
        choose_metric(_spec(metric="f2"), job, {"accuracy": "max"})
