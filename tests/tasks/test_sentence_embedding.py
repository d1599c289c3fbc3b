"""Rows, vectors and exported files of `sentence-embedding`; the contract of all tasks is in `test_contract.py`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from launcher.data.rank_batches import GlobalBatch, Part
from launcher.models.pooling import embed
from launcher.spec.model import ModelSpec
from launcher.tasks.sentence_embedding import SentenceEmbedding
from launcher.train.coupled import coupled_forward_backward

_TRIPLETS = pa.table(
    {
        "query": ["w1 w2", "w3", "w4", "w5"],
        "positive": ["w6", "w7 w8", "w6", "w9"],
        "negatives": [["w10", "w11 w12", "w13"], [], None, ["w9", "w14"]],
    }
)


def _task(model: Path, **params: object) -> SentenceEmbedding:
    return SentenceEmbedding(SentenceEmbedding.Params.model_validate(params), ModelSpec(name=str(model)), 0)


def test_rows_have_any_number_of_negatives(tiny_bert: Path) -> None:
    task = _task(tiny_bert, negatives="negatives", negatives_per_row=2)
    samples = task.encode(_TRIPLETS, True).samples
    # w1 has the id 5; 2 and 3 begin and end a text. The repeated positive of the last row is no negative.
    assert [len(row) for row in samples.column("documents").to_pylist()] == [3, 1, 1, 2]
    assert samples.column("documents").to_pylist()[3] == [[2, 13, 3], [2, 18, 3]]
    batch = task.collate(samples)
    assert batch.inputs["input_ids"].tolist()[0] == [2, 5, 6, 3]  # type: ignore[union-attr]  # a tensor
    assert batch.targets["places"].tolist() == [0, 1, 2, 3, 6, 9, 10]
    hashes = batch.targets["document_hash"]
    assert (hashes == 0).tolist() == [[False] * 3, [False, True, True], [False, True, True], [False, False, True]]
    assert hashes[0, 0] == hashes[2, 0]
    assert len(hashes.unique()) == 7
    model = task.build_model().eval()
    with torch.no_grad():
        outputs = task.forward(model, batch)
    assert outputs["documents"].shape == (4, 3, 32)
    assert torch.allclose(outputs["documents"][0, 0], outputs["documents"][2, 0], atol=1e-6)
    assert not outputs["documents"][1, 1:].any()
    # Micro-batches have the same width, whatever rows they hold.
    assert task.collate(samples.slice(1, 1)).targets["document_hash"].shape == (1, 3)
    cells = _TRIPLETS.column("negatives").to_pylist()
    (note,) = task.remarks(_TRIPLETS)
    assert note.startswith(f"task.negatives_per_row: rows have up to {len(cells[0])} negatives, of which the first 2 ")


def test_a_negative_may_be_a_single_text(tiny_bert: Path) -> None:
    task = _task(tiny_bert, negatives="negatives")
    rows = pa.table({"query": ["w1"], "positive": ["w2"], "negatives": ["w3"]})
    assert task.encode(rows, True).samples.column("documents").to_pylist() == [[[2, 6, 3], [2, 7, 3]]]


def test_blank_texts_and_bad_scores_are_reported(tiny_bert: Path) -> None:
    encoded = _task(tiny_bert).encode(pa.table({"query": ["w1", " ", "w2"], "positive": ["", "w1", "w3"]}), True)
    assert encoded.problems == ((0, "positive is empty"), (1, "query is empty"))
    rows = pa.table({"text_a": ["w1"] * 4, "text_b": ["w2"] * 4, "score": [0.5, 4.2, float("nan"), -1.0]})
    encoded = _task(tiny_bert, loss="cosine").encode(rows, True)
    assert encoded.problems == (
        (1, "score is 4.2, which is not between -1 and 1; set task.max_score to the score of equal texts"),
        (2, "score is nan, which is not a finite number"),
    )
    assert [i for i, _ in _task(tiny_bert, loss="cosent").encode(rows, True).problems] == [2]
    assert [i for i, _ in _task(tiny_bert, loss="cosine", max_score=5).encode(rows, True).problems] == [2]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"loss": "cosent", "negatives": "neg"}, "negatives has no meaning for loss cosent; drop negatives, or name"),
        ({"text_a": "left"}, "text_a has no meaning for loss multiple-negatives; drop text_a, or name another loss"),
        ({"loss": "cosent", "max_score": 5}, "max_score is for loss cosine, and loss is cosent; drop max_score"),
    ],
)
def test_keys_of_another_loss_are_refused(params: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SentenceEmbedding.Params.model_validate(params)


def test_predict_reads_the_column_that_the_data_has(tiny_bert: Path) -> None:
    task = _task(tiny_bert, query_prefix="w0 ", document_prefix="w1 ")
    assert task.prediction_inputs(["id", "query", "positive"]) == ("query",)
    assert task.prediction_inputs(["id", "positive"]) == ("positive",)
    assert task.prediction_inputs(["id"]) == ("query",)
    model = task.build_model().eval()

    def ids(column: str) -> list[int]:
        encoded = task.encode(pa.table({column: ["w7"]}), False)
        return encoded.samples.column("input_ids").to_pylist()[0]  # type: ignore[no-any-return]  # untyped

    assert (ids("query"), ids("positive")) == ([2, 4, 11, 3], [2, 5, 11, 3])
    samples = task.encode(pa.table({"positive": ["w7", "w8 w9"]}), False).samples
    with torch.inference_mode():
        table = task.predict(model, samples)
    assert table.schema == pa.schema({"embedding": pa.list_(pa.float32())})
    vectors = torch.tensor(table.column("embedding").to_pylist())
    assert vectors.shape == (2, 32)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_vector_is_the_pooled_hidden_state_of_its_text_alone(tiny_bert: Path, pooling: Any) -> None:
    model, tokenizer = AutoModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = embed(model(**tokens).last_hidden_state, tokens["attention_mask"], pooling)
        for text, vector in zip(texts, together, strict=True):
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            assert torch.allclose(vector, normalize(pooled, dim=0), atol=1e-5)


def test_cosine_loss_is_the_squared_error_of_each_pair(tiny_bert: Path) -> None:
    task = _task(tiny_bert, loss="cosine", max_score=5.0)
    assert not task.couples
    rows = pa.table({"text_a": ["w1 w2", "w3"], "text_b": ["w1 w2", "w4"], "score": [2.5, 5.0]})
    batch = task.collate(task.encode(rows, True).samples)
    with torch.no_grad():
        outputs = task.forward(task.build_model().eval(), batch)
    losses = task.sample_losses(outputs, batch)
    # Equal texts have a cosine of 1, and their score says 0.5.
    assert float(losses[0]) == pytest.approx(0.25, abs=1e-5)
    cosine = float(outputs["query"][1] @ outputs["documents"][1, 0])
    assert float(losses[1]) == pytest.approx((cosine - 1) ** 2, abs=1e-5)
    results = task.row_results(outputs, batch, rows, [1])
    assert (results[0].target, results[0].prediction) == ("5", f"cosine {cosine:.3f}")


def test_export_has_the_files_of_sentence_transformers(tiny_bert: Path) -> None:
    task = _task(tiny_bert, pooling="cls", max_length=48, query_prefix="query: ")
    files = {name: json.loads(text) for name, text in task.export_files(task.build_model().config).items()}
    assert [module["path"] for module in files["modules.json"]] == ["", "1_Pooling", "2_Normalize"]
    assert [module["type"].rsplit(".", 1)[1] for module in files["modules.json"]] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    pooling = files["1_Pooling/config.json"]
    assert pooling["word_embedding_dimension"] == 32
    assert [flag for flag, value in pooling.items() if value is True] == ["pooling_mode_cls_token", "include_prompt"]
    assert files["sentence_bert_config.json"]["max_seq_length"] == 48
    assert files["config_sentence_transformers.json"]["prompts"] == {"query": "query: ", "document": ""}


@pytest.mark.parametrize("loss", ["multiple-negatives", "cosent"])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(tiny_bert: Path, loss: str) -> None:
    """In float64: the terms of CoSENT cancel, which in float32 leaves noise that Adam scales up to whole steps."""
    columns = {"text_a": "query", "text_b": "positive"} if loss == "cosent" else {}
    task = _task(tiny_bert, loss=loss, **columns)
    samples = task.encode(task.example_rows(11, 0), True).samples
    samples = samples.append_column("__row", pa.array(range(11))).append_column("__mask", pa.array([1.0] * 11))
    model = task.build_model().eval().double()

    class Plain:
        device = torch.device("cpu")
        virtual_ranks = 1

        def seed(self, step: int, part: int, micro_batch: int) -> None:
            torch.manual_seed(1000 * step + 100 * part + micro_batch)

        def forward(self, task: Any, batch: Any, part: int = -1) -> Any:
            return task.forward(model, batch)

        def backward(self, loss: torch.Tensor, weight: float, ends_part: bool) -> None:
            (loss / weight).backward()

    def gradients(cuts: list[int]) -> list[torch.Tensor]:
        model.zero_grad()
        engine: Any = Plain()
        parts = [samples.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, 11], strict=True)]
        coupled_forward_backward(engine, task, [Part(0, tuple(parts))], GlobalBatch(11, 11.0, len(parts)), 0)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradients([])
    largest = max(float(gradient.abs().max()) for gradient in whole)
    assert largest > 1e-3
    for cuts in ([4, 8], list(range(1, 11))):
        for first, second in zip(whole, gradients(cuts), strict=True):
            assert float((first - second).abs().max()) < 1e-6 * largest
