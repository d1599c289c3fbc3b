"""The promise for recipes: workers, micro-batches, stages and interruptions do not change their curves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.stream import StreamSource
from launcher.data.windows import train_windows
from launcher.driver.prepare import PreparedJob
from launcher.tasks import build_task
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_curve, train_losses, with_job


def _first_loss_and_curve(job: PreparedJob) -> Any:
    """Return torch's own weighted and smoothed loss of the first global batch, and the curve."""
    task = build_task(job.job)
    stream = StreamSource(job.job, job.splits, 1)
    window = next(iter(train_windows(job.plan, job.job, 0)))
    ids = stream.row_ids(window)
    encoded = stream.encode(task, window, ids)
    batch = task.collate(encoded.samples.take(stream.batches(window, ids, encoded)[0]))
    with torch.no_grad():
        logits = task.forward(task.build_model().eval(), batch)["logits"]
    weights = torch.tensor(list(job.job.task.parameters()["class_weights"].values()))
    loss = torch.nn.CrossEntropyLoss(weights, label_smoothing=0.2)(logits, batch.labels)
    assert job.splits["train"].rows == job.plan.train_rows
    return [float(loss), train_curve(job)]


def _cut_curves(job: PreparedJob) -> list[list[float]]:
    cuts = ((0, None), (2, 1), (3, 3))
    return [train_curve(with_job(job, name=f"z{z}", parallel={"zero": z, "micro_batch": m})) for z, m in cuts]


def test_weighted_and_smoothed_losses_match_torch_on_any_cluster(tiny_bert: Path, tmp_path: Path) -> None:
    # Weights that differ fifty-fold, so that a mean over micro-batches or workers would be far off.
    data = write_splits(tmp_path / "data", train=131, validation=40, row_group=37)
    shaped = {"type": "text-classification", "max_length": 32, "label_smoothing": 0.2}
    common: dict[str, Any] = {"train": {"max_steps": 12, "learning_rate": 3e-3}, "cluster": {"workers": 1}}
    weighted = prepared_job(
        tiny_bert, data, tmp_path, task=shaped | {"class_weights": {"a": 0.1, "b": 5}}, name="alone", **common
    )
    expected, reference = run_group(1, _first_loss_and_curve, weighted)
    assert abs(reference[0] - expected) < 1e-5
    for curve in run_group(3, _cut_curves, with_job(weighted, cluster={"workers": 3})):
        assert np.abs(np.array(curve) - np.array(reference)).max() < 1e-5
    # Balanced weights are part of the resolved job file, and do not affect evaluations.
    balanced = prepared_job(tiny_bert, data, tmp_path, task=shaped | {"class_weights": "balanced"}, **common)
    assert sorted(balanced.job.task.parameters()["class_weights"]) == ["a", "b"]
    assert any("plain cross entropy" in note for note in balanced.plan.notes)


# Further stages of recipes, in `make test-all`.
_MORE_STAGES: dict[str, tuple[int | str, ...]] = {"momentum": (2, 3), "plain": (2,), "layers": (2,)}
# Name -> sections, and ZeRO stages to train with.
_RECIPES: dict[str, tuple[dict[str, Any], tuple[int | str, ...]]] = {
    "momentum": (
        {"train": {"optimizer": {"type": "sgd", "nesterov": True, "weight_decay": 0.01}, "learning_rate": 3e-2}},
        ("auto",),
    ),
    "plain": ({"train": {"optimizer": {"type": "sgd", "momentum": 0.0}, "learning_rate": 1e-1}}, (3,)),
    "adafactor": (
        {"train": {"optimizer": {"type": "adafactor", "weight_decay": 0.1}, "learning_rate": 1e-2}},
        ("auto",),
    ),
    "layers": (
        {"model": {"freeze": {"embeddings": True, "layers": 1}}, "train": {"layer_decay": 0.5, "learning_rate": 3e-3}},
        (0, 3),
    ),
}
_STEPS = 10


def _train_all(jobs: list[tuple[PreparedJob, int | None]]) -> list[Any]:
    return [train_losses(job, stop_after) for job, stop_after in jobs]


@pytest.mark.parametrize("more", [{}, pytest.param(_MORE_STAGES, marks=pytest.mark.long)], ids=["some", "all"])
def test_recipe_has_one_curve_on_any_cluster(
    tiny_bert: Path, tmp_path: Path, more: dict[str, tuple[int | str, ...]]
) -> None:
    # Three workers stop after 4 and 8 steps, with the same bits as an uninterrupted run; one worker finishes.
    # With micro-batches of 3 and several stages all of them agree with one worker without ZeRO.
    data = write_splits(tmp_path / "data", train=131, row_group=37)
    jobs: dict[str, PreparedJob] = {}
    for name, (sections, _) in _RECIPES.items():
        train = {"max_steps": _STEPS, **sections["train"]}
        checkpoint = {"every_steps": 3, "every_minutes": None}
        common = {"checkpoint": checkpoint, "parallel": {"zero": "auto"}}
        jobs[name] = prepared_job(tiny_bert, data, tmp_path, **{**sections, "train": train}, **common)

    def cut(name: str, zero: int | str, run: str, workers: int) -> PreparedJob:
        parallel = {"zero": zero, "micro_batch": 3 if workers == 3 else None}
        return with_job(jobs[name], name=f"{name}-{run}-{zero}", parallel=parallel, cluster={"workers": workers})

    cuts = [(name, zero) for name, (_, stages) in _RECIPES.items() for zero in (*stages, *more.get(name, ()))]
    alone = run_group(1, _train_all, [(cut(name, 0, "alone", 1), None) for name in jobs])
    reference = dict(zip(jobs, alone, strict=True))
    last_losses = sorted(lines[_STEPS - 1][1] for lines in reference.values())
    assert min(np.diff(last_losses)) > 1e-4  # recipes differ, so equality means something
    whole = [(cut(name, zero, "whole", 3), None) for name, zero in cuts]
    parts = [(cut(name, zero, "part", 3), until) for until in (4, 8) for name, zero in cuts]
    results = run_group(3, _train_all, [*whole, *parts])
    ends = run_group(1, _train_all, [(cut(name, zero, "part", 1), None) for name, zero in cuts])
    for (name, zero), uninterrupted, first, second, end in zip(
        cuts, results, results[len(cuts) :], results[2 * len(cuts) :], ends, strict=False
    ):
        assert second[0][0] == 4 and end[0][0] == 7  # checkpoints after 3 and 6 steps
        assert [*first[:3], *second] == uninterrupted[: 3 + len(second)], f"{name}, ZeRO {zero}: not the same bits"
        for step, loss in (*uninterrupted, *end):
            assert abs(loss - reference[name][step - 1][1]) < 1e-5, f"{name}, ZeRO {zero}, step {step}"
