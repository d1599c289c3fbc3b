"""Labels: what a row's label may be, as numbers and in words, and what is said of one that may not be."""

import json
import math

import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss

from launcher.errors import DataError
from launcher.tasks.metrics.classification import MulticlassMetrics, MultilabelMetrics
from launcher.tasks.metrics.labels import Kind, Labels, distinct, infer_names
from launcher.tasks.metrics.regression import RegressionMetrics

_NO_SAMPLES = pa.table({})
_SINGLE = Labels("verdict", "single-label", ("no", "yes", "perhaps"))
_MULTI = Labels("tags", "multi-label", ("a", "b", "c"))
_NUMBER = Labels("score", "regression", ())


@pytest.mark.parametrize(
    ("labels", "value", "expected"),
    [
        (_SINGLE, "no", [0.0]),
        (_SINGLE, "perhaps", [2.0]),
        (_SINGLE, 1, [1.0]),
        (Labels("y", "single-label", ("1", "2")), 1, [0.0]),
        (Labels("y", "single-label", ("1", "2")), "2", [1.0]),
        (Labels("y", "single-label", ("-1", "1")), -1, [0.0]),
        (Labels("y", "single-label", ("False", "True")), True, [1.0]),
        (_MULTI, [], [0.0, 0.0, 0.0]),
        (_MULTI, ["c", "a"], [1.0, 0.0, 1.0]),
        (_MULTI, ["b", "b"], [0.0, 1.0, 0.0]),
        (_MULTI, [0, 2], [1.0, 0.0, 1.0]),
        (_NUMBER, 1.5, [1.5]),
        (_NUMBER, -3, [-3.0]),
        (_NUMBER, "2.25", [2.25]),
    ],
)
def test_a_valid_label_becomes_its_target(labels: Labels, value: object, expected: list[float]) -> None:
    assert labels.target(value) == expected


@pytest.mark.parametrize(
    ("labels", "value", "text"),
    [
        (_SINGLE, None, "verdict is null"),
        (_MULTI, None, "tags is null"),
        (_NUMBER, None, "score is null"),
        (_SINGLE, "maybe", "verdict is 'maybe', which is not one of no, yes, perhaps"),
        (_SINGLE, "Yes", "verdict is 'Yes', which is not one of no, yes, perhaps"),
        (_SINGLE, 3, "verdict is 3, which is not one of no, yes, perhaps"),
        (_SINGLE, -1, "verdict is -1, which is not one of no, yes, perhaps"),
        (_SINGLE, 1.5, "verdict is 1.5, which is not one of no, yes, perhaps"),
        (_MULTI, "a", "tags is 'a', which is not a list of labels"),
        (_MULTI, ["a", "z"], "tags is 'z', which is not one of a, b, c"),
        (_MULTI, ["a", None], "tags is None, which is not one of a, b, c"),
        (_NUMBER, "many", "score is 'many', which is not a number"),
        (_NUMBER, "", "score is '', which is not a number"),
        (_NUMBER, math.nan, "score is nan, which is not a finite number"),
        (_NUMBER, "-inf", "score is -inf, which is not a finite number"),
    ],
)
def test_an_invalid_label_is_refused_with_a_reason(labels: Labels, value: object, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        labels.target(value)
    assert str(caught.value) == text


def test_an_unknown_number_is_not_an_index_if_names_are_numbers() -> None:
    with pytest.raises(ValueError, match=r"^y is 0, which is not one of 1, 2$"):
        Labels("y", "single-label", ("1", "2")).target(0)


def test_tensors_have_the_documented_types() -> None:
    def tensor(labels: Labels, *values: object) -> torch.Tensor:
        return labels.tensor(pa.chunked_array([pa.array([labels.target(v) for v in values], pa.list_(pa.float64()))]))

    single, multi, number = tensor(_SINGLE, "yes", "no"), tensor(_MULTI, ["a"], [], ["b", "c"]), tensor(_NUMBER, 1.5, 2)
    assert (single.dtype, single.tolist()) == (torch.int64, [1, 0])
    assert (multi.dtype, multi.tolist()) == (torch.float32, [[1, 0, 0], [0, 0, 0], [0, 1, 1]])
    assert (number.dtype, number.tolist()) == (torch.float32, [1.5, 2.0])
    assert tensor(_SINGLE, "perhaps").shape == tensor(_NUMBER, 1).shape == (1,)
    assert tensor(_MULTI, ["a"]).shape == (1, 3)


def test_sample_losses_match_their_definitions() -> None:
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    single = _SINGLE.sample_losses(logits, truth)
    assert single.shape == (7,)
    assert float(single.mean()) == pytest.approx(log_loss(truth, logits.double().softmax(-1)), abs=1e-6)
    assert _SINGLE.sample_losses(logits.bfloat16(), truth).dtype == torch.float32
    several = torch.nn.functional.one_hot(truth, 3).float()
    multi = _MULTI.sample_losses(logits, several)
    assert multi.shape == (7,)
    p = logits.double().sigmoid()
    expected = -(several * p.log() + (1 - several) * (1 - p).log()).mean(1)
    assert multi.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    number = _NUMBER.sample_losses(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.5]))
    assert number.tolist() == [4.0, 0.25]


