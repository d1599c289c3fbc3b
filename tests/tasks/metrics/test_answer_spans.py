"""The best span over the windows of a row beside a search through all spans, and losses beside transformers' own."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from launcher.models.pretrained import load_tokenizer
from launcher.rundir.records import SpanMark
from launcher.spec.model import ModelSpec
from launcher.tasks.answers import AnswerParams, AnswerReader
from launcher.tasks.metrics.answer_spans import Prediction, Search, find_answers, flat_windows, to_result
from launcher.tasks.question_answering import QuestionAnswering
from launcher.tasks.results import RowResult

_ALL = Search(10_000, 10_000, None)


def _samples(model: Path, rows: int = 12, **params: Any) -> pa.Table:
    values = AnswerParams.model_validate({"max_length": 32, **params})
    spec = ModelSpec(name=str(model))
    return (
        AnswerReader(values, load_tokenizer(spec))
        .encode(QuestionAnswering(values, spec, 0).example_rows(rows, 0), True)
        .samples
    )


def _logits(samples: pa.Table, seed: int = 0) -> dict[str, torch.Tensor]:
    windows = flat_windows(samples, ("input_ids",)).column("input_ids").to_pylist()
    rng = torch.Generator().manual_seed(seed)
    shape = (len(windows), max(map(len, windows)))
    return {name: 3 * torch.randn(shape, generator=rng) for name in ("start_logits", "end_logits")}


def _search_all(
    outputs: dict[str, torch.Tensor], samples: pa.Table, max_tokens: int
) -> list[tuple[float, float, str, int, float]]:
    """Return sum of logits, sum for no answer, text, start and probability of the best span, found one by one."""
    results = []
    window = 0
    for row in samples.to_pylist():
        best: tuple[float, str, int, float] = (-np.inf, "", -1, 0.0)
        nulls = []
        for starts, ends, null in zip(row["starts"], row["ends"], row["null"], strict=True):
            size = len(starts)
            first, last = (outputs[name][window, :size].double().numpy() for name in ("start_logits", "end_logits"))
            nulls.append(first[null] + last[null])
            for i in range(size):
                for j in range(i, min(size, i + max_tokens)):
                    if starts[i] >= 0 and starts[j] >= 0 and first[i] + last[j] > best[0]:
                        share = np.exp(first[i] + last[j]) / np.exp(first).sum() / np.exp(last).sum()
                        best = (first[i] + last[j], row["context"][starts[i] : ends[j]], starts[i], share)
            window += 1
        results.append((best[0], min(nulls), *best[1:]))
    return results


@pytest.mark.parametrize("max_tokens", [1, 5, 10_000])
def test_the_best_span_of_all_windows_is_predicted(max_tokens: int, tiny_bert: Path) -> None:
    samples = _samples(tiny_bert)
    outputs = _logits(samples)
    expected = _search_all(outputs, samples, max_tokens)
    predictions = find_answers(outputs, samples, Search(10_000, max_tokens, None))
    assert [(p.text, p.start) for p in predictions] == [(text, start) for _, _, text, start, _ in expected]
    assert [p.score for p in predictions] == pytest.approx([score for *_, score in expected], rel=1e-4)
    contexts = samples.column("context").to_pylist()
    for prediction, context in zip(predictions, contexts, strict=True):
        assert prediction.start is not None
        assert context[prediction.start :].startswith(prediction.text) and prediction.text.strip() == prediction.text
        assert 1 <= len(prediction.text.split()) <= max_tokens


def test_no_answer_is_predicted_where_it_is_better_by_the_threshold(tiny_bert: Path) -> None:
    samples = _samples(tiny_bert)
    outputs = _logits(samples)
    expected = _search_all(outputs, samples, 10_000)
    gaps = sorted(null - best for best, null, *_ in expected)
    for threshold in (gaps[3] - 1e-3, gaps[3] + 1e-3, gaps[9] + 1e-3):
        predictions = find_answers(outputs, samples, Search(10_000, 10_000, threshold))
        texts = [text if null - best <= threshold else "" for best, null, text, *_ in expected]
        assert [p.text for p in predictions] == texts
        assert all((p.start is None) == (p.text == "") and 0 < p.score < 1 for p in predictions)
    assert sum(text == "" for text in texts) == 2


def test_n_best_limits_the_combinations(tiny_bert: Path) -> None:
    samples = _samples(tiny_bert)
    outputs = _logits(samples)
    best = find_answers(outputs, samples, _ALL)
    # With one first and one last token, a window has a span only where they are in order.
    single = find_answers(outputs, samples, Search(1, 10_000, None))
    assert [p.text for p in single] != [p.text for p in best]
    some = find_answers(outputs, samples, Search(20, 10_000, None))
    assert [p.text for p in some] == [p.text for p in best]
    assert any(p.text == "" and p.start is None for p in find_answers(_reversed(outputs), samples, Search(1, 1, None)))


def _reversed(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return logits whose best last token is far before the best first token."""
    order = torch.arange(outputs["start_logits"].shape[1], dtype=torch.float32).expand_as(outputs["start_logits"])
    return {"start_logits": order, "end_logits": -order}


