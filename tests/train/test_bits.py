"""The same bits on any number of workers that divides the virtual ranks: losses, scores and weights."""

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
    "text-ema-bf16": ("text-classification", {"max_length": 32}, {"train": {"precision": "bf16", "ema": 0.9}}),
    "text-micro": ("text-classification", {"max_length": 32}, {"parallel": {"micro_batch": 1}}),
    "token": ("token-classification", {"max_length": 32}, {}),
    "question": ("question-answering", {"max_length": 32, "doc_stride": 8}, {}),
    "causal-packed": ("causal-lm", {"max_length": 48, "packing": True}, {}),
    "causal-lora-bf16": ("causal-lm", {"max_length": 48, "packing": True}, {**_LORA, **_BF16}),
    "seq2seq": ("seq2seq", {"max_target_length": 16}, {}),
    "masked": ("masked-lm", {"max_length": 32}, {}),
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
        "checkpoint": {"every_steps": 3, "every_minutes": None, "keep_last": 9},
        **sections,
        "task": {"type": task, **params},
        "train": {"max_steps": _STEPS, "epochs": 2, "learning_rate": 3e-3, **sections.get("train", {})},
    }
    return prepared_job(model, data, tmp_path, **job)


def _train(prepared: PreparedJob, stops: tuple[int | None, ...] = (None,)) -> dict[str, Any]:
    """Train, from the last checkpoint after each stop, and return every logged number and a hash of the weights."""
    for stop in stops:
        train_here(prepared, stop)
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
def test_any_number_of_workers_trains_the_same_bits(job: PreparedJob) -> None:
    assert job.plan.virtual_ranks == 8
    runs = [run for workers in (1, 2, 4) for run in run_group(workers, _shapes, job, workers, (0, 1))]
    assert len(runs[0]["numbers"]) == _STEPS + 2
    for run in runs[1:]:
        assert run["numbers"] == runs[0]["numbers"]
        assert run["weights"] == runs[0]["weights"]
