"""Trains a finished run again on several shapes and certifies what has the same bits: `launcher replay RUN --prove`.

A shape is a number of workers and a ZeRO stage. Each is trained as a run of its own, NAME-prove-w2-z1, which the same
command resumes if it was interrupted, and compares if it is finished. Runs on the head (the driver).
"""

from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console

from launcher.driver.preflight import check_resumable, is_finished
from launcher.driver.prepare import PreparedJob
from launcher.driver.replay import find_known_differences, name_with_ending, prepare_replay
from launcher.driver.run import run_job
from launcher.driver.worker_group import ray_session
from launcher.errors import RunError
from launcher.formatting import print_line
from launcher.report.collect import ReportData, collect
from launcher.report.curves_match import TOLERANCE, compare_curves, find_first_difference
from launcher.report.render import write_report
from launcher.rundir.certificate import (
    CERTIFICATE,
    Certificate,
    RunHashes,
    ShapeProof,
    describe_hardware,
    describe_workers,
    hash_run,
    list_versions,
)
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import Plan
from launcher.rundir.records import EnvironmentRecord
from launcher.rundir.recovery import effective_micro_batch, read_reductions
from launcher.spec.curve import spec_hash
from launcher.spec.job import JobSpec
from launcher.train.export import write_proof


def prove_run(run: RunDir, jobs: Sequence[JobSpec], console: Console) -> Certificate:
    """Train a run again on each shape, compare, and write its certificate, model card and report.

    Args:
        run: Finished run.
        jobs: Job of the run for each shape: `cluster.workers` and `parallel.zero` differ.
        console: Console for progress.

    Returns:
        Certificate, with the shapes that failed.

    Raises:
        RunError: The run is too old, its data changed, or a run of a shape has another cut.
        LauncherError: `run_job` raised it. The certificate stays as it was.
    """
    plan = run.read_record("plan.json", Plan)
    if not plan.virtual_ranks:
        raise RunError(
            f"{run.uri}: was trained by an older version, which promises no bits (plan.json has no virtual_ranks); "
            "train it again under another name to prove that"
        )
    prepared = [_prepare_shape(run, job) for job in jobs]
    data, hashes = collect(run), hash_run(run)
    shapes = []
    with ExitStack() as stack:
        unfinished = [shape.job for shape in prepared if not is_finished(shape)]
        if unfinished:
            # One session for all shapes: connecting takes a second or two, and the largest has to fit.
            stack.enter_context(ray_session(max(unfinished, key=_count_cpus)))
        for number, shape in enumerate(prepared, 1):
            where = f"{describe_workers((shape.plan.workers,))}, ZeRO {shape.plan.zero}"
            print_line(console, f"shape {number} of {len(prepared)}: {where} ({shape.run.name})")
            reasons = find_known_differences(plan, shape)
            for reason in reasons:
                print_line(console, f"note: only within {TOLERANCE:g}: {reason}")
            if not is_finished(shape):
                run_job(shape.job, console)
            shapes.append(compare_shape(run, data, hashes, shape.run, reasons))
            print_line(console, describe_shape(shapes[-1], hashes))
    certificate = make_certificate(run, data, hashes, shapes)
    if data.certificate is not None:
        certificate = certificate.with_shapes_of(data.certificate)
    run.write_record(CERTIFICATE, certificate)
    write_proof(run, certificate)
    write_report(run)
    return certificate


def _count_cpus(job: JobSpec) -> float:
    return job.cluster.logical_cpus()


def _prepare_shape(run: RunDir, job: JobSpec) -> PreparedJob:
    """Prepare the training of one shape.

    Raises:
        RunError: Its run is that of another job or has another cut of the batches; or as `prepare_replay`.
    """
    name = name_with_ending(run, f"-prove-w{job.cluster.workers}-z{job.zero_stage}")
    prepared = prepare_replay(run, job, name)
    # For all shapes before the first is trained.
    check_resumable(prepared)
    old, new = prepared.run.find_record("plan.json", Plan), prepared.plan
    # A finished run of the shape is not trained again, so it has to be the one that was asked for.
    if old is not None and effective_micro_batch(prepared.run, old.micro_batch) != new.micro_batch:
        raise RunError(
            f"{prepared.run.uri}: was trained with micro-batches of {old.micro_batch} and not {new.micro_batch}; "
            "remove this directory to train the shape again"
        )
    return prepared


