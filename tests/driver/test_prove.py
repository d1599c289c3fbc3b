"""Real trainings on several shapes, without Ray: what is proven of a run, and what is recorded of one that differs."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from launcher.driver.prepare import PreparedJob
from launcher.driver.prove import prove_run
from launcher.errors import RunError
from launcher.report.collect import collect
from launcher.rundir.certificate import CERTIFICATE, Certificate, hash_run
from launcher.rundir.directory import RunDir
from launcher.rundir.metrics_log import truncate_after
from launcher.rundir.plan import Plan
from launcher.rundir.records import ResultRecord, StepRecord
from launcher.rundir.verify import verify_files
from launcher.spec.loader import dump_job
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

_SHAPES = ((1, 0), (2, 1), (2, 2))


def _train_and_export(prepared: PreparedJob) -> Any:
    """Do in this process's group what a train worker does, and what the driver writes."""
    from launcher.tasks import build_task
    from launcher.train.checkpoint import reader
    from launcher.train.engine import Engine
    from launcher.train.export import export_model

    run, job, plan = prepared.run, prepared.job, prepared.plan
    result = train_here(prepared)["result"]
    engine = Engine(job, build_task(job), plan.micro_batch)
    reader.load(run, engine, result["best_step"], weights_only=True)
    export_model(run, engine, build_task(job), job, plan)
    if dist.get_rank() == 0:
        run.write_bytes("job.yaml", dump_job(job).encode())
        run.write_record("plan.json", plan)
        run.write_record("result.json", ResultRecord.model_validate(result))
    engine.close()
    return result["steps"]


def _name(workers: int, zero: int) -> str:
    return f"test-prove-w{workers}-z{zero}"


@pytest.fixture
def proven(tiny_bert: Path, tmp_path: Path) -> tuple[RunDir, list[PreparedJob]]:
    """A run on two workers with dropout, and the same job trained on each shape."""
    data = write_splits(tmp_path / "data", train=40, validation=13)
    train = {"virtual_ranks": 8}
    job = prepared_job(tiny_bert, data, tmp_path, model={"dropout": 0.1}, parallel={"zero": 0}, train=train)
    sections = [{"name": _name(w, z), "cluster": {"workers": w}, "parallel": {"zero": z}} for w, z in _SHAPES]
    shapes = [with_job(job, **changes) for changes in sections]
    for prepared in (job, *shapes):
        assert run_group(prepared.plan.workers, _train_and_export, prepared) == 4
    return job.run, shapes


def _prove(run: RunDir, shapes: list[PreparedJob]) -> tuple[Certificate, str]:
    # Trained already, so the command has only to compare them.
    printed = StringIO()
    certificate = prove_run(run, [shape.job for shape in shapes], Console(file=printed, width=500))
    return certificate, printed.getvalue()


def test_shapes_are_compared_certified_and_a_doctored_one_fails(proven: tuple[RunDir, list[PreparedJob]]) -> None:
    run, shapes = proven
    certificate, printed = _prove(run, shapes)
    assert certificate.is_proven and run.read_record(CERTIFICATE, Certificate) == certificate
    assert certificate.sentence == (
        "Proven: the same bits on 1 worker, ZeRO 0, and on 2 workers, ZeRO 1; the same curve within 1e-05 on 2 "
        "workers, ZeRO 2 (certificate.json)"
    )
    exact, _, close = certificate.shapes
    assert exact.compared == ("losses", "evaluations", "scores", "weights") and exact.largest_difference == 0
    assert close.inexact == ("ZeRO-2 adds gradients in an order of its own",) and close.largest_difference < 1e-6
    assert certificate.virtual_ranks == 8 and certificate.threads == 1 and certificate.steps == 4
    # The files themselves are equal, not only their tensors.
    hashes = hash_run(run)
    assert list(hashes.weights) == ["model/model.safetensors"] and list(hashes.scores) == ["validation"]
    assert hashes == certificate.hashes == hash_run(shapes[0].run) == hash_run(shapes[1].run)
    assert not any(check.difference for check in verify_files(run, certificate))
    # The reason comes before the training of its shape.
    note = printed.index("note: only within 1e-05: ZeRO-2 adds gradients in an order of its own")
    assert printed.index(f"shape 3 of 3: 2 workers, ZeRO 2 ({_name(2, 2)})") < note
    assert note < printed.index("2 workers, ZeRO 2: losses and evaluations agree within 1e-05")
    for name in ("model/README.md", "report.html"):
        assert run.read_bytes(name).decode().count(certificate.sentence) == 1, name

    _raise_loss(shapes[1].run, step=3, by=1e-12)
    weights = bytearray(shapes[0].run.read_bytes("model/model.safetensors"))
    weights[-1] ^= 1
    shapes[0].run.write_bytes("model/model.safetensors", bytes(weights))
    _raise_loss(shapes[2].run, step=2, by=1e-3)
    certificate, printed = _prove(run, shapes)
    assert not certificate.is_proven and certificate.is_intact
    first, second, third = certificate.shapes
    assert first.failure == "weights in model/model.safetensors" and first.largest_difference == 0
    assert second.failure.startswith("loss at step 3: ") and 0 < second.largest_difference < 1e-11
    assert third.failure.startswith("the loss curves differ: loss at step 2: ")
    assert f"2 workers, ZeRO 1: differs first in {second.failure}" in printed
    sentence = "Not proven: another curve on 1 worker, ZeRO 0, and on 2 workers, ZeRO 1 and 2 (certificate.json)"
    for name in ("model/README.md", "report.html"):
        text = run.read_bytes(name).decode()
        assert sentence in text and "Proven: the same bits" not in text, name


def _raise_loss(run: RunDir, step: int, by: float) -> None:
    lines = list(run.read_metrics())
    truncate_after(run, 0)
    run.append_metrics(
        line.model_copy(update={"loss": line.loss + by}) if isinstance(line, StepRecord) and line.step == step else line
        for line in lines
    )


def test_shapes_that_are_no_proof_are_refused_before_any_is_trained(
    proven: tuple[RunDir, list[PreparedJob]],
) -> None:
    run, shapes = proven
    micro = shapes[0].job.model_copy(update={"parallel": shapes[0].job.parallel.model_copy(update={"micro_batch": 1})})
    with pytest.raises(RunError, match="w1-z0: was trained with micro-batches of 2 and not 1; remove this directory"):
        prove_run(run, [shapes[1].job, micro], Console(quiet=True))
    foreign = shapes[1].run.read_bytes("job.yaml").decode().replace("learning_rate: 0.001", "learning_rate: 0.002")
    shapes[1].run.write_bytes("job.yaml", foreign.encode())
    with pytest.raises(RunError, match="w2-z1: belongs to another job"):
        prove_run(run, [shapes[0].job, shapes[1].job], Console(quiet=True))
    old = run.read_record("plan.json", Plan).model_copy(update={"virtual_ranks": 0})
    run.write_record("plan.json", old)
    with pytest.raises(RunError, match="was trained by an older version, which promises no bits"):
        prove_run(run, [shapes[0].job], Console(quiet=True))
    assert collect(run).certificate is None
