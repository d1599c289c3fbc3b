"""The promise for recipes: other workers, micro-batches, stages and stops do not change their curves."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.driver.prepare import PreparedJob
from launcher.tasks import build_task
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job


def _curve(job: PreparedJob) -> list[float]:
    return [loss for _, loss in train_here(job)["lines"]]


def _shaped(job: PreparedJob) -> Any:
    """The curve, and torch's own weighted and smoothed mean over the first global batch under the first weights."""
    source, task = job.splits["train"], build_task(job.job)
    from launcher.data.stream import StreamSource
    from launcher.data.windows import train_windows

    stream = StreamSource(job.job, job.splits, 1)
    window = next(iter(train_windows(job.plan, job.job, 0)))
    ids = stream.row_ids(window)
    encoded = stream.encode(task, window, ids)
    batch = task.collate(encoded.samples.take(stream.batches(window, len(ids), encoded)[0]))
    with torch.no_grad():
        logits = task.build_model().eval()(**batch.inputs).logits
    weights = torch.tensor(list(job.job.task.parameters()["class_weights"].values()))
    loss = torch.nn.CrossEntropyLoss(weights, label_smoothing=0.2)(logits, batch.labels)
    assert source.rows == job.plan.train_rows
    return [float(loss), _curve(job)]


def _cut(job: PreparedJob) -> list[list[float]]:
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


# name: sections, and the ZeRO stages it is tried with
_RECIPES: dict[str, tuple[dict[str, Any], tuple[int | str, ...]]] = {
    "momentum": (
        {"train": {"optimizer": {"type": "sgd", "nesterov": True, "weight_decay": 0.01}, "learning_rate": 3e-2}},
        (2, 3, "auto"),
    ),
    "plain": ({"train": {"optimizer": {"type": "sgd", "momentum": 0.0}, "learning_rate": 1e-1}}, (2, 3)),
    "adafactor": (
        {"train": {"optimizer": {"type": "adafactor", "weight_decay": 0.1}, "learning_rate": 1e-2}},
        ("auto",),
    ),
    "layers": (
        {"model": {"freeze": {"embeddings": True, "layers": 1}}, "train": {"layer_decay": 0.5, "learning_rate": 3e-3}},
        (0, 2, 3),
    ),
}
_STEPS = 10


def _across(jobs: list[tuple[PreparedJob, int | None]]) -> list[Any]:
    """Each job's curve, to its end or until a step."""
    return [train_here(job, stop_after)["lines"] for job, stop_after in jobs]


def test_a_recipe_has_one_curve(tiny_bert: Path, tmp_path: Path) -> None:
    """Three workers leave a run after 4 steps and go on to 8, which has the same bits as one go; one worker ends it.

    All of that with micro-batches of 3 and several stages agrees with one worker without ZeRO.
    """
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

    cuts = [(name, zero) for name, (_, stages) in _RECIPES.items() for zero in stages]
    alone = run_group(1, _across, [(cut(name, 0, "alone", 1), None) for name in jobs])
    reference = dict(zip(jobs, alone, strict=True))
    ends_at = sorted(lines[_STEPS - 1][1] for lines in reference.values())
    assert min(np.diff(ends_at)) > 1e-4  # each recipe takes its own way, so equality means something
    whole = [(cut(*one, "whole", 3), None) for one in cuts]
    parts = [(cut(*one, "part", 3), until) for until in (4, 8) for one in cuts]
    found = run_group(3, _across, [*whole, *parts])
    ends = run_group(1, _across, [(cut(*one, "part", 1), None) for one in cuts])
    for (name, zero), in_one_go, first, second, end in zip(
        cuts, found, found[len(cuts) :], found[2 * len(cuts) :], ends, strict=False
    ):
        assert second[0][0] == 4 and end[0][0] == 7  # checkpoints after 3 and 6 steps
        assert [*first[:3], *second] == in_one_go[: 3 + len(second)], f"{name}, ZeRO {zero}: not the same bits"
        for step, loss in (*in_one_go, *end):
            assert abs(loss - reference[name][step - 1][1]) < 1e-5, f"{name}, ZeRO {zero}, step {step}"
