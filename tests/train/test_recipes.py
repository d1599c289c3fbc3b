"""The promise for recipes: other workers, micro-batches, stages and stops do not change their curves."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from group import run_group, train_here, with_job

from jobs import prepared_job, write_splits
from launcher.prepare import Prepared
from launcher.tasks import build_task


def _curve(job: Prepared) -> list[float]:
    return [loss for _, loss in train_here(job)["lines"]]


def _shaped(job: Prepared) -> Any:
    """The curve, and torch's own weighted and smoothed mean over the first global batch under the first weights."""
    source, task = job.splits["train"], build_task(job.job)
    from launcher.data.stream import StreamSource
    from launcher.data.windows import train_windows

    stream = StreamSource(job.job, job.splits, 1)
    window = next(iter(train_windows(job.plan, job.job, 0)))
    ids = stream.row_ids(window)
    encoded = stream.encode(task, window, ids)
    batch = task.collate(encoded.samples.take(stream._batches(window, len(ids), encoded)[0]))
    with torch.no_grad():
        logits = task.build_model().eval()(**batch.inputs).logits
    weights = torch.tensor(list(job.job.task.parameters()["class_weights"].values()))
    loss = torch.nn.CrossEntropyLoss(weights, label_smoothing=0.2)(logits, batch.labels)
    assert source.rows == job.plan.train_rows
    return [float(loss), _curve(job)]


def _cut(job: Prepared) -> list[list[float]]:
    cuts = ((0, None), (2, 1), (3, 3))
    return [_curve(with_job(job, name=f"z{z}", parallel={"zero": z, "micro_batch": m})) for z, m in cuts]


def test_weighted_and_smoothed_losses(tiny_bert: Path, tmp_path: Path) -> None:
    """Weights that differ fifty-fold, so that a mean over micro-batches or workers would be far off."""
    data = write_splits(tmp_path / "data", train=131, validation=40, row_group=37)
    shaped = {"type": "text-classification", "max_length": 32, "label_smoothing": 0.2}
    common: dict[str, Any] = {"train": {"max_steps": 12, "learning_rate": 3e-3}, "cluster": {"workers": 1}}
    weighted = prepared_job(
        tiny_bert, data, tmp_path, task=shaped | {"class_weights": {"a": 0.1, "b": 5}}, name="alone", **common
    )
    expected, reference = run_group(1, _shaped, weighted)
    assert abs(reference[0] - expected) < 1e-5
    for curve in run_group(3, _cut, with_job(weighted, cluster={"workers": 3})):
        assert np.abs(np.array(curve) - np.array(reference)).max() < 1e-5
    # Balanced weights are a fact of the job file once it is resolved, and shape no evaluation.
    balanced = prepared_job(tiny_bert, data, tmp_path, task=shaped | {"class_weights": "balanced"}, **common)
    assert sorted(balanced.job.task.parameters()["class_weights"]) == ["a", "b"]
    assert any("plain cross entropy" in note for note in balanced.plan.notes)
