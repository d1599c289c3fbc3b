"""The promise for jobs drawn at random: started by some workers at some ZeRO stage, resumed by others.

To 1e-5 for any shapes, and to the bit where the plan promises it.

A draw is a function of its number. LAUNCHER_DRAWS=100-160 selects the draws of `make test-all`.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.driver.prepare import PreparedJob
from launcher.errors import LauncherError
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, weights_at, with_job

_STEPS, _STOP = 16, 8
# Draws that have found bugs: a step counted in an int instead of a tensor (119, 143), a converted checkpoint that was
# removed while other ranks still read it (125, 131, not every time), an optimizer without states (138).
_REGRESSIONS = (119, 125, 138, *(pytest.param(number, marks=pytest.mark.long) for number in (131, 143)))
_FIRST, _LAST = (int(number) for number in os.environ.get("LAUNCHER_DRAWS", "160-180").split("-"))
_RATES = {"adamw": 3e-3, "sgd": 3e-2, "adafactor": 1e-2}
_OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"type": "adamw"},
    {"type": "adamw", "weight_decay": 0.1},
    {"type": "sgd", "momentum": 0.9},
    {"type": "sgd", "momentum": 0.0},
    {"type": "adafactor"},
)


@dataclass(frozen=True)
class _Half:
    """Workers and memory options of one half of a run."""

    workers: int
    parallel: dict[str, Any]


def _draw(number: int) -> tuple[dict[str, Any], _Half, _Half]:
    """Return a job's sections and the two halves of its run."""
    dice = random.Random(number)
    task = dice.choice(["text-classification", "token-classification", "causal-lm", "image-classification"])
    optimizer = dice.choice(_OPTIMIZERS)
    model, lora = _draw_model(dice, task)
    train = {
        "max_steps": _STEPS,
        "learning_rate": _RATES[optimizer["type"]],
        "optimizer": optimizer,
        "max_grad_norm": dice.choice([None, 1.0, 0.05]),
    }
    train |= {"layer_decay": 0.7} if dice.random() < 0.3 and not lora else {}
    train |= {"ema": 0.8} if dice.random() < 0.35 else {}
    train |= {"schedule": {"type": "cosine"}} if dice.random() < 0.3 else {}
    sections = {
        "train": train,
        "model": model,
        "task": _draw_task(dice, task),
        "evaluation": {"every_steps": 5, "batch_size": dice.choice([7, 16])},
        "checkpoint": {"every_minutes": None, "every_steps": 4, "keep_last": 9},
        "data": {"window_steps": dice.choice([2, 4])},
        "seed": dice.randrange(1000),
    }
    # A checkpoint of stage 3 is read by stage 3 alone.
    stages = (0,) if optimizer["type"] == "adafactor" else (3,) if dice.random() < 0.45 else (0, 1, 2)
    halves = [_draw_half(dice, task, optimizer["type"], stages) for _ in range(2)]
    return sections, halves[0], halves[1]


def _draw_model(dice: random.Random, task: str) -> tuple[dict[str, Any], bool]:
    model: dict[str, Any] = {"dropout": 0.0}  # its noise depends on the ranks
    if dice.random() < 0.25 and task != "image-classification":
        return model | {"lora": {"rank": 4}}, True
    if dice.random() < 0.3:
        model["freeze"] = dice.choice([{"embeddings": True}, {"embeddings": True, "layers": 1}])
    return model, False


def _draw_task(dice: random.Random, task: str) -> dict[str, Any]:
    section: dict[str, Any] = {"type": task}
    if task == "text-classification":
        section |= {"label_smoothing": 0.1} if dice.random() < 0.4 else {}
        section |= {"class_weights": "balanced"} if dice.random() < 0.4 else {}
    if task in ("causal-lm", "token-classification"):
        section["packing"] = dice.random() < 0.5
    return section if task == "image-classification" else section | {"max_length": 32}


def _draw_half(dice: random.Random, task: str, optimizer: str, stages: tuple[int, ...]) -> _Half:
    zero = stages[0] if len(stages) == 1 else dice.choice(stages)
    parallel: dict[str, Any] = {"zero": zero, "micro_batch": dice.choice([None, 1, 3, 4])}
    parallel["offload_optimizer"] = optimizer == "adamw" and zero > 0 and dice.random() < 0.25
    parallel["offload_parameters"] = optimizer == "adamw" and zero == 3 and dice.random() < 0.2
    parallel["activation_checkpointing"] = dice.random() < 0.15 and task != "image-classification"
    return _Half(dice.choice([1, 2, 3]), parallel)


