"""A loss that couples the rows of a global batch: the same on any cluster, with dropout, resumed, and evaluated."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cross_entropy

from launcher.data.rank_batches import GlobalBatch, Part, collate
from launcher.driver.prepare import PreparedJob
from launcher.tasks import build_task
from launcher.tasks.samples import Batch, Outputs
from launcher.tasks.text_classification import TextClassification
from launcher.train.coupled import coupled_forward_backward, gather_outputs
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_curve, with_job


class NearestRows(TextClassification):
    """Rows whose nearest other row should have their class; ORPO-like second term over another normalizer."""

    couples = True
    normalizers = ("words",)
    partner_columns = ("input_ids",)

    def encode(self, rows: pa.Table, with_targets: bool, noise: Any = None) -> Any:
        encoded = super().encode(rows, with_targets, noise)
        words = pa.array(encoded.lengths - 2)
        return replace(encoded, samples=encoded.samples.append_column("words", words))

    def collate(self, samples: pa.Table) -> Batch:
        batch = super().collate(samples)
        partner = torch.tensor([sum(ids) for ids in samples.column("partner_input_ids").to_pylist()]).float()
        words = torch.from_numpy(samples.column("words").to_numpy().copy()).float()
        return replace(batch, targets={"partner": partner, "words": words})

    def forward(self, model: Any, batch: Batch) -> Outputs:
        logits = model(**batch.inputs).logits
        share = batch.totals["weight"] / batch.totals["words"] * batch.targets["words"]
        return {"vector": logits, "label": batch.labels, "partner": batch.targets["partner"], "share": share}

    def coupled_losses(self, outputs: Outputs) -> torch.Tensor:
        vectors = 20 * outputs["vector"] + torch.tensor([1.0, -1.0])
        partner = outputs["partner"] / 1000
        scores = vectors @ vectors.T * (1.5 + partner.cos()[:, None]) - 1e4 * torch.eye(len(vectors))
        same = (outputs["label"][:, None] == outputs["label"]).float() - torch.eye(len(vectors))
        truth = same / same.sum(1, keepdim=True)
        # Rows without a companion have no truth.
        losses: torch.Tensor = cross_entropy(scores, truth.nan_to_num(), reduction="none") * outputs["share"]
        return losses

    def update_metrics(self, metrics: Any, outputs: Outputs, batch: Batch, samples: pa.Table) -> None:
        metrics.update(outputs["vector"], batch.labels)

    def row_results(self, outputs: Outputs, batch: Batch, samples: pa.Table, chosen: Any) -> Any:
        return super().row_results({"logits": outputs["vector"]}, batch, samples, chosen)


@pytest.fixture
def job(tiny_bert: Path, tmp_path: Path) -> PreparedJob:
    data = write_splits(tmp_path / "data", train=71, validation=40, row_group=37)
    task = {"type": "tests.train.test_coupled:NearestRows", "max_length": 32}
    return prepared_job(tiny_bert, data, tmp_path, task=task, train={"max_steps": 9, "learning_rate": 1e-3})


def _cut_curves(job: PreparedJob, cuts: list[tuple[int, int | None]]) -> list[list[float]]:
    """Return the curve of each ZeRO stage and micro-batch."""
    return [
        train_curve(with_job(job, name=f"{job.job.cluster.workers}-{z}-{m}", parallel={"zero": z, "micro_batch": m}))
        for z, m in cuts
    ]


def test_curve_does_not_depend_on_micro_batch_workers_or_zero_stage(job: PreparedJob) -> None:
    reference, *others = run_group(1, _cut_curves, with_job(job, cluster={"workers": 1}), [(0, None), (0, 1)])
    others += run_group(3, _cut_curves, with_job(job, cluster={"workers": 3}), [(1, 2), (2, 4), (3, 3)])
    assert np.mean(reference[-3:]) < np.mean(reference[:3])
    for curve in others:
        assert np.abs(np.array(curve) - np.array(reference)).max() < 1e-5


def _evaluated_losses(job: PreparedJob) -> list[float]:
    train_curve(job)
    lines = [json.loads(line) for line in job.run.read_bytes("metrics.jsonl").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "evaluation"]


def test_evaluation_does_not_depend_on_micro_batch_or_workers(job: PreparedJob) -> None:
    evaluated = {"evaluation": {"every_steps": 3, "batch_size": 16}}
    alone = with_job(job, name="alone", cluster={"workers": 1}, **evaluated)
    losses = run_group(1, _evaluated_losses, alone)
    assert len(losses) == 3
    cut = with_job(job, name="cut", cluster={"workers": 3}, parallel={"micro_batch": 2, "zero": 2}, **evaluated)
    assert run_group(3, _evaluated_losses, cut) == pytest.approx(losses, abs=1e-5)


def test_both_passes_draw_the_same_dropout(job: PreparedJob) -> None:
    """The gradient of the two passes is that of the loss, compared with one pass over the whole batch."""
    task = build_task(job.job)
    encoded = task.encode(task.example_rows(6, 0), True)
    samples = encoded.samples.append_column("partner_input_ids", encoded.samples.column("input_ids"))
    samples = samples.append_column("__row", pa.array(range(6))).append_column(
        "__mask", pa.array([1.0] * 6, pa.float32())
    )
    model = task.build_model().train()
    header = GlobalBatch(6, 6.0, 1, {"words": 40.0})

    class Plain:
        device = torch.device("cpu")
        virtual_ranks = 1

        def seed(self, step: int, part: int, micro_batch: int) -> None:
            torch.manual_seed(1000 * step + 100 * part + micro_batch)

        def forward(self, task: Any, batch: Batch, part: int = -1) -> Outputs:
            outputs: Outputs = task.forward(model, batch)
            return outputs

        def backward(self, loss: torch.Tensor, weight: float, ends_part: bool) -> None:
            (loss / weight).backward()

    engine: Any = Plain()
    parts = [samples.slice(0, 4), samples.slice(4, 2)]
    (loss,) = coupled_forward_backward(engine, task, [Part(0, tuple(parts))], header, 3)
    two_passes = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    outputs = []
    for number, part in enumerate(parts, 1):
        engine.seed(3, 0, number)
        outputs.append(engine.forward(task, collate(task, part, header)))
    whole = {name: torch.cat([part[name] for part in outputs]) for name in outputs[0]}
    direct = task.coupled_losses(whole).sum()
    (direct / 6).backward()
    largest = max(float(gradient.abs().max()) for gradient in two_passes)
    assert largest > 0
    assert float(loss) == pytest.approx(float(direct.detach()), abs=1e-5)
    for gradient, parameter in zip(two_passes, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert (
            float((gradient - parameter.grad).abs().max()) < 1e-3 * largest
        )  # another mask differs by about `largest`


def test_outputs_are_gathered_in_the_order_of_rows() -> None:
    gathered = gather_outputs({"a": torch.tensor([[5.0], [1.0], [3.0]]), "b": torch.tensor([5, 1, 3])}, [50, 10, 30])
    assert gathered.outputs["a"].tolist() == [[1.0], [3.0], [5.0]]
    assert gathered.outputs["b"].tolist() == [1, 3, 5]
    assert gathered.own.tolist() == [2, 0, 1]
