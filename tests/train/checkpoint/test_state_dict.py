"""What a checkpoint holds of a model: the trained weights and the buffers, not the frozen weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.preflight import _changed_files
from launcher.errors import TrainingError
from launcher.models.fingerprint import fingerprint_model
from launcher.models.remote import local_copy
from launcher.spec.model import LoraSpec, ModelSpec
from launcher.train.checkpoint.state_dict import load_trained
from tests.support.jobs import prepared_job, write_splits
from tests.support.tiny_models import make_tiny_bert
from tests.support.worker_group import run_group, train_losses


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("model", [{"lora": {"rank": 4}}, {"freeze": {"backbone": True}}], ids=["lora", "freeze"])
def test_frozen_weights_are_not_saved(zero: int, model: dict[str, Any], tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=22)
    job = prepared_job(
        tiny_bert, data, tmp_path, model=model, parallel={"zero": zero}, train={"max_steps": 2},
        checkpoint={"every_steps": 1, "every_minutes": None}, cluster={"workers": 1},
    )  # fmt: skip
    run_group(1, train_losses, job)
    files = list(Path(job.run.uri).glob("checkpoints/step-00000001/*/state/*model_states.pt"))
    assert files
    for file in files:
        saved = torch.load(file, weights_only=True)
        trained = "lora_" if "lora" in model else "classifier"
        assert saved["module"] and all(trained in n or "modules_to_save" in n for n in saved["module"])
        assert saved.get("frozen_param_fragments") is None


class _Frozen(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.frozen, self.trained = (torch.nn.Parameter(torch.full((2,), value)) for _ in range(2))
        self.frozen.requires_grad_(False)


def test_a_trained_weight_may_not_be_missing() -> None:
    model = _Frozen(0.0)
    load_trained({"trained": torch.ones(2)}, model)
    assert model.trained.tolist() == [1, 1] and model.frozen.tolist() == [0, 0]
    # As older versions saved it.
    load_trained(_Frozen(3.0).state_dict(), model)
    assert model.trained.tolist() == model.frozen.tolist() == [3, 3]
    with pytest.raises(TrainingError, match=r"the checkpoint has nothing for trained and 0 more weights; it is of"):
        load_trained({"frozen": torch.ones(2)}, model)


def test_another_model_of_the_same_size_is_noticed_where_weights_are_frozen(tmp_path: Path) -> None:
    spec = ModelSpec(name=str(make_tiny_bert(tmp_path)))
    adapted = spec.model_copy(update={"lora": LoraSpec()})
    before, sizes = fingerprint_model(adapted), fingerprint_model(spec)
    assert fingerprint_model(adapted) == before
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert fingerprint_model(spec) == sizes
    (change,) = _changed_files(before, fingerprint_model(adapted))
    assert change.startswith(f"model.safetensors: {len(content)} bytes, samples ")
    # A run of an older version knows the size alone.
    assert _changed_files(sizes, before) == []


def test_a_local_copy_with_weights_does_not_change_the_fingerprint_of_a_remote_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    uri = f"file://{make_tiny_bert(tmp_path / 'model')}"
    for spec in (ModelSpec(name=uri), ModelSpec(name=uri, lora=LoraSpec())):
        local_copy.cache_clear()
        before = fingerprint_model(spec)
        assert "model.safetensors" in before
        local_copy(uri, weights=True)
        local_copy.cache_clear()
        assert fingerprint_model(spec) == before
