"""What must stop a run or be rejected: diverged workers, non-finite losses and gradients, unsafe weights."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from launcher.driver.prepare import prepare
from launcher.errors import ModelError
from launcher.models.pretrained import load_config, load_model
from launcher.spec.model import ModelSpec
from launcher.spec.train import CosineSchedule, LinearSchedule, TrainSpec
from launcher.train.checkpoint import catalog
from launcher.train.deepspeed_config import deepspeed_config
from launcher.train.schedule import learning_rate
from tests.support.jobs import make_job, prepared_job, write_splits
from tests.support.worker_group import error_of, run_group, train_here, train_losses


def _disturb(engine: Any) -> None:
    if engine.rank == 1:
        with torch.no_grad():
            next(p for p in engine.model.parameters() if p.dim() == 1).add_(1e-3)


def test_diverged_worker_stops_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=40)
    prepared = prepared_job(tiny_bert, data, tmp_path, parallel={"zero": 0}, cluster={"workers": 3})
    error = run_group(3, error_of, train_here, prepared, None, _disturb)
    assert error.startswith("WeightDivergenceError: after step 1 rank 1 of 3 holds other weights than the rest")


def test_non_finite_loss_stops_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=200)
    job = {"train": {"learning_rate": 1e30, "max_grad_norm": None, "schedule": {"type": "constant"}}}
    prepared = prepared_job(tiny_bert, data, tmp_path, cluster={"workers": 1}, **job)
    error = run_group(1, error_of, train_losses, prepared)
    assert "TrainingError: the loss is nan at step" in error and "lower train.learning_rate" in error


def _train_with_bad_gradient(prepared: Any, step: int) -> str:
    """Train with an infinite gradient of a finite loss at one step."""

    def add_hook(engine: Any) -> None:
        weight = next(p for p in engine.model.parameters() if p.dim() == 1)
        count = [0]

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            count[0] += 1
            return gradient * float("inf") if count[0] == step else gradient

        weight.register_hook(hook)

    return error_of(train_here, prepared, None, add_hook)


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("step", [3, 4])  # a step with a checkpoint, and the last one
def test_non_finite_gradient_stops_the_run(tiny_bert: Path, tmp_path: Path, zero: int, step: int) -> None:
    # No checkpoint contains the weights that it would lead to.
    data = write_splits(tmp_path / "data", train=44)
    job = prepared_job(
        tiny_bert, data, tmp_path, parallel={"zero": zero}, cluster={"workers": 1}, checkpoint={"every_steps": 3},
        train={"virtual_ranks": 1},  # one backward pass a step
    )  # fmt: skip
    error = run_group(1, _train_with_bad_gradient, job, step)
    assert error.startswith("TrainingError: the gradient is ") and f"at step {step}; lower train.learning_rate" in error
    assert catalog.complete_steps(job.run) == ([3] if step == 4 else [])


@pytest.mark.parametrize("values", [[math.nan, 0.3, 0.6, 0.5], [math.nan, math.nan, 0.1]])
def test_nan_metric_is_never_the_best(values: list[float], tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=11 * len(values), validation=10)
    job = prepared_job(tiny_bert, data, tmp_path, cluster={"workers": 1}, evaluation={"every_steps": 1})
    best = 1 + max((i for i, v in enumerate(values) if not math.isnan(v)), key=values.__getitem__)
    assert run_group(1, _best_of, job, values) == best


def _best_of(prepared: Any, values: list[float]) -> int:
    """Train with these values as the metric of each evaluation; return the best step."""
    from launcher.train import loop

    real = loop.validate
    remaining = iter(values)

    def validate(*args: Any) -> Any:
        scores = real(*args)
        return replace(scores, metrics={**scores.metrics, prepared.plan.metric: next(remaining)})

    with mock.patch.object(loop, "validate", validate):
        best_step: int = train_here(prepared)["result"]["best_step"]
    return best_step


def test_pickled_weights_are_rejected(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_bert, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    spec = ModelSpec(name=str(folder))
    with pytest.raises(ModelError, match=r"model\.name: .*pickled (has no safetensors|cannot be loaded)"):
        load_model("AutoModelForSequenceClassification", spec, load_config(spec), 0)


def test_new_layers_depend_on_the_seed_alone(tiny_bert: Path) -> None:
    spec = ModelSpec(name=str(tiny_bert))
    heads = []
    for seed in (0, 0, 1):
        torch.rand(7)  # the global generator's state must not matter
        heads.append(load_model("AutoModelForSequenceClassification", spec, load_config(spec), seed).classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.01 < float(heads[0].detach().std()) < 0.03  # N(0, initializer_range)


def test_learning_rate_follows_the_schedule() -> None:
    linear = TrainSpec(learning_rate=1.0, schedule=LinearSchedule(warmup_fraction=0.1))
    assert [learning_rate(linear, s, 20) for s in (0, 1, 2, 11)] == [0.5, 1.0, 1.0, 0.5]
    cosine = TrainSpec(learning_rate=1.0, schedule=CosineSchedule(warmup_fraction=0.0))
    assert learning_rate(cosine, 0, 20) == 1.0 and learning_rate(cosine, 10, 20) == pytest.approx(0.5)


def test_deepspeed_config_overrides_defaults_that_change_the_result(tiny_bert: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"max_grad_norm": None, "precision": "bf16"}}
    job = make_job(tiny_bert, {"train": "none"}, tmp_path, parallel={"zero": 3, "offload_parameters": True}, **sections)
    config: Any = deepspeed_config(job, 4, 2, 1000)
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's default is 1.0
    assert config["managed_gradient_accumulation"] is False and config["gradient_accumulation_steps"] == 1
    assert config["bf16"] == {"enabled": True} and config["fp16"]["enabled"] is False
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000  # the default allocates 2 GB


def test_early_stopping_keeps_the_best_checkpoint(tiny_bert: Path, tmp_path: Path) -> None:
    # With a learning rate near zero the first evaluation stays the best, and patience runs out.
    data = write_splits(tmp_path / "data", train=60, validation=30)
    prepared = prepare(
        make_job(
            tiny_bert, data, tmp_path,
            train={"learning_rate": 1e-12, "epochs": 9},
            evaluation={"every_steps": 2, "patience": 3},
        )
    )  # fmt: skip
    result = run_group(2, train_here, prepared)["result"]
    assert result["stopped_early"] and result["best_step"] == 2 and result["steps"] == 8
    checkpoints = sorted(p.name for p in (tmp_path / "test" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000008"]
