"""Classification metrics equal scikit-learn's, however the rows are cut into updates."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from launcher.rundir.records import ConfusionMatrix
from launcher.tasks.metrics.classification import MulticlassMetrics, MultilabelMetrics

_CPU = torch.device("cpu")
_CUTS = [0, 1, 2, 40, 41, 300, 777, 900]
_BINNED = 2e-3


def _single(classes: int, seed: int, rows: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    """Uneven classes, and logits that know something of them."""
    rng = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    truth = rng.choice(classes, rows, p=shares)
    logits = rng.normal(0, 1.5, (rows, classes)) + 1.2 * np.eye(classes)[truth]
    return torch.from_numpy(logits).float(), torch.from_numpy(truth)


def _multi(classes: int, seed: int, rows: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    truth = rng.random((rows, classes)) < np.linspace(0.15, 0.7, classes)
    logits = rng.normal(-0.5, 1.5, (rows, classes)) + 1.5 * truth
    return torch.from_numpy(logits).float(), torch.from_numpy(truth).float()


def _names(classes: int) -> tuple[str, ...]:
    return tuple(f"c{i}" for i in range(classes))


def _update(metrics: Any, logits: torch.Tensor, truth: torch.Tensor, pieces: bool) -> Any:
    for begin, end in zip(_CUTS[:-1], _CUTS[1:], strict=True) if pieces else [(0, len(truth))]:
        metrics.update(logits[begin:end], truth[begin:end])
    return metrics


def _multiclass(logits: torch.Tensor, truth: torch.Tensor, pieces: bool = False) -> MulticlassMetrics:
    return _update(MulticlassMetrics(_names(logits.shape[1]), _CPU), logits, truth, pieces)


def _multilabel(logits: torch.Tensor, truth: torch.Tensor, pieces: bool = False) -> MultilabelMetrics:
    return _update(MultilabelMetrics(_names(logits.shape[1]), _CPU), logits, truth, pieces)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("classes", [2, 5])
def test_multiclass_metrics_match_scikit_learn(classes: int, seed: int) -> None:
    logits, truth = _single(classes, seed)
    computed = _multiclass(logits, truth).compute()
    y, guess, scores = truth.numpy(), logits.argmax(-1).numpy(), logits.double().softmax(-1).numpy()
    roc = sk.roc_auc_score(y, scores[:, 1]) if classes == 2 else sk.roc_auc_score(y, scores, multi_class="ovr")
    expected = {
        "accuracy": sk.accuracy_score(y, guess),
        "macro_f1": sk.f1_score(y, guess, average="macro"),
        "micro_f1": sk.f1_score(y, guess, average="micro"),
        "macro_precision": sk.precision_score(y, guess, average="macro"),
        "macro_recall": sk.recall_score(y, guess, average="macro"),
    }
    if classes == 2:
        expected |= {
            "f1": sk.f1_score(y, guess), "precision": sk.precision_score(y, guess), "recall": sk.recall_score(y, guess),
        }  # fmt: skip
    assert computed.pop("roc_auc") == pytest.approx(roc, abs=_BINNED)
    assert computed == pytest.approx(expected, abs=1e-9)
    assert next(iter(computed)) == "accuracy"


@pytest.mark.parametrize("classes", [2, 5])
def test_multiclass_tables_match_scikit_learn(classes: int) -> None:
    logits, truth = _single(classes, 3)
    metrics = _multiclass(logits, truth)
    metrics.compute()
    y, guess = truth.numpy(), logits.argmax(-1).numpy()
    counts = tuple(tuple(row) for row in sk.confusion_matrix(y, guess).tolist())
    assert metrics.confusion() == ConfusionMatrix(labels=_names(classes), counts=counts)
    columns = sk.precision_recall_fscore_support(y, guess)
    for i, row in enumerate(metrics.classes()):
        assert row.label == f"c{i}"
        assert (row.precision, row.recall, row.f1, row.support) == pytest.approx(
            tuple(column[i] for column in columns), abs=1e-9
        )
    assert len(metrics.classes()) == classes


@pytest.mark.parametrize(
    ("metrics_of", "rows"), [(_multiclass, _single(2, 4)), (_multiclass, _single(5, 4)), (_multilabel, _multi(5, 4))]
)
def test_metrics_do_not_depend_on_batches(metrics_of: Any, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    whole, pieces = metrics_of(*rows), metrics_of(*rows, pieces=True)
    assert pieces.compute() == pytest.approx(whole.compute(), abs=1e-7 if metrics_of is _multilabel else 1e-12)
    assert pieces.confusion() == whole.confusion()
    assert pieces.classes() == whole.classes()
    assert pieces.baseline() == whole.baseline()


@pytest.mark.parametrize("classes", [2, 5])
def test_multiclass_baseline_predicts_the_most_frequent_class(classes: int) -> None:
    logits, truth = _single(classes, 5)
    metrics = _multiclass(logits, truth)
    metrics.compute()
    y = truth.numpy()
    guess = np.full_like(y, np.bincount(y).argmax())
    baseline = metrics.baseline()
    assert baseline["accuracy"] == baseline["micro_f1"] == pytest.approx(sk.accuracy_score(y, guess), abs=1e-12)
    assert baseline["macro_f1"] == pytest.approx(sk.f1_score(y, guess, average="macro"), abs=1e-9)
    macro = sk.precision_score(y, guess, average="macro", zero_division=0)
    assert baseline["macro_precision"] == pytest.approx(macro, abs=1e-9)
    assert baseline["roc_auc"] == 0.5
    assert baseline.keys() == metrics.compute().keys()


def test_multiclass_with_a_class_that_is_never_predicted() -> None:
    truth = torch.tensor([0, 1, 2, 2])
    logits = torch.tensor([[3.0, 0, 0], [3, 0, 0], [0, 0, 3], [0, 0, 3]])
    computed = _multiclass(logits, truth).compute()
    y, guess = truth.numpy(), logits.argmax(-1).numpy()
    assert computed["macro_f1"] == pytest.approx(sk.f1_score(y, guess, average="macro", zero_division=0), abs=1e-9)
    assert computed["macro_precision"] == pytest.approx(
        sk.precision_score(y, guess, average="macro", zero_division=0), abs=1e-9
    )


def test_roc_auc_is_omitted_if_only_one_class_occurs() -> None:
    metrics = _multiclass(torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([0, 0]))
    computed = metrics.compute()
    assert "roc_auc" not in computed
    assert computed["accuracy"] == 0.5


def test_roc_auc_averages_over_the_classes_that_occur() -> None:
    logits, truth = _single(5, 6)
    logits, truth = logits[truth != 2], truth[truth != 2]
    y, scores = truth.numpy(), logits.double().softmax(-1).numpy()
    expected = np.mean([sk.roc_auc_score(y == k, scores[:, k]) for k in (0, 1, 3, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        computed = _multiclass(logits, truth).compute()
    assert computed["roc_auc"] == pytest.approx(expected, abs=_BINNED)


def test_macro_mean_ignores_a_class_without_labels_and_predictions() -> None:
    truth = torch.tensor([0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        computed = _multiclass(torch.nn.functional.one_hot(truth, 3).float(), truth).compute()
        missed = _multiclass(torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), 3).float(), truth).compute()
    assert (computed["macro_f1"], computed["macro_precision"], computed["macro_recall"]) == (1, 1, 1)
    assert missed["macro_f1"] == pytest.approx(sk.f1_score([0, 1, 1, 0], [0, 1, 2, 0], average="macro"))


def test_roc_auc_of_a_confident_model_matches_scikit_learn() -> None:
    """Check scores that crowd at 0 and 1, which thresholds spaced in logits still separate."""
    rng = np.random.default_rng(7)
    truth = rng.integers(0, 2, 2000)
    margin = rng.normal(0, 3, 2000) + 9 * (truth - 0.35)
    logits = torch.from_numpy(np.stack([-margin / 2, margin / 2], 1)).float()
    computed = _multiclass(logits, torch.from_numpy(truth)).compute()
    assert computed["roc_auc"] == pytest.approx(sk.roc_auc_score(truth, margin), abs=_BINNED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_metrics_of_float32(dtype: torch.dtype) -> None:
    logits, truth = _single(5, 8)
    half = logits.to(dtype)
    assert _multiclass(half, truth).compute() == pytest.approx(_multiclass(half.float(), truth).compute(), abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("classes", [2, 6])
def test_multilabel_metrics_match_scikit_learn(classes: int, seed: int) -> None:
    logits, truth = _multi(classes, seed)
    computed = _multilabel(logits, truth).compute()
    y, guess = truth.numpy().astype(int), (logits > 0).numpy().astype(int)
    assert computed.pop("roc_auc") == pytest.approx(sk.roc_auc_score(y, logits.numpy(), average="macro"), abs=_BINNED)
    expected = {
        "f1": sk.f1_score(y, guess, average="micro"),
        "macro_f1": sk.f1_score(y, guess, average="macro"),
        "macro_precision": sk.precision_score(y, guess, average="macro"),
        "macro_recall": sk.recall_score(y, guess, average="macro"),
        "exact_match": sk.accuracy_score(y, guess),
    }
    assert computed == pytest.approx(expected, abs=1e-6)
    assert next(iter(computed)) == "f1"


def test_multilabel_table_matches_scikit_learn() -> None:
    logits, truth = _multi(6, 3)
    metrics = _multilabel(logits, truth)
    metrics.compute()
    assert metrics.confusion() is None
    columns = sk.precision_recall_fscore_support(truth.numpy().astype(int), (logits > 0).numpy().astype(int))
    rows = metrics.classes()
    assert [row.label for row in rows] == list(_names(6))
    for i, row in enumerate(rows):
        assert (row.precision, row.recall, row.f1, row.support) == pytest.approx(
            tuple(column[i] for column in columns), abs=1e-6
        )


def test_multilabel_baseline_predicts_labels_of_most_rows() -> None:
    logits, truth = _multi(6, 5)
    metrics = _multilabel(logits, truth)
    metrics.compute()
    y = truth.numpy().astype(int)
    guess = np.broadcast_to((y.mean(0) > 0.5).astype(int), y.shape)
    assert 0 < guess[0].sum() < 6
    expected = {"f1": sk.f1_score(y, guess, average="micro"), "roc_auc": 0.5}
    assert metrics.baseline() == pytest.approx(expected, abs=1e-9)
    rare = _multilabel(logits[:, :2], truth[:, :2])
    rare.compute()
    assert rare.baseline() == {"f1": 0.0, "roc_auc": 0.5}


def test_multilabel_roc_auc_averages_over_the_labels_that_occur() -> None:
    logits, truth = _multi(4, 6)
    truth[:, 1] = 0
    y = truth.numpy()
    expected = np.mean([sk.roc_auc_score(y[:, k], logits.numpy()[:, k]) for k in (0, 2, 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        computed = _multilabel(logits, truth).compute()
    assert computed["roc_auc"] == pytest.approx(expected, abs=_BINNED)
