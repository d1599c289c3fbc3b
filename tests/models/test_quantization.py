"""Base weights of 4 bits (`model.quantization`): which layers, one curve, adapters alone in checkpoints, and export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.driver.memory.activations import count_parameters, meta_model
from launcher.driver.prepare import PreparedJob, prepare
from launcher.errors import ModelError
from launcher.models.adapters import add_adapters
from launcher.models.pretrained import load_config, load_model
from launcher.models.quantization import BYTES_PER_WEIGHT, dequantize, is_quantized, quantized_layers
from launcher.spec.model import LoraSpec, ModelSpec
from launcher.tasks import build_task
from tests.support.jobs import make_job, prepared_job, write_splits
from tests.support.tiny_models import make_tiny_bert, make_tiny_gpt
from tests.support.worker_group import run_group, train_curve, train_losses, with_job

_NF4: dict[str, Any] = {"quantization": "nf4", "lora": {"rank": 4, "dora": True}}


@pytest.fixture(autouse=True)
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models whose rows are whole blocks of 64."""
    root = tmp_path_factory.mktemp("models")
    return {"text-classification": make_tiny_bert(root / "bert", 64), "causal-lm": make_tiny_gpt(root / "gpt", 64)}


def _load(folder: Path, auto: str = "AutoModelForSequenceClassification") -> Any:
    spec = ModelSpec(name=str(folder), quantization="nf4", lora=LoraSpec(rank=4), dropout=0.0)
    return load_model(auto, spec, load_config(spec), 0), spec


@pytest.mark.parametrize(
    ("task", "auto", "skipped"),
    [
        ("text-classification", AutoModelForSequenceClassification, {"bert.pooler.dense", "classifier"}),
        ("causal-lm", AutoModelForCausalLM, {"lm_head"}),
    ],
)
def test_linear_layers_of_the_body_have_four_bits(
    task: str, auto: Any, skipped: set[str], folders: dict[str, Path]
) -> None:
    model, _ = _load(folders[task], auto.__name__)
    whole = auto.from_pretrained(folders[task])
    quantized = {name for name, module in model.named_modules() if is_quantized(getattr(module, "weight", None))}
    linear = {n for n, module in whole.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert quantized == set(quantized_layers(whole)) == linear - skipped
    for name in quantized:
        weight = whole.get_submodule(name).weight
        # GPT-2's layers are transposed before they are quantized, and back after.
        assert dequantize(model.get_submodule(name)).shape == weight.shape
        error = (dequantize(model.get_submodule(name)) - weight).norm() / weight.norm()
        assert 0.05 < error < 0.11  # that of 4 bits for normal weights
        assert model.get_submodule(name).weight.nbytes == weight.numel() // 2
    assert not hasattr(model.config, "quantization_config")


def test_layers_of_other_sizes_stay_whole(tiny_bert: Path) -> None:
    """bitsandbytes confuses the scales of rows that are not whole blocks."""
    model, _ = _load(tiny_bert)
    quantized = {name for name, module in model.named_modules() if is_quantized(getattr(module, "weight", None))}
    assert quantized == {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}


def test_evaluation_leaves_the_weights_as_they_are(folders: dict[str, Path]) -> None:
    """bitsandbytes would pack them for its CPU kernel, with rounded scales."""
    model, spec = _load(folders["text-classification"])
    model = add_adapters(model, "AutoModelForSequenceClassification", spec, 0)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer
    before = dequantize(layer)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[5, 6]]))
    assert torch.equal(dequantize(layer), before)


def _job(task: str, folders: dict[str, Path], folder: Path, **train: Any) -> PreparedJob:
    data = write_splits(folder / "data", train=71, row_group=37, task=task)
    return prepared_job(
        folders[task], data, folder, task={"type": task, "max_length": 32}, model=_NF4,
        train={"learning_rate": 1e-2, "max_steps": 6, **train}, checkpoint={"every_steps": 3, "every_minutes": None},
    )  # fmt: skip


