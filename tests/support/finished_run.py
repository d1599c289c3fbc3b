"""Runs with an exported model that were never trained: what `predict` and `verify` need, without the price."""

from pathlib import Path
from typing import Any

from launcher.driver.prepare import prepare
from launcher.driver.prove import make_certificate
from launcher.report.collect import collect
from launcher.rundir.certificate import CERTIFICATE, ShapeProof, hash_run
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, ResultRecord, ScoresRecord
from launcher.spec.loader import dump_job
from launcher.tasks import build_task
from launcher.train.export import write_model_card
from tests.support.jobs import make_job
from tests.support.records import step_record


def finished_run(model: Path, storage: Path, /, **sections: Any) -> RunDir:
    """A run whose model is `model` with a new head for the classes a and b."""
    task = {"type": "text-classification", "max_length": 32, "labels": ["a", "b"], **sections.pop("task", {})}
    job = make_job(model, {"train": "gone.parquet", **sections.pop("data", {})}, storage, task=task, **sections)
    run = RunDir(str(storage / job.name))
    built = build_task(job)
    built.build_model().save_pretrained(run.path("model"))
    built.processor().save_pretrained(run.path("model"))
    run.write_bytes("job.yaml", dump_job(job).encode())
    return run


def shape_proof(workers: int, zero: int, **changes: Any) -> ShapeProof:
    """The proof of a shape that trained the same bits, with changes."""
    proven = ShapeProof(
        run=f"test-prove-w{workers}-z{zero}", workers=workers, zero=zero, micro_batch=2, inexact=(),
        compared=("losses", "evaluations", "scores", "weights"), is_bit_equal=True, largest_difference=0.0, versions={},
        hardware="",
    )  # fmt: skip
    return proven.model_copy(update=changes)


def certified_run(model: Path, storage: Path, data: dict[str, Any], /, **sections: Any) -> RunDir:
    """A run on real data that looks finished, with a certificate for one and two workers."""
    run = finished_run(model, storage, data=data, parallel={"zero": 1}, **sections)
    prepared = prepare(make_job(model, data, storage, parallel={"zero": 1}, **sections))
    run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    run.write_record("plan.json", prepared.plan)
    metrics = {"accuracy": 0.75}
    evaluation = EvaluationRecord(
        split="validation", step=4, loss=0.4, metrics=metrics, rows=20, skipped_rows=0, seconds=1.0, best=True
    )
    run.append_metrics([*(step_record(step, 1.0 / step) for step in range(1, 5)), evaluation])
    scores = ScoresRecord(
        split="test", step=4, loss=0.5, rows=20, skipped_rows=0, metrics=metrics, baseline={}, confusion=None,
        classes=(), worst=(),
    )  # fmt: skip
    run.write_record("scores-test.json", scores)
    result = ResultRecord(steps=4, best_step=4, stopped_early=False, skipped_rows=0, elapsed_s=4.0)
    run.write_record("result.json", result)
    shapes = [shape_proof(workers, zero) for workers in (1, 2) for zero in (0, 1)]
    run.write_record(CERTIFICATE, make_certificate(run, collect(run), hash_run(run), shapes))
    write_model_card(run, prepared.job, prepared.plan, result)
    return run
