"""The same bits on any number of workers that divides the virtual ranks: losses, norms, scores and weights.

Stopped, resumed and resized in between too.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.tiny_models import make_tiny_resnet
from tests.support.worker_group import run_group, train_here, weights_at, with_job

_STEPS = 8
_AUGMENT = {"flip_fraction": 0.5, "crop_scale_min": 0.6, "rotate_degrees": 5}
_LORA: dict[str, Any] = {"model": {"dropout": None, "lora": {"rank": 4, "dropout": 0.1}}}
_BF16: dict[str, Any] = {"train": {"precision": "bf16"}}

# Name -> task, its parameters, other sections. Dropout is on.
_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text": ("text-classification", {"max_length": 32}, {}),
    "text-ema-bf16-micro": (
        "text-classification",
        {"max_length": 32},
        {"train": {"precision": "bf16", "ema": 0.9}, "parallel": {"micro_batch": 1}},
    ),
    "token": ("token-classification", {"max_length": 32}, {}),
    "question": ("question-answering", {"max_length": 32, "doc_stride": 8}, {}),
    "causal-packed": ("causal-lm", {"max_length": 48, "packing": True}, {}),
    "causal-lora-bf16": ("causal-lm", {"max_length": 48, "packing": True}, {**_LORA, **_BF16}),
    "seq2seq": ("seq2seq", {"max_target_length": 16}, {}),
    "masked-packed": ("masked-lm", {"max_length": 48, "packing": True}, {}),
    "embedding": ("sentence-embedding", {"max_length": 32, "symmetric": True}, {}),
    "reranking": ("reranking", {"max_length": 32}, {}),
    "preference-dpo-lora": ("preference", {"loss": "dpo", "max_length": 48, "beta": 0.5}, _LORA),
    "preference-kto": ("preference", {"loss": "kto", "max_length": 48, "beta": 0.5}, {}),
    "reward": ("reward", {"max_length": 48}, {}),
    "image-vit-augmented-ema": ("image-classification", {"augment": _AUGMENT}, {"train": {"ema": 0.9}}),
    "image-resnet-batch-norm": ("image-classification", {}, {"model": {"batch_norm": "trained"}}),
}


@pytest.fixture
def job(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path: Path) -> PreparedJob:
    task, params, sections = _CASES[request.param]
    model = make_tiny_resnet(tmp_path / "resnet") if "resnet" in request.param else tiny_models[task]
    data = write_splits(tmp_path / "data", train=71, validation=29, row_group=37, task=task)
    job = {
        "model": {"dropout": None},
        "evaluation": {"every_steps": 4},
        "checkpoint": {"every_steps": 2, "every_minutes": None, "keep_last": 9},
        **sections,
        "task": {"type": task, **params},
        "train": {
            "max_steps": _STEPS,
            "epochs": 2,
            "learning_rate": 3e-3,
            "virtual_ranks": 8,
            **sections.get("train", {}),
        },
    }
    return prepared_job(model, {**data, "window_steps": 3}, tmp_path, **job)


def _train(prepared: PreparedJob, stop: int | None = None, is_complete: bool = True) -> dict[str, Any]:
    """Train from the last checkpoint, and return every logged number and a hash of the weights."""
    train_here(prepared, stop)
    if not is_complete:
        return {}
    lines = [line for line in prepared.run.read_metrics() if line.kind in ("step", "evaluation")]
    numbers = [
        [line.step, line.loss, line.grad_norm if line.kind == "step" else sorted(line.metrics.items())]
        for line in lines
    ]
    weights = weights_at(prepared, prepared.plan.total_steps)
    digest = hashlib.sha256()
    for name, weight in sorted((weights or {}).items()):
        digest.update(name.encode() + weight.float().numpy().tobytes())
    return {"numbers": numbers, "weights": digest.hexdigest()}


def _shapes(prepared: PreparedJob, workers: int, stages: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        _train(with_job(prepared, name=f"w{workers}-z{z}", cluster={"workers": workers}, parallel={"zero": z}))
        for z in stages
    ]


@pytest.mark.parametrize("job", tuple(_CASES), indirect=True)
def test_a_run_that_is_stopped_and_resized_trains_the_same_bits(job: PreparedJob) -> None:
    """Against one worker without ZeRO: four workers, one and two, with ZeRO 1 and 0."""
    assert job.plan.virtual_ranks == 8
    whole = run_group(1, _shapes, job, 1, (0,))[0]
    assert len(whole["numbers"]) == _STEPS + 2
    # They stop at the ends of windows, after steps 3 and 6; step 3 is trained again from the checkpoint before it. From
    # stage to stage states are converted.
    for workers, zero, stop in ((4, 1, 2), (1, 0, 5), (2, 1, None)):
        shape = {"cluster": {"workers": workers}, "parallel": {"zero": zero}}
        resized = run_group(workers, _train, with_job(job, name="resized", **shape), stop, stop is None)
    assert resized["numbers"] == whole["numbers"]
    assert resized["weights"] == whole["weights"]


@pytest.mark.long
@pytest.mark.parametrize("job", tuple(_CASES), indirect=True)
def test_any_number_of_workers_trains_the_same_bits(job: PreparedJob) -> None:
    runs = [run for workers in (1, 2, 4, 8) for run in run_group(workers, _shapes, job, workers, (0, 1))]
    for run in runs[1:]:
        assert run == runs[0]


@pytest.mark.parametrize("workers", [2, 3])
def test_other_shapes_stay_near(workers: int, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """ZeRO 2 and 3, whose gradients DeepSpeed adds, and workers that do not divide the parts; dropout is on."""
    data = write_splits(tmp_path / "data", train=71, row_group=37)
    train = {"max_steps": _STEPS, "epochs": 2, "learning_rate": 3e-3}
    job = prepared_job(tiny_models["text-classification"], data, tmp_path, model={"dropout": None}, train=train)
    alone = [number[1] for number in run_group(1, _shapes, job, 1, (0,))[0]["numbers"]]
    for run in run_group(workers, _shapes, job, workers, (0, 2, 3)):
        losses = [number[1] for number in run["numbers"]]
        assert max(abs(one - other) for one, other in zip(alone, losses, strict=True)) < 1e-6


def _twice(prepared: PreparedJob) -> list[dict[str, Any]]:
    """Train without ZeRO, with ZeRO 3, and once more without, one after the other in one process."""
    stages = {"first": 0, "between": 3, "second": 0}
    runs = {name: _train(with_job(prepared, name=name, parallel={"zero": zero})) for name, zero in stages.items()}
    return [runs["first"], runs["second"]]


@pytest.mark.parametrize("job", ["text"], indirect=True)
def test_a_job_before_it_in_the_process_changes_nothing(job: PreparedJob) -> None:
    first, second = run_group(1, _twice, with_job(job, cluster={"workers": 1}))
    assert second == first
