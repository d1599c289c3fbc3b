"""Synthetic run directories for the report: realistic enough to look at, small enough for a test."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.rundir.directory import RunDir
from launcher.rundir.records import (
    ClassRow,
    ConfusionMatrix,
    EnvironmentRecord,
    EvaluationRecord,
    ResultRecord,
    ScoresRecord,
    StepRecord,
    TimesRecord,
    WorkerRecord,
    WorstRow,
)

_HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"
_LONG = "the film goes on and on " * 60

_JOB = """\
name: {name}
seed: 7
task:
  type: {task}
  text: text  # {comment}
model: {{name: models/minilm}}
data:
  train: data/train.parquet
  validation: data/dev.parquet
  test: data/test.parquet
train: {{epochs: 3, batch_size: 32}}
"""


@pytest.fixture
def hostile() -> str:
    """Return a class name or text that tries to break out of the page."""
    return _HOSTILE


@pytest.fixture
def long_text() -> str:
    """Return the long input that each split has in one row."""
    return _LONG


@pytest.fixture
def begun(tmp_path: Path) -> RunDir:
    """Return a run that has nothing but its job file."""
    return _begin(tmp_path, "begun", "text-classification", "the column with the text")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDir]:
    """Return a function that makes a finished run: a classifier over `labels`, or a regression without them."""

    def make(name: str, labels: tuple[str, ...] = (), steps: int = 400, comment: str = "") -> RunDir:
        run = _begin(tmp_path, name, "text-classification" if labels else "text-regression", comment)
        _add_metrics(run, labels, steps)
        _add_results(run, labels, steps, comment)
        return run

    return make


def _begin(root: Path, name: str, task: str, comment: str) -> RunDir:
    run = RunDir(str(root / name))
    run.write_bytes("job.yaml", _JOB.format(name=name, task=task, comment=comment).encode())
    return run


def _add_metrics(run: RunDir, labels: tuple[str, ...], steps: int) -> None:
    draw = random.Random(1)
    floor = 0.3 if labels else 0.15
    every = max(1, steps // 10)
    lines: list[StepRecord | EvaluationRecord | TimesRecord] = []
    for step in range(1, steps + 1):
        done = step / steps
        lines.append(
            StepRecord(
                step=step, epoch=1 + (step - 1) * 3 // steps,
                loss=floor + 0.5 * math.exp(-4 * done) + draw.gauss(0, 0.06),
                learning_rate=2e-5 * min(done / 0.1, (1 - done) / 0.9),
                grad_norm=abs(draw.gauss(1.4, 0.5)) + 2 * math.exp(-20 * done),
                samples=32, skipped_rows=0, samples_per_s=draw.gauss(150, 6) - 60 * (step < 4), elapsed_s=step * 0.21,
            )
        )  # fmt: skip
        if step % every == 0:
            lines.append(_make_evaluation(labels, step, steps, floor))
            lines.append(
                TimesRecord(
                    step=step, steps=every, seconds=20.0, data_s=(1.0, 2.5), evaluation_s=(3.0, 3.0),
                    checkpoint_s=(0.5, 0.5),
                )
            )  # fmt: skip
    run.append_metrics(lines)


def _make_evaluation(labels: tuple[str, ...], step: int, steps: int, floor: float) -> EvaluationRecord:
    done = step / steps
    good = 0.8 - 0.3 * math.exp(-5 * done) - 0.05 * max(0.0, done - 0.7)
    metrics = {"accuracy": good, "f1_macro": good - 0.02, "mcc": 2 * good - 1}
    if not labels:
        metrics = {"pearson": good, "spearman": good - 0.01, "mse": 2.3 - good, "rmse": math.sqrt(2.3 - good)}
    loss = floor + 0.08 + 0.45 * math.exp(-4 * done) + 0.1 * max(0.0, done - 0.5)
    return EvaluationRecord(
        split="validation", step=step, loss=loss, metrics=metrics, rows=872, skipped_rows=0, seconds=2.0,
        best=done <= 0.7,
    )  # fmt: skip


def _add_results(run: RunDir, labels: tuple[str, ...], steps: int, comment: str) -> None:
    best = 7 * (steps // 10)
    for split, rows in (("validation", 872), ("test", 1821)):
        run.write_record(f"scores-{split}.json", _make_scores(split, labels, rows, best, comment))
    result = ResultRecord(steps=steps, best_step=best, stopped_early=False, skipped_rows=3, elapsed_s=steps * 0.21)
    run.write_record("result.json", result)
    workers = tuple(
        WorkerRecord(rank=rank, host="node-1", device="cpu", peak_memory_bytes=size, peak_device_bytes=0)
        for rank, size in enumerate((1_400_000_000, 1_300_000_000))
    )
    environment = EnvironmentRecord(
        packages={"torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.8", "ray": "2.60.0"},
        python="3.11.2", platform="Linux-6.1-x86_64-with-glibc2.36",
        git_commit="0d6a3b1c9f0e4f7aa8b2c1d0e5f6a7b8c9d0e1f2+dirty", workers=workers,
    )  # fmt: skip
    run.write_record("environment.json", environment)
    plan = {"steps": steps, "zero": {"stage": 2, "why": comment or "fits"}, "windows": [13, 32], "warnings": []}
    run.write_bytes("plan.json", json.dumps(plan).encode())
    run.write_bytes("model/README.md", b"# a model\n")


def _make_scores(split: str, labels: tuple[str, ...], rows: int, step: int, comment: str) -> ScoresRecord:
    metrics = {"pearson": 0.787, "spearman": 0.781, "mse": 1.52}
    baseline = {"pearson": 0.0, "spearman": 0.0, "mse": 4.41}
    matrix = _make_confusion_matrix(labels, rows) if labels else None
    if matrix is not None:
        accuracy = sum(matrix.counts[i][i] for i in range(len(labels))) / rows
        metrics = {"accuracy": accuracy, "f1_macro": accuracy - 0.01, "mcc": 0.57}
        baseline = {"accuracy": max(sum(row) for row in matrix.counts) / rows, "f1_macro": 1 / len(labels), "mcc": 0.0}
    text = comment or "a gripping , if uneven , thriller that forgets its own plot half way through"
    worst = tuple(
        WorstRow(
            row=17 * i, file="data/test.parquet", file_row=17 * i, loss=6.1 - 0.2 * i,
            inputs={"text": _LONG if i == 1 else text, "premise": "short"},
            target=labels[0] if labels else "4.600", prediction=labels[-1] if labels else "1.213",
        )
        for i in range(14)
    )  # fmt: skip
    return ScoresRecord(
        split=split, step=step, loss=0.4711, rows=rows, skipped_rows=2 if split == "test" else 0, metrics=metrics,
        baseline=baseline, confusion=matrix, classes=_make_class_rows(matrix) if matrix is not None else (),
        worst=worst,
    )  # fmt: skip


def _make_confusion_matrix(labels: tuple[str, ...], rows: int) -> ConfusionMatrix:
    draw = random.Random(2)
    size = len(labels)
    counts = [[0] * size for _ in labels]
    for _ in range(rows):
        true = min(int(draw.random() ** 1.3 * size), size - 1)
        predicted = true if draw.random() < 0.78 else min(size - 1, max(0, true + draw.choice((-2, -1, 1, 3))))
        counts[true][predicted if size > 2 else (true if draw.random() < 0.78 else 1 - true)] += 1
    return ConfusionMatrix(labels=labels, counts=tuple(tuple(row) for row in counts))


def _make_class_rows(matrix: ConfusionMatrix) -> tuple[ClassRow, ...]:
    rows = []
    for i, label in enumerate(matrix.labels):
        support, predicted, hits = sum(matrix.counts[i]), sum(row[i] for row in matrix.counts), matrix.counts[i][i]
        precision, recall = hits / max(1, predicted), hits / max(1, support)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        rows.append(ClassRow(label=label, precision=precision, recall=recall, f1=f1, support=support))
    return tuple(rows)
