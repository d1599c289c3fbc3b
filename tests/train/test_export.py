"""Export from ZeRO-3: adapters alone, merged adapters, and BatchNorm statistics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from launcher.data.rank_batches import collate
from launcher.data.stream import ShardStream
from launcher.driver.prepare import PreparedJob
from launcher.errors import TrainingError
from launcher.tasks import build_task
from launcher.train.engine import Engine
from launcher.train.export import check_finite, export_model
from launcher.train.loop import forward_backward
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, share_cells


def _train_and_export(prepared: PreparedJob) -> list[list[float]]:
    """Train three steps and export; return the trained model's own logits for a batch."""
    task = build_task(prepared.job)
    engine = Engine(prepared.job, task, prepared.plan.micro_batch)
    engine.train_mode()
    batches = [batch for _, _, batch in ShardStream(share_cells(prepared, 2, engine.rank, 0)).steps()]
    for step, batch in enumerate(batches[:3]):
        forward_backward(engine, task, batch.micro_batches, batch.global_batch, step)
        engine.step(1e-2, step)
    export_model(prepared.run, engine, task, prepared.job, prepared.plan)
    inputs = collate(task, batches[0].micro_batches[0], batches[0].global_batch)
    Path(prepared.run.uri).mkdir(parents=True, exist_ok=True)
    torch.save(dict(inputs.inputs), f"{prepared.run.uri}/inputs-{engine.rank}.pt")
    with engine.evaluation_mode():
        logits: list[list[float]] = engine.forward(task, inputs)["logits"].flatten(1).tolist()
    return logits


@pytest.mark.parametrize(
    ("task", "auto", "params"),
    [
        ("causal-lm", AutoModelForCausalLM, {"max_length": 48}),
        ("text-classification", AutoModelForSequenceClassification, {"max_length": 32}),
    ],
)
def test_adapters_alone_and_merged_match_the_trained_model(
    task: str, auto: Any, params: dict[str, Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    data = write_splits(tmp_path / "data", train=40, task=task)
    prepared = prepared_job(
        tiny_models[task], data, tmp_path, task={"type": task, **params}, model={"lora": {"rank": 4}},
        parallel={"zero": 3}, train={"batch_size": 10},
    )  # fmt: skip
    expected = torch.tensor(run_group(2, _train_and_export, prepared))
    inputs = torch.load(f"{prepared.run.uri}/inputs-0.pt")
    merged = auto.from_pretrained(prepared.run.path("model")).eval()
    base = auto.from_pretrained(tiny_models[task], config=merged.config).eval()
    adapted = PeftModel.from_pretrained(base, prepared.run.path("adapter")).eval()
    with torch.no_grad():
        for model in (merged, adapted):
            assert torch.allclose(model(**inputs).logits.flatten(1), expected, atol=1e-5)
    assert not [name for name in merged.state_dict() if "lora" in name]


def test_exported_batch_norm_statistics_match_the_trained_model(tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=40, task="image-classification")
    config = {"model_type": "resnet", "image_size": 16, "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    prepared = prepared_job(
        Path("none"), data, tmp_path, task={"type": "image-classification"}, train={"batch_size": 10},
        model={"name": "", "from_config": {**config, "layer_type": "basic"}},
    )  # fmt: skip
    assert prepared.plan.notes[-1].startswith("BatchNorm is synchronised over all workers")
    expected = torch.tensor(run_group(2, _train_and_export, prepared))
    inputs = torch.load(f"{prepared.run.uri}/inputs-0.pt")
    model = AutoModelForImageClassification.from_pretrained(prepared.run.path("model")).eval()
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits.flatten(1), expected, atol=1e-5)
    assert any("running_mean" in name and float(value.abs().sum()) > 0 for name, value in model.state_dict().items())


def test_weights_that_are_not_finite_are_not_exported() -> None:
    check_finite({"a": torch.ones(3), "b": torch.arange(3)})
    with pytest.raises(TrainingError, match=r"1 of 2 weights are not finite \(b\), so no model is exported"):
        check_finite({"a": torch.ones(3), "b": torch.tensor([0.0, float("nan")])})