def test_decode_returns_predictions_and_scores() -> None:
    table = _SINGLE.decode(torch.tensor([[0.0, 5.0, 0.0], [1.0, 0.0, 2.0]]), _NO_SAMPLES)
    assert table.column("prediction").to_pylist() == ["yes", "perhaps"]
    scores = [json.loads(text) for text in table.column("scores").to_pylist()]
    assert [list(row) for row in scores] == [["no", "yes", "perhaps"]] * 2
    assert [sum(row.values()) for row in scores] == pytest.approx([1, 1], abs=1e-6)
    table = _MULTI.decode(torch.tensor([[1.0, -1.0, 2.0], [-1.0, -1.0, -1.0]]), _NO_SAMPLES)
    assert table.column("prediction").to_pylist() == [["a", "c"], []]
    assert json.loads(table.column("scores")[1].as_py())["b"] == pytest.approx(1 / (1 + math.e), abs=1e-6)
    table = _NUMBER.decode(torch.tensor([[1.5], [-2.0]]), _NO_SAMPLES)
    assert table.to_pydict() == {"prediction": [1.5, -2.0]}


@pytest.mark.parametrize(
    ("labels", "label", "expected"),
    [
        (_SINGLE, 2, "perhaps"),
        (_MULTI, [1.0, 0.0, 1.0], "a, c"),
        (_MULTI, [0.0, 0.0, 0.0], "none"),
        (_NUMBER, 1.23456, "1.235"),
        (_NUMBER, -2.0, "-2"),
    ],
)
def test_row_results_show_the_label_in_words(labels: Labels, label: object, expected: str) -> None:
    truth = torch.tensor([label])
    logits = torch.zeros(1, max(len(labels.names), 1))
    assert labels.row_results(logits, truth, _NO_SAMPLES)[0].target == expected


@pytest.mark.parametrize(
    ("kind", "more", "less"),
    [
        (
            "single-label",
            {
                "accuracy", "micro_f1", "f1", "precision", "recall", "macro_f1", "macro_precision", "macro_recall",
                "roc_auc",
            },
            set(),
        ),
        (
            "multi-label",
            {"f1", "exact_match", "macro_f1", "macro_precision", "macro_recall", "roc_auc"},
            set(),
        ),
        ("regression", {"pearson", "spearman"}, {"mse"}),
    ],
)  # fmt: skip
def test_metric_modes_list_every_metric_with_its_direction(kind: Kind, more: set[str], less: set[str]) -> None:
    labels = Labels("y", kind, ("a", "b"))
    assert {name for name, mode in labels.metric_modes.items() if mode == "max"} == more
    assert {name for name, mode in labels.metric_modes.items() if mode == "min"} == less
    assert labels.metric_modes[next(iter(labels.metric_modes))] == "max"