def compare_shape(
    run: RunDir, data: ReportData, hashes: RunHashes, shape: RunDir, reasons: tuple[str, ...]
) -> ShapeProof:
    """Compare a run with one that trained its job on another shape.

    Args:
        run: Finished run.
        data: Content of the run directory.
        hashes: Hashes of the results of the run.
        shape: Finished run of the shape.
        reasons: Reasons why the bits may differ; () if they must not.
    """
    plan = shape.read_record("plan.json", Plan)
    other, other_hashes = collect(shape), hash_run(shape)
    if read_reductions(run) or read_reductions(shape):
        # Known only now: a micro-batch that did not fit into memory was halved during the training.
        reasons = (*reasons, "a micro-batch was reduced after running out of memory")
    agreement = compare_curves(data, other)
    if not reasons:
        failure = _find_bit_difference(data, hashes, other, other_hashes)
    elif not agreement.is_same_curve or len(data.evaluations) != len(other.evaluations):
        failure = "; ".join(agreement.sentences)
    else:
        failure = ""
    if failure:
        failure += _describe_environments(data.environment, other.environment)
    log = (hashes.losses, hashes.evaluations)
    return ShapeProof(
        run=shape.name,
        workers=plan.workers,
        zero=plan.zero,
        micro_batch=plan.micro_batch,
        inexact=reasons,
        compared=("losses", "evaluations") if reasons else ("losses", "evaluations", "scores", "weights"),
        is_bit_equal=log == (other_hashes.losses, other_hashes.evaluations) if reasons else hashes == other_hashes,
        largest_difference=agreement.largest_difference,
        failure=failure,
        versions=list_versions(other.environment),
        hardware=describe_hardware(other.environment),
    )


def _find_bit_difference(data: ReportData, hashes: RunHashes, other: ReportData, other_hashes: RunHashes) -> str:
    """Describe the first value of two runs whose bits differ; "" if there is none."""
    difference = find_first_difference(data, other)
    if difference is not None:
        return difference
    if hashes.scores != other_hashes.scores:
        return f"scores of {_list_changed(hashes.scores, other_hashes.scores)}"
    if hashes.weights != other_hashes.weights:
        return f"weights in {_list_changed(hashes.weights, other_hashes.weights)}"
    # Only the numbers of rows are left: they are hashed and not shown.
    return "" if hashes == other_hashes else "rows of the evaluations"


def _list_changed(values: dict[str, str], others: dict[str, str]) -> str:
    return ", ".join(name for name in sorted({*values, *others}) if values.get(name) != others.get(name))


def _describe_environments(first: EnvironmentRecord | None, second: EnvironmentRecord | None) -> str:
    """Return what may explain a difference: versions and hardware that are not those of the run."""
    old = {**list_versions(first), "hardware": describe_hardware(first)}
    new = {**list_versions(second), "hardware": describe_hardware(second)}
    changed = [f"{name} {old[name]} -> {new[name]}" for name in old.keys() & new.keys() if old[name] != new[name]]
    return f" (the environments differ: {', '.join(sorted(changed))})" if changed else ""


def describe_shape(shape: ShapeProof, hashes: RunHashes) -> str:
    """Return the result of one shape in a sentence."""
    if shape.failure:
        return (
            f"{shape.shape}: differs first in {shape.failure}"
            if not shape.inexact
            else f"{shape.shape}: {shape.failure}"
        )
    if shape.inexact:
        bits = ", and all of them have the same bits" if shape.is_bit_equal else ""
        return f"{shape.shape}: losses and evaluations agree within {TOLERANCE:g}{bits}"
    splits = "".join(f", scores of {split}" for split in hashes.scores)
    return f"{shape.shape}: the same bits: losses, evaluations{splits}, {', '.join(hashes.weights)}"


def make_certificate(run: RunDir, data: ReportData, hashes: RunHashes, shapes: Sequence[ShapeProof]) -> Certificate:
    """Return the certificate of a run, sealed."""
    plan = run.read_record("plan.json", Plan)
    return Certificate(
        steps=data.steps_done,
        virtual_ranks=plan.virtual_ranks,
        hashes=hashes,
        data_fingerprint=plan.fingerprint,
        spec_hash=spec_hash(data.job),
        versions=list_versions(data.environment),
        hardware=describe_hardware(data.environment),
        threads=data.job.train.threads,
        tolerance=TOLERANCE,
        shapes=tuple(shapes),
    ).seal()
