"""Class weights and label smoothing, against torch's CrossEntropyLoss and scikit-learn's balanced weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.modeling_outputs import CausalLMOutput

from launcher.errors import DataError
from launcher.spec.model import ModelSpec
from launcher.tasks.causal_lm import CausalLM, CausalParams
from launcher.tasks.metrics.class_weights import balanced_weights, complete_weights, weight_tensor
from launcher.tasks.metrics.labels import Labels
from launcher.tasks.metrics.tags import Tags
from launcher.tasks.samples import Batch
from launcher.tasks.text_classification import TextClassification, TextParams
from launcher.tasks.token_classification import TokenClassification, TokenParams
from tests.support.jobs import Columns

_NAMES = ("a", "b", "c")
_WEIGHTS = (0.25, 1.5, 4.0)


def test_a_measurement_of_memory_leaves_no_fake_weights() -> None:
    weights, device = (0.125, 3.0), torch.device("cpu")
    with FakeTensorMode():
        assert isinstance(weight_tensor(weights, device), FakeTensor)
    tensor = weight_tensor(weights, device)
    assert tensor is not None and tensor.tolist() == [0.125, 3.0]
    assert weight_tensor(weights, device) is tensor
    with FakeTensorMode():
        assert isinstance(weight_tensor(weights, device), FakeTensor)


def _torch_loss(smoothing: float) -> torch.nn.CrossEntropyLoss:
    return torch.nn.CrossEntropyLoss(torch.tensor(_WEIGHTS), label_smoothing=smoothing, ignore_index=-100)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_loss_sum_over_weight_sum_is_the_weighted_mean_of_torch(smoothing: float) -> None:
    """Compare whole rows, and words of texts of unequal length."""
    torch.manual_seed(0)
    logits, truth = torch.randn(40, 3), torch.randint(0, 3, (40,))
    labels = Labels("label", "single-label", _NAMES, _WEIGHTS, smoothing)
    weight = labels.sample_weights([[float(i)] for i in truth]).sum()
    assert labels.sample_losses(logits, truth).sum() / weight == pytest.approx(
        float(_torch_loss(smoothing)(logits, truth))
    )
    words = truth.reshape(8, 5).clone()
    words[2, 3:] = words[5, 1:] = -100
    tags = Tags("tags", _NAMES, _WEIGHTS, smoothing)
    losses, weight = tags.sample_losses(logits.reshape(8, 5, 3), words), tags.sample_weights(words.tolist()).sum()
    assert losses.sum() / weight == pytest.approx(float(_torch_loss(smoothing)(logits, words.flatten())))


def test_encoded_rows_have_class_weights_only_in_training(tiny_bert: Path) -> None:
    """Check the weights of samples with targets, without them, and in evaluations."""
    model = ModelSpec(name=str(tiny_bert))
    params: dict[str, Any] = {"labels": ("a", "b"), "class_weights": {"b": 3}}
    rows = pa.table({"text": ["w1", "w2", "w3"], "label": ["b", "a", "b"]})
    text = TextClassification(TextParams(**params), model, 0)
    assert text.encode(rows, True).weights.tolist() == [3, 1, 3]
    assert (
        text.encode(rows, False).weights.tolist()
        == text.for_evaluation().encode(rows, True).weights.tolist()
        == [1, 1, 1]
    )
    words = pa.table({"tokens": [["w1", "w2"], ["w3"]], "tags": [["b", "b"], ["a"]]})
    token = TokenClassification(TokenParams(**params), model, 0)
    assert token.encode(words, True).weights.tolist() == [6, 1]
    assert token.for_evaluation().encode(words, True).weights.tolist() == [2, 1]


def test_evaluation_losses_are_plain() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    task = CausalLM(CausalParams(label_smoothing=0.2), ModelSpec(name="none"), 0)
    batch = Batch({}, ids, torch.ones(2))

    class Fixed(torch.nn.Module):
        """A model whose logits are known, with an output layer that is not linear."""

        def get_output_embeddings(self) -> None:
            return None

        def forward(self) -> CausalLMOutput:
            return CausalLMOutput(logits=logits)

    for variant, smoothing in ((task, 0.2), (task.for_evaluation(), 0.0)):
        losses = variant.sample_losses(variant.forward(Fixed(), batch), batch)
        for loss, row, truth in zip(losses, logits, ids, strict=True):
            expected = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=smoothing)(row, truth)
            assert float(loss) == pytest.approx(float(expected))
    plain = TextClassification(TextParams(labels=("a", "b")), ModelSpec(name="none"), 0)
    assert plain.for_evaluation() is plain


def test_balanced_weights_match_scikit_learn() -> None:
    """Count labels in chunks, with invalid ones among them."""
    column = pa.chunked_array([["x", "y", "x"], ["x", None, "x", "z"], ["nonsense"]])
    task = TextClassification(TextParams(labels=("z", "x", "y"), class_weights="balanced"), ModelSpec(name="none"), 0)
    learned = task.infer_params(Columns(pa.table({"text": ["w1"] * 8, "label": column})))
    truth = ["x", "y", "x", "x", "x", "z"]
    expected = dict(zip("xyz", compute_class_weight("balanced", classes=np.array(list("xyz")), y=truth), strict=True))
    assert learned.model_dump()["class_weights"] == pytest.approx(expected)
    token = TokenClassification(TokenParams(class_weights="balanced"), ModelSpec(name="none"), 0)
    tags = pa.chunked_array([[["O", "O", "B-x"]], [["O"]]])
    learned = token.infer_params(Columns(pa.table({"tokens": [["w"] * 3, ["w"]], "tags": tags})))
    assert learned.model_dump()["class_weights"] == {"B-x": 2.0, "O": pytest.approx(2 / 3)}
    assert balanced_weights([3, 0, 1], _NAMES)["b"] == 1.0


def test_weights_of_unknown_classes_are_refused() -> None:
    assert complete_weights({"b": 2.0}, _NAMES) == {"a": 1.0, "b": 2.0, "c": 1.0}
    with pytest.raises(DataError, match=r"^task\.class_weights: 'positve' is not a class; did you mean positive\?$"):
        complete_weights({"positve": 2.0}, ("negative", "positive"))
    spans = pa.table({"tokens": ["w1"], "tags": [[{"start": 0, "end": 2, "label": "x"}]]})
    token = TokenClassification(TokenParams(class_weights="balanced"), ModelSpec(name="none"), 0)
    with pytest.raises(DataError, match="give a weight for each tag"):
        token.infer_params(Columns(spans))