@pytest.mark.parametrize(
    ("labels", "kind", "logits", "values"),
    [
        (Labels("y", "single-label", ("a", "b")), MulticlassMetrics, torch.eye(2), ["a", "b"]),
        (_SINGLE, MulticlassMetrics, torch.eye(3), ["no", "yes", "perhaps"]),
        (_MULTI, MultilabelMetrics, torch.eye(3) - 0.5, [["a"], ["b"], ["c"]]),
        (_NUMBER, RegressionMetrics, torch.tensor([[1.0], [2.0]]), [1, 3]),
    ],
)
def test_every_metric_that_is_computed_has_a_mode(
    labels: Labels, kind: type, logits: torch.Tensor, values: list[object]
) -> None:
    metrics = labels.metrics(torch.device("cpu"))
    assert type(metrics) is kind
    targets = pa.chunked_array([pa.array([labels.target(v) for v in values], pa.list_(pa.float64()))])
    metrics.update(logits, labels.tensor(targets))
    computed = metrics.compute()
    assert next(iter(computed)) == next(iter(labels.metric_modes))
    assert computed.keys() <= labels.metric_modes.keys()
    assert metrics.baseline().keys() <= computed.keys()


def test_config_has_names_and_kind_of_the_labels() -> None:
    assert _SINGLE.config() == {
        "num_labels": 3,
        "id2label": {0: "no", 1: "yes", 2: "perhaps"},
        "label2id": {"no": 0, "yes": 1, "perhaps": 2},
        "problem_type": "single_label_classification",
    }
    assert _MULTI.config()["problem_type"] == "multi_label_classification"
    assert (_NUMBER.config()["num_labels"], _NUMBER.config()["problem_type"]) == (1, "regression")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.chunked_array([["b", "a", None], ["c", "a"]]), ("a", "b", "c")),
        (pa.chunked_array([[10, 9, None, 2], [10]]), ("2", "9", "10")),
        (pa.chunked_array([[True, False]]), ("False", "True")),
        (pa.chunked_array([[["b"], [], None, ["a", "b"]]]), ("a", "b")),
        (pa.chunked_array([[[10, 2]], [[None, 9]]], pa.large_list(pa.int64())), ("2", "9", "10")),
        (pa.chunked_array([pa.array(values).dictionary_encode() for values in (["b", "a"], ["c"])]), ("a", "b", "c")),
        (pa.chunked_array([[]], pa.string()), ()),
    ],
)  # fmt: skip
def test_distinct_returns_class_names_in_order(column: pa.ChunkedArray, expected: tuple[str, ...]) -> None:
    assert distinct(column.chunks) == expected


def test_each_distinct_label_is_a_class() -> None:
    for values in ([3, 1, 2], ["x", "y"], [True, False], [0.5, 1.5]):
        labels = Labels("y", "single-label", distinct([pa.array(values)]))
        assert sorted(labels.target(value)[0] for value in values) == [float(i) for i in range(len(values))]


def test_class_names_are_inferred_or_known() -> None:
    column = pa.chunked_array([[1, 0, 1]])
    assert infer_names(column.chunks, column.type, None, "y") == ("0", "1")
    assert infer_names(column.chunks, column.type, ("bad", "good"), "y") == ("bad", "good")
    with pytest.raises(DataError) as caught:
        infer_names([pa.array(["x", None])], pa.string(), None, "y")
    assert caught.value.message == (
        "task: column y of the training data holds only the label 'x'; at least two classes are needed"
    )


def test_top5_accuracy_counts_the_true_class_among_five() -> None:
    labels = Labels("y", "single-label", tuple("abcdef"))
    metrics = labels.metrics(torch.device("cpu"))
    metrics.update(torch.arange(6.0).repeat(6, 1), torch.arange(6))
    assert metrics.compute()["top5_accuracy"] == pytest.approx(5 / 6)
    assert metrics.baseline()["top5_accuracy"] == pytest.approx(5 / 6)
    assert "top5_accuracy" not in _SINGLE.metric_modes
