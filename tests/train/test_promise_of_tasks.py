"""The promise for every task: other workers, micro-batches, stages and stops; packed, with adapters, with BatchNorm."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from group import run_group, train_here, with_job
from tiny import make_tiny_resnet

from jobs import prepared_job, write_splits
from launcher.prepare import Prepared

_CUTS = [(0, None), (2, 1), (3, 2)]
_SYNC: dict[str, Any] = {"model": {"batch_norm": "sync"}}
_LORA: dict[str, Any] = {"model": {"lora": {"rank": 4}}}

# name: task, its parameters, other sections
_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text-lora": ("text-classification", {"max_length": 32}, _LORA),
    "token": ("token-classification", {}, {}),
    "token-lora": ("token-classification", {}, _LORA),
    "causal-padded": ("causal-lm", {"max_length": 48, "packing": False}, {}),
    "causal-packed": ("causal-lm", {"max_length": 48}, {}),
    "causal-packed-lora": ("causal-lm", {"max_length": 48}, _LORA),
    "image-vit": ("image-classification", {"augment": {"flip_fraction": 0.5, "crop_scale_min": 0.6}}, {}),
    "image-resnet-frozen": ("image-classification", {}, {}),
    "image-resnet-sync": ("image-classification", {}, _SYNC),
}


@pytest.fixture
def job(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path: Path) -> Prepared:
    task, params, sections = _CASES[request.param]
    model = make_tiny_resnet(tmp_path / "resnet") if "resnet" in request.param else tiny_models[task]
    data = write_splits(tmp_path / "data", train=131, row_group=37, task=task)
    train = {"max_steps": 20, "epochs": 2, "learning_rate": 3e-3}
    return prepared_job(model, data, tmp_path, task={"type": task, **params}, train=train, **sections)


def _cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", names or tuple(_CASES), indirect=True)


def _curves(prepared: Prepared, world_size: int) -> dict[str, list[float]]:
    found = {}
    for zero, micro in _CUTS:
        if micro is not None and prepared.job.model.syncs_batch_norm:
            continue  # statistics over a micro-batch are those of a micro-batch; the plan says so
        job = with_job(
            prepared,
            name=f"w{world_size}-z{zero}-m{micro}",
            parallel={"zero": zero, "micro_batch": micro},
            cluster={"workers": world_size},
        )
        found[f"{zero}/{micro}"] = [loss for _, loss in train_here(job)["lines"]]
    return found


@_cases()
def test_curve_is_a_function_of_the_job_file(job: Prepared) -> None:
    curves = {world: run_group(world, _curves, job, world) for world in (1, 2, 3)}
    reference = np.array(curves[1]["0/None"])
    assert len(reference) == 20
    assert reference[-4:].mean() < reference[:4].mean() * 0.99  # it learns, so equality means something
    for world, by_cut in curves.items():
        for cut, curve in by_cut.items():
            assert np.abs(np.array(curve) - reference).max() < 1e-5, f"{world} workers, zero/micro {cut}"


def _whole(prepared: Prepared) -> Any:
    return train_here(prepared)["lines"]


def _part(prepared: Prepared, stop_after: int) -> Any:
    return train_here(prepared, stop_after)["lines"]


@_cases("token", "causal-packed", "causal-packed-lora", "image-vit", "image-resnet-sync")
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(job: Prepared, tmp_path: Path) -> None:
    """Dropout on, in the middle of a window; with as many workers to the bit, with another number to 1e-5."""
    checkpoint = {"every_steps": 7, "every_minutes": None}
    noisy = {"model": {**job.job.model.model_dump(), "dropout": None}, "checkpoint": checkpoint}
    whole = with_job(job, name="whole", **noisy)
    reference = dict(map(tuple, run_group(2, _whole, whole)))
    stopped = with_job(job, name="stopped", **noisy)
    run_group(2, _part, stopped, 12)
    second = run_group(2, _whole, stopped)
    assert [tuple(line) for line in second] == [(step, reference[step]) for step in range(8, 21)]


@_cases("causal-packed", "causal-packed-lora", "image-resnet-sync")
def test_a_run_goes_on_with_another_number_of_workers(job: Prepared) -> None:
    checkpoint = {"every_steps": 7, "every_minutes": None}
    for zero in (2, 3):
        whole = with_job(job, name=f"whole-{zero}", checkpoint=checkpoint, parallel={"zero": zero})
        reference = dict(map(tuple, run_group(2, _whole, whole)))
        stopped = with_job(job, name=f"stopped-{zero}", checkpoint=checkpoint, parallel={"zero": zero})
        run_group(2, _part, stopped, 12)
        for step, loss in run_group(3, _whole, with_job(stopped, cluster={"workers": 3})):
            assert abs(loss - reference[step]) < 1e-5, f"step {step}"