def _train(prepared: PreparedJob, stop_after: int | None) -> Any:
    """Train a half; return None if the job cannot have so many workers."""
    try:
        return train_here(prepared, stop_after)
    except LauncherError as error:
        if "cannot be split into shards" in error.message:  # a group with fewer weights than workers
            return None
        raise


def _exported_weights(prepared: PreparedJob, step: int) -> Any:
    """Return the weights of a checkpoint as lists."""
    state = weights_at(prepared, step)
    return None if state is None else {name: tensor.double().flatten().tolist() for name, tensor in state.items()}


def _check_draw(number: int, models: dict[str, Path], folder: Path) -> None:
    sections, first, then = _draw(number)
    task = sections["task"]["type"]
    data = write_splits(folder / "data", train=11 * _STEPS - 5, validation=37, row_group=29, task=task)
    job = prepared_job(
        models[task], {**data, **sections.pop("data")}, folder, cluster={"workers": 1}, parallel={"zero": 0}, **sections
    )
    whole = run_group(1, _train, with_job(job, name="whole"), None)
    lines: dict[int, float] = {}
    for half, stop in ((first, _STOP), (then, None)):
        cut = with_job(job, name="cut", cluster={"workers": half.workers}, parallel=half.parallel)
        part = run_group(half.workers, _train, cut, stop)
        if part is None:
            pytest.skip(f"{half.workers} workers are too many for the job's smallest group of weights")
        lines |= dict(part["lines"])
    expected = dict(whole["lines"])
    assert sorted(lines) == sorted(expected) == list(range(1, _STEPS + 1))
    assert max(abs(lines[step] - expected[step]) for step in expected) < 1e-5, (number, first, then)
    best = whole["result"]["best_step"]
    assert part["result"]["best_step"] == best
    weights = run_group(1, _exported_weights, with_job(job, name="whole"), best)
    others = run_group(then.workers, _exported_weights, cut, best)
    assert weights.keys() == others.keys()
    differences = (np.abs(np.array(weights[name]) - np.array(others[name])).max(initial=0.0) for name in weights)
    assert max(differences) < 2e-4, (number, first, then)


@pytest.mark.parametrize("number", _REGRESSIONS)
def test_draws_that_once_failed(number: int, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    _check_draw(number, tiny_models, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(_FIRST, _LAST))
def test_draws(number: int, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    _check_draw(number, tiny_models, tmp_path)


def _check_bits(number: int, models: dict[str, Path], folder: Path) -> None:
    """Draw a job with dropout, train it whole and in two halves of other shapes, and compare the bits."""
    sections, *_ = _draw(number)
    dice = random.Random(-1 - number)
    sections["model"].pop("dropout")
    task = sections["task"]["type"]
    data = write_splits(folder / "data", train=11 * _STEPS - 5, validation=37, row_group=29, task=task)
    shared = {"micro_batch": dice.choice([None, 1]), "activation_checkpointing": dice.random() < 0.2}
    shared["activation_checkpointing"] &= task != "image-classification"
    stages = (0,) if sections["train"]["optimizer"]["type"] == "adafactor" else (0, 1)
    model = {"dropout": None, **sections.pop("model")}
    train = sections.pop("train") | {"precision": dice.choice(["fp32", "bf16"])}
    job = prepared_job(
        models[task], {**data, **sections.pop("data")}, folder, cluster={"workers": 1},
        parallel={"zero": 0, **shared}, model=model, train=train, **sections,
    )  # fmt: skip
    whole = run_group(1, _train, with_job(job, name="whole"), None)
    lines: dict[int, float] = {}
    for stop in (_STOP, None):
        workers, zero = dice.choice([1, 2, 4]), dice.choice(stages)
        cut = with_job(job, name="cut", cluster={"workers": workers}, parallel={"zero": zero})
        assert cut.plan.inexact == ()
        part = run_group(workers, _train, cut, stop)
        if part is None:
            pytest.skip(f"{workers} workers are too many for the job's smallest group of weights")
        lines |= dict(part["lines"])
    assert lines == dict(whole["lines"])
    assert {**part["result"], "elapsed_s": 0} == {**whole["result"], "elapsed_s": 0}
    best = whole["result"]["best_step"]
    weights = run_group(1, _exported_weights, with_job(job, name="whole"), best)
    assert run_group(workers, _exported_weights, cut, best) == weights


@pytest.mark.parametrize("number", range(4))
def test_drawn_jobs_have_the_same_bits(number: int, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    _check_bits(number, tiny_models, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(4, 34))
def test_thirty_drawn_jobs_have_the_same_bits(number: int, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    _check_bits(number, tiny_models, tmp_path)
