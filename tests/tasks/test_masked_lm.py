"""Masked language modelling: losses, filled masks, marks of the report, and the export as a model for other tasks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from launcher.spec.model import ModelSpec
from launcher.tasks.masked_lm import MaskedLM, MaskedParams
from launcher.tasks.text_classification import TextClassification, TextParams


@pytest.fixture
def task(tiny_models: dict[str, Path]) -> MaskedLM:
    return MaskedLM(MaskedParams(max_length=48), ModelSpec(name=str(tiny_models["masked-lm"])), 0)


def test_losses_are_those_of_transformers(task: MaskedLM) -> None:
    encoded = task.encode(task.example_rows(9, 0), True, np.arange(9))
    batch, model = task.collate(encoded.samples), task.build_model().eval()
    assert (batch.labels != -100).sum(1).tolist() == encoded.weights.tolist()
    with torch.no_grad():
        losses = task.sample_losses(task.forward(model, batch), batch)
        mean = float(model(**batch.inputs, labels=batch.labels)["loss"])
    assert float(losses.sum()) / encoded.weights.sum() == pytest.approx(mean, abs=1e-5)


def test_each_epoch_hides_other_words_and_evaluations_the_same(task: MaskedLM) -> None:
    rows = task.example_rows(30, 0)
    first, second = (task.encode(rows, True, np.arange(30) + start).samples for start in (0, 1000))
    assert first.column("labels") != second.column("labels")
    assert first.column("starts").to_pylist() == [[]] * 30  # no work that training does not need
    fixed = task.encode(rows, True)
    assert fixed.samples.equals(task.encode(rows, True).samples)
    assert fixed.weights.sum() == pytest.approx(
        0.15 * sum(len(text.split()) for text in rows["text"].to_pylist()), abs=9
    )


class _Knowing(torch.nn.Module):
    """A model that predicts one word everywhere, with a probability of 1/2."""

    device = torch.device("cpu")

    def __init__(self, token: int) -> None:
        super().__init__()
        self._token = token

    def get_output_embeddings(self) -> None:
        """Return None: the output layer is not known."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.full((*input_ids.shape, 205), -np.log(204.0))
        logits[..., self._token] = 0.0
        return SimpleNamespace(logits=logits)


def test_predict_fills_the_masks_of_the_text(task: MaskedLM) -> None:
    table = pa.table({"text": ["w1 [MASK] w3, [MASK]!", "w4", None]})
    encoded = task.encode(table, False)
    assert encoded.problems == ((2, "text is null"),)
    predictions = task.predict(_Knowing(9), encoded.samples).to_pylist()  # type: ignore[arg-type]  # reads its device only
    assert predictions[0]["prediction"] == "w1 w5 w3, w5!"
    assert predictions[0]["tokens"] == ["w5", "w5"]
    assert predictions[0]["scores"] == pytest.approx([0.5, 0.5])
    assert predictions[1] == {"prediction": "w4", "tokens": [], "scores": []}


def test_the_report_marks_found_and_wrong_words(task: MaskedLM) -> None:
    rows = pa.table({"text": ["w5 w5 w5 w5 w5 w5 w5 w6", "w7"]})
    encoded = task.encode(rows, True)
    batch = task.collate(encoded.samples)
    results = task.row_results(task.forward(_Knowing(9), batch), batch, encoded.samples, [1, 0])
    assert (results[0].target, results[0].prediction) == ("w7", "w5")
    (mark,) = results[0].marks
    assert (mark.start, mark.end, mark.label, mark.kind) == (0, 2, "w5", "wrong")
    assert {(mark.kind, rows["text"][0].as_py()[mark.start : mark.end]) for mark in results[1].marks} <= {
        ("found", "w5"), ("wrong", "w6")
    }  # fmt: skip


def test_an_adapted_encoder_is_a_model_for_other_tasks(task: MaskedLM, tmp_path: Path) -> None:
    model = task.build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    task.processor().save_pretrained(tmp_path)
    classifier = TextClassification(TextParams(labels=("a", "b")), ModelSpec(name=str(tmp_path)), 0)
    body = dict(classifier.build_model().base_model.named_parameters())
    adapted = {name: tensor for name, tensor in model.base_model.named_parameters() if "pooler" not in name}
    assert len(adapted) > 20
    assert all(torch.equal(tensor, body[name]) for name, tensor in adapted.items())
