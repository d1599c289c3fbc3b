"""The promise for every task: other workers, micro-batches, stages and stops; packed, with adapters, with BatchNorm."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.tiny_models import make_tiny_bloom, make_tiny_opt, make_tiny_resnet
from tests.support.worker_group import run_group, train_here, with_job

_SYNC: dict[str, Any] = {"model": {"batch_norm": "sync"}}
_LORA: dict[str, Any] = {"model": {"lora": {"rank": 4}}, "train": {"learning_rate": 3e-2, "max_steps": 20}}
_STEPS = 10
_AUGMENT = {"flip_fraction": 0.5, "crop_scale_min": 0.6, "rotate_degrees": 5}

# name: task, its parameters, other sections
_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text-lora": ("text-classification", {"max_length": 32}, _LORA),
    "token": ("token-classification", {"max_length": 32}, {}),
    "token-lora": ("token-classification", {"max_length": 32}, _LORA),
    "causal-packed": ("causal-lm", {"max_length": 48}, {}),
    # At a larger learning rate this one is chaotic: differences of the last bit double with every step.
    "causal-packed-lora": (
        "causal-lm",
        {"max_length": 48},
        {**_LORA, "train": {"learning_rate": 5e-3}},
    ),
    "causal-packed-opt": ("causal-lm", {"max_length": 48}, {"train": {"learning_rate": 1e-3}}),
    "causal-packed-opt-lora": ("causal-lm", {"max_length": 48}, {**_LORA, "train": {"learning_rate": 5e-3}}),
    "image-vit": ("image-classification", {"augment": _AUGMENT}, {}),
    "image-resnet-frozen": ("image-classification", {}, {}),
    "image-resnet-sync": ("image-classification", {}, _SYNC),
}


@pytest.fixture
def job(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path: Path) -> PreparedJob:
    task, params, sections = _CASES[request.param]
    model = tiny_models[task]
    if "resnet" in request.param:
        model = make_tiny_resnet(tmp_path / "resnet")
    if "opt" in request.param:
        model = make_tiny_opt(tmp_path / "opt", model)
    # Adapters take longer to learn something.
    rows = 131 if sections is _LORA else 71
    data = write_splits(tmp_path / "data", train=rows, row_group=37, task=task)
    train = {"max_steps": _STEPS, "epochs": 2, "learning_rate": 3e-3, **sections.get("train", {})}
    return prepared_job(model, data, tmp_path, **{**sections, "task": {"type": task, **params}, "train": train})


def _cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", names or tuple(_CASES), indirect=True)


def _curve(job: PreparedJob) -> list[float]:
    return [loss for _, loss in train_here(job)["lines"]]


def _cut_curves(job: PreparedJob) -> list[list[float]]:
    """ZeRO-2 and 3, with micro-batches unless BatchNorm looks at them; the plan says that it does."""
    micro = (None, None) if job.job.model.syncs_batch_norm else (1, 3)
    cuts = zip((2, 3), micro, strict=True)
    return [_curve(with_job(job, name=f"z{z}", parallel={"zero": z, "micro_batch": m})) for z, m in cuts]


@_cases(*(name for name in _CASES if "opt" not in name))
def test_curve_is_a_function_of_the_job_file(job: PreparedJob) -> None:
    """71 or 131 rows in steps of 11: nothing divides by 3 workers; the last batch of an epoch has 5 or 10."""
    reference = np.array(run_group(1, _curve, with_job(job, name="alone", cluster={"workers": 1})))
    assert len(reference) == job.plan.total_steps
    assert reference[-4:].mean() < reference[:4].mean() * 0.995  # it learns, so equality means something
    for curve in run_group(3, _cut_curves, with_job(job, cluster={"workers": 3})):
        assert np.abs(np.array(curve) - reference).max() < 1e-5


def _packed_and_padded(job: PreparedJob) -> list[list[float]]:
    padded = {**job.job.task.parameters(), "type": "causal-lm", "packing": False}
    return [_curve(job), _curve(with_job(job, name="padded", task=padded))]


@_cases("causal-packed", "causal-packed-opt", "causal-packed-opt-lora")
def test_packing_does_not_change_the_curve(job: PreparedJob) -> None:
    packed, padded = run_group(2, _packed_and_padded, job)
    assert np.abs(np.array(packed) - np.array(padded)).max() < 1e-5


def test_packing_is_off_where_samples_would_see_each_other(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = make_tiny_bloom(tmp_path / "bloom", tiny_models["causal-lm"])
    data = write_splits(tmp_path / "data", train=20, task="causal-lm")
    prepared = prepared_job(model, data, tmp_path, task={"type": "causal-lm"})
    assert prepared.job.task.parameters()["packing"] is False
    assert any(note.startswith("task.packing: off, as packed samples") for note in prepared.plan.notes)


def _whole(prepared: PreparedJob) -> Any:
    return train_here(prepared)["lines"]


def _part(prepared: PreparedJob, stop_after: int) -> Any:
    return train_here(prepared, stop_after)["lines"]


@_cases("token", "causal-packed", "causal-packed-lora", "image-vit", "image-resnet-sync")
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(job: PreparedJob) -> None:
    """Dropout on, in the middle of a window; with as many workers to the bit, with another number to 1e-5."""
    checkpoint = {"every_steps": 4, "every_minutes": None}
    noisy = {"model": {**job.job.model.model_dump(), "dropout": None}, "checkpoint": checkpoint}
    whole = with_job(job, name="whole", **noisy)
    reference = dict(map(tuple, run_group(2, _whole, whole)))
    stopped = with_job(job, name="stopped", **noisy)
    run_group(2, _part, stopped, 6)
    second = run_group(2, _whole, stopped)
    assert [tuple(line) for line in second] == [(step, reference[step]) for step in range(5, job.plan.total_steps + 1)]


@_cases("causal-packed", "causal-packed-lora", "image-resnet-sync")
def test_a_run_goes_on_with_another_number_of_workers(job: PreparedJob) -> None:
    checkpoint = {"every_steps": 4, "every_minutes": None}
    stopped = with_job(job, checkpoint=checkpoint, parallel={"zero": 3})
    reference = dict(map(tuple, run_group(2, _whole, with_job(stopped, name="whole"))))
    run_group(2, _part, stopped, 6)
    for step, loss in run_group(3, _whole, with_job(stopped, cluster={"workers": 3})):
        assert abs(loss - reference[step]) < 1e-5, f"step {step}"


def _statistics(job: PreparedJob) -> list[float]:
    """BatchNorm's running statistics right after the checkpoint is read."""
    found: list[float] = []

    def look(engine: Any) -> None:
        found.extend(float(b.double().sum()) for _, b in engine.model.named_buffers())

    train_here(job, 8, look)
    return found


@_cases("image-resnet-sync")
def test_statistics_of_batch_norm_come_along_to_another_number_of_workers(job: PreparedJob) -> None:
    stopped = with_job(job, checkpoint={"every_steps": 4, "every_minutes": None}, parallel={"zero": "auto"})
    run_group(2, _part, stopped, 9)
    first = run_group(2, _statistics, stopped)
    assert any(abs(value) > 1e-3 for value in first)
    for world_size in (1, 3):
        assert run_group(world_size, _statistics, with_job(stopped, cluster={"workers": world_size})) == first