def _curves(job: PreparedJob) -> list[list[float]]:
    return [train_curve(with_job(job, name=f"z{z}", parallel={"zero": z, "micro_batch": 1})) for z in (0, 1)]


def test_curve_is_a_function_of_the_job_file(folders: dict[str, Path], tmp_path: Path) -> None:
    job = _job("causal-lm", folders, tmp_path)
    reference = np.array(run_group(1, train_curve, with_job(job, name="alone", cluster={"workers": 1})))
    for curve in run_group(2, _curves, job):
        assert np.abs(np.array(curve) - reference).max() < 1e-5
    # Started by two workers with ZeRO-2, resumed by three.
    run_group(2, train_losses, job, 4)
    for step, loss in run_group(3, train_losses, with_job(job, cluster={"workers": 3})):
        assert abs(loss - reference[step - 1]) < 1e-5, f"step {step}"
    _check_checkpoint(job)


def _check_checkpoint(job: PreparedJob) -> None:
    (file, *_) = Path(job.run.uri).glob("checkpoints/step-00000003/*/state/mp_rank_00_model_states.pt")
    names = torch.load(file, weights_only=True)["module"].keys()
    assert names and all("lora_" in name or "modules_to_save" in name for name in names)


def _export(job: PreparedJob) -> list[list[float]]:
    from tests.train.test_export import _train_and_export

    return _train_and_export(job)


@pytest.mark.parametrize(("task", "precision"), [("text-classification", "fp32"), ("causal-lm", "bf16")])
def test_exported_model_is_whole(task: str, precision: str, folders: dict[str, Path], tmp_path: Path) -> None:
    job = _job(task, folders, tmp_path, precision=precision)
    expected = torch.tensor(run_group(2, _export, job))
    inputs = torch.load(f"{job.run.uri}/inputs-0.pt")
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(job.run.path("model"), dtype=torch.float32).eval()
    assert "quantization_config" not in model.config.to_dict()
    with torch.no_grad():
        logits = model(**inputs).logits.flatten(1)
    # In bf16 the merged weights are rounded, as the activations of the training are.
    assert torch.allclose(logits, expected, atol=1e-5 if precision == "fp32" else 0.03)
    base, _ = _load(Path(job.job.model.name), auto.__name__)
    names = PeftModel.from_pretrained(base, job.run.path("adapter")).state_dict().keys()
    assert any("lora_magnitude_vector" in name for name in names)


def test_estimate_counts_half_a_byte_for_each_weight(folders: dict[str, Path], tmp_path: Path) -> None:
    data, folder = write_splits(tmp_path / "data", train=22), folders["text-classification"]
    plain, small = (
        prepare(make_job(folder, data, tmp_path, model={"lora": {"rank": 4}, **model}), measure=True)
        for model in ({}, {"quantization": "nf4"})
    )
    whole, counts = (
        count_parameters(meta_model(p.job, build_task(p.job)), p.job.model.quantization is not None)
        for p in (plain, small)
    )
    model, _ = _load(folder)
    weights = [w.quant_state.shape.numel() for w in model.parameters() if is_quantized(w)]
    assert whole.frozen - counts.frozen == sum(weights)
    assert counts.quantized_bytes == int(sum(weights) * BYTES_PER_WEIGHT)
    assert counts.dequantized == max(weights) == 64 * 128
    assert plain.plan.memory is not None and small.plan.memory is not None
    saved = plain.plan.memory.weights - small.plan.memory.weights
    assert saved == sum(weights) * 4 - counts.quantized_bytes


def test_missing_bitsandbytes_is_named(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_splits(tmp_path / "data", train=22)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"model.quantization: nf4 needs bitsandbytes, which is not installed here; pip"
    ):
        prepare(make_job(tiny_bert, data, tmp_path, model=_NF4))
