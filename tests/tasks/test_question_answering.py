"""Question answering as a whole: a model that knows the answers is scored as right, in every window."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import one_hot

from launcher.spec.model import ModelSpec
from launcher.tasks.answers import AnswerParams
from launcher.tasks.base import Task
from launcher.tasks.question_answering import QuestionAnswering
from tests.support.jobs import Columns


def _task(model: Path, rows: pa.Table, **params: object) -> Task:
    unlearned = QuestionAnswering(AnswerParams.model_validate(params), ModelSpec(name=str(model)), 0)
    return QuestionAnswering(unlearned.infer_params(Columns(rows)), unlearned.model, 0)


def _score_labels(task: Task, rows: pa.Table) -> tuple[dict[str, float], list[str]]:
    """Return the metrics and texts of predictions whose logits are large at the labels alone."""
    metrics, texts = task.metrics(torch.device("cpu")), []
    samples = task.encode(rows, True).samples
    for begin in range(0, len(samples), 16):
        part = samples.slice(begin, 16)
        batch = task.collate(part)
        width = batch.inputs["input_ids"].shape[1]  # type: ignore[union-attr]
        outputs = {
            name: 9.0 * one_hot(batch.labels[:, i], width) for i, name in enumerate(("start_logits", "end_logits"))
        }
        task.update_metrics(metrics, outputs, batch, part)
        texts += task.decode(outputs, part).column("prediction").to_pylist()
    return metrics.compute(), texts


def test_labels_of_windows_are_the_answers(tiny_bert: Path) -> None:
    rows = QuestionAnswering(AnswerParams(), ModelSpec(name="none"), 0).example_rows(60, 3)
    task = _task(tiny_bert, rows, max_length=24, doc_stride=4)
    metrics, texts = _score_labels(task, rows)
    assert texts == ["".join(answers["text"]) for answers in rows.column("answers").to_pylist()]
    assert metrics == {name: 1.0 for name in task.metric_modes}


@pytest.mark.parametrize("name", ["xquad_en", "subjqa"])
def test_labels_of_real_data_are_the_answers(name: str, tiny_bert: Path, shared: Path) -> None:
    rows = pq.read_table(shared / f"data/question-answering/{name}/validation.parquet").slice(0, 100)
    metrics, _ = _score_labels(_task(tiny_bert, rows, max_answer_length=300), rows)
    # Not 1: a token may hold more than the answer, and no prediction can cut it.
    assert metrics["f1"] >= metrics["exact_match"] >= 0.99
    assert ("no_answer_accuracy" in metrics) == (name == "subjqa")