def test_spaces_around_an_answer_are_left_out() -> None:
    # As byte-level BPE has them: the second token is the space and the word after it.
    window = {"starts": [[-1, 0, 1]], "ends": [[-1, 1, 5]], "null": [0]}
    samples = pa.Table.from_pylist([{"context": "a  bc d", **window}])
    outputs = {name: torch.tensor([[0.0, 0.0, 5.0]]) for name in ("start_logits", "end_logits")}
    (prediction,) = find_answers(outputs, samples, _ALL)
    assert (prediction.text, prediction.start) == ("bc", 3)


def test_predictions_do_not_depend_on_the_other_rows(tiny_bert: Path) -> None:
    samples = _samples(tiny_bert)
    outputs = _logits(samples)
    whole = find_answers(outputs, samples, _ALL)
    counts = [len(nulls) for nulls in samples.column("null").to_pylist()]
    for i in range(len(samples)):
        window = sum(counts[:i])
        width = max(map(len, samples.column("input_ids").to_pylist()[i]))
        own = {name: logits[window : window + counts[i], :width] for name, logits in outputs.items()}
        (prediction,) = find_answers(own, samples.slice(i, 1), _ALL)
        assert (prediction.text, prediction.start) == (whole[i].text, whole[i].start)
        assert prediction.score == pytest.approx(whole[i].score, rel=1e-5)


def test_the_loss_of_a_batch_is_that_of_transformers(tiny_bert: Path) -> None:
    task = QuestionAnswering(AnswerParams(max_length=32), ModelSpec(name=str(tiny_bert)), 0)
    encoded = task.encode(task.example_rows(9, 0), True)
    batch = task.collate(encoded.samples)
    model = task.build_model().eval()
    with torch.no_grad():
        total = task.sample_losses(task.forward(model, batch), batch).double().sum() / encoded.weights.sum()
    # Its softmax has padding too, so that each window is computed without any.
    windows, losses = flat_windows(encoded.samples, ("input_ids", "token_type_ids", "first", "last")).to_pylist(), []
    for window in windows:
        inputs = {name: torch.tensor([window[name]]) for name in ("input_ids", "token_type_ids")}
        spans = {"start_positions": torch.tensor([window["first"]]), "end_positions": torch.tensor([window["last"]])}
        with torch.no_grad():
            losses.append(float(model(**inputs, **spans).loss))
    assert len(losses) > 9
    assert float(total) == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (Prediction("the cat", 4, 0.5), ["cat", "a cat"], RowResult("cat; a cat", "the cat", (
            SpanMark(start=4, end=11, label="answer", kind="found"),))),
        (Prediction("dog", 14, 0.5), ["cat", "a cat"], RowResult("cat; a cat", "dog", (
            SpanMark(start=14, end=17, label="answer", kind="wrong"),
            SpanMark(start=8, end=11, label="answer", kind="missed")))),
        (Prediction("", None, 0.5), ["cat", "a cat"], RowResult("cat; a cat", "no answer", (
            SpanMark(start=8, end=11, label="answer", kind="missed"),))),
        (Prediction("dog", 14, 0.5), [], RowResult("no answer", "dog", (
            SpanMark(start=14, end=17, label="answer", kind="wrong"),))),
        (Prediction("", None, 0.5), [], RowResult("no answer", "no answer")),
    ],
)  # fmt: skip
def test_answers_are_marked_in_the_context(prediction: Prediction, answers: list[str], expected: RowResult) -> None:
    assert to_result(prediction, answers, [8, 6][: len(answers)]) == expected
