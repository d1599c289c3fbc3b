"""Rows, losses and results of `reranking`; the contract of all tasks is in `test_contract.py`."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from launcher.spec.model import ModelSpec
from launcher.tasks.reranking import Reranking

_ROWS = pa.table(
    {
        "query": ["w1", "w2", "w3", "w4"],
        "positive": ["w5 w6", "w7", "w8", "w9"],
        "negatives": [["w10", "w11 w12"], ["w13"], [], ["w9"]],
    }
)


def _task(model: Path, **params: object) -> Reranking:
    return Reranking(Reranking.Params.model_validate(params), ModelSpec(name=str(model)), 0)


def test_loss_is_the_cross_entropy_of_the_positive_among_its_row(tiny_bert: Path) -> None:
    task = _task(tiny_bert)
    encoded = task.encode(_ROWS, True)
    nothing = "negatives has no document besides the positive, so there is nothing to rank"
    assert encoded.problems == ((2, nothing), (3, nothing))
    assert encoded.lengths.tolist() == [6 + 5 + 6, 5 + 5]
    model = task.build_model().eval()
    batch = task.collate(encoded.samples)
    with torch.no_grad():
        outputs = task.forward(model, batch)
        pairs = task.processor()(["w1"] * 3, ["w5 w6", "w10", "w11 w12"], padding=True, return_tensors="pt")
        alone = model(**pairs).logits[:, 0]
    assert torch.allclose(outputs["scores"][0], alone, atol=1e-5)
    assert outputs["scores"][1, 2] == -torch.inf
    losses = task.sample_losses(outputs, batch)
    assert float(losses[0]) == pytest.approx(float(alone.logsumexp(0) - alone[0]), abs=1e-5)


def test_results_list_the_documents_of_a_row_by_score(tiny_bert: Path) -> None:
    task = _task(tiny_bert)
    samples = task.encode(_ROWS, True).samples
    scores = torch.tensor([[1.0, 3.0, 1.0], [2.0, 1.0, -torch.inf]])
    first, second = task.row_results({"scores": scores}, task.collate(samples), samples, [0, 1])
    assert (first.target, first.prediction, second.prediction) == ("rank 1", "rank 3 of 3", "rank 1 of 2")
    assert [(d.rank, d.position, d.is_true) for d in first.documents] == [(1, 1, False), (2, 2, False), (3, 0, True)]
    assert [d.position for d in second.documents] == [0, 1]
    row = _ROWS.to_pylist()[0]
    assert [task.document_text(row, d.position) for d in first.documents] == ["w10", "w11 w12", "w5 w6"]


def test_predict_scores_pairs_without_negatives(tiny_bert: Path) -> None:
    task = _task(tiny_bert)
    encoded = task.encode(_ROWS.drop_columns(["negatives"]), False)
    with torch.inference_mode():
        table = task.predict(task.build_model().eval(), encoded.samples)
    assert table.schema == pa.schema({"prediction": pa.float64()})
    assert len(table) == 4
