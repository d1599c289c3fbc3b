"""A run that was never trained, with a certificate: what `verify` needs, without the price of training."""

from pathlib import Path
from typing import Any

from launcher.driver.prepare import prepare
from launcher.driver.prove import make_certificate
from launcher.report.collect import collect
from launcher.rundir.certificate import CERTIFICATE, hash_run
from launcher.rundir.directory import RunDir
from launcher.rundir.records import EvaluationRecord, ResultRecord, ScoresRecord
from launcher.spec.loader import dump_job
from launcher.train.export import write_model_card
from tests.support.finished_run import finished_run
from tests.support.jobs import make_job
from tests.support.records import shape_proof, step_record


def certified_run(model: Path, storage: Path, data: dict[str, Any], /, **sections: Any) -> RunDir:
    """Write a run on real data that looks finished, with a certificate for one and two workers."""
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
