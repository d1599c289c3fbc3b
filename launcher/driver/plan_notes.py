"""Notes of a plan: what a job does that its user may not expect. Runs on the client and the head; `prepare.py` asks."""

import os

import numpy as np

from launcher.data.checks import has_classes
from launcher.data.splits import Split
from launcher.driver.preflight import missing_local_resources
from launcher.rundir.uri import redact_uri
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.tasks.metrics.labels import class_name_notes


def training_notes(job: JobSpec, task: Task, rows: dict[str, int]) -> list[str]:
    """Return notes on what the training does with the job's data and keys."""
    notes = []
    if "validation" not in rows:
        notes.append("no validation data: the last weights are exported, whatever their quality")
    if has_classes(task):
        notes += class_name_notes(getattr(task.params, "labels", None) or (), task.target_columns[0])
    if task.for_evaluation() is not task:
        notes.append("validation and test losses are plain cross entropy: smoothing and class weights shape training")
    if rows["train"] < job.train.batch_size and job.data.mixture is None:
        notes.append(f"fewer training rows ({rows['train']}) than train.batch_size: one smaller batch per epoch")
    if job.train.optimizer.type == "adamw_8bit" and job.zero_stage:
        notes.append(
            "adamw_8bit quantises blocks of each worker's shard: another number of workers cannot resume from its "
            "checkpoints; parallel.zero: 0 has no such limit"
        )
    if job.data.cache is not None and task.augments:
        notes.append("data.cache: training rows are augmented, so only validation and test rows are cached")
    return notes


def model_notes(job: JobSpec, model_facts: dict[str, object], part: int) -> list[str]:
    """Return notes on BatchNorm and packing, which depend on the model.

    Args:
        job: Resolved job.
        model_facts: Facts of the model (`Task.check_model`).
        part: Samples of the largest part of a global batch.
    """
    notes = []
    if job.model.trains_batch_norm and model_facts.get("batch_norms"):
        notes.append(
            "BatchNorm sees one micro-batch: parallel.micro_batch changes the result"
            if job.parallel.micro_batch
            else f"BatchNorm sees one part of a batch, {part} samples; fewer train.virtual_ranks make parts larger"
        )
    elif model_facts.get("batch_norms"):
        notes.append("BatchNorm keeps its pretrained statistics; model.batch_norm: trained moves them")
    if model_facts.get("packs") is False:
        notes.append(
            f"task.packing: off, as packed samples would see each other in a {model_facts['model_type']} model; "
            "shorter rows are padded, and the loss curve is the same"
        )
    return notes


def cluster_notes(job: JobSpec) -> list[str]:
    """Return notes on workers without work, idle cores and what this machine lacks."""
    notes = []
    if job.cluster.workers > job.virtual_ranks:
        remedy = "raise train.batch_size" if job.cluster.workers > job.train.batch_size else "raise train.virtual_ranks"
        notes.append(
            f"cluster.workers: of {job.cluster.workers} workers only {job.virtual_ranks} ever get a sample, as a batch "
            f"has no more parts; {remedy}, which changes the curve, or take fewer workers"
        )
    if not job.cluster.gpus_per_worker and not job.cluster.address and job.cluster.kubernetes is None:
        cores = os.cpu_count() or 1
        used = job.cluster.workers * job.train.threads
        if used < cores // 2:
            notes.append(
                f"train.threads: {job.cluster.workers} workers of {job.train.threads} threads leave most of {cores} "
                "cores idle; take more workers, or more threads, which change the last bits"
            )
    # A note, not an error: `check` may run on a machine without the GPUs. `train` refuses (`require_local_resources`).
    missing = missing_local_resources(job)
    if missing is not None:
        notes.append(missing)
    if job.cluster.gpus_per_worker and not job.train.deterministic:
        notes.append("GPU kernels may differ in the last bits from run to run; train.deterministic: true forbids them")
    return notes


def repeated_file_notes(splits: dict[str, Split]) -> list[str]:
    """Return a note for each split that names a file more than once."""
    notes = []
    for name, split in splits.items():
        paths = split.fragments.files.column("path")
        repeated = next((c["values"] for c in paths.value_counts().to_pylist() if c["counts"] > 1), None)
        if repeated is not None:
            index = int(np.flatnonzero(np.asarray(paths) == repeated)[0])
            origin = split.fragments.files.column("origin")[index].as_py() or repeated
            notes.append(f"data.{name}: {redact_uri(origin)} is named more than once, and its rows count as often")
    return notes
