"""From a job file to everything a run needs before it starts: absolute paths, splits, class names, plan.

Runs on the client (`check`) and the head (`train`). Reads footers, one column, and the model's config; no weights.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from launcher.data.checks import (
    check_columns,
    check_label_types,
    check_targets,
    has_classes,
    lost_notes,
    sorted_notes,
    with_class_names,
)
from launcher.data.convert import splittable_files
from launcher.data.encoded_cache import root_of
from launcher.data.footers import OnProgress, uncollected
from launcher.data.label_inference import infer_task_params
from launcher.data.splits import Split, open_files, row_bytes, sample
from launcher.driver.machine import missing_local_resources
from launcher.driver.memory.auto import MemoryPlan, largest_local_batch, resolve_auto_parallel
from launcher.errors import DataError, ModelError
from launcher.models import from_config
from launcher.models.fingerprint import model_files
from launcher.models.pretrained import load_config, without_weights
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import MAX_STEPS, Plan, state_bytes, steps_of, total_steps
from launcher.rundir.uri import join, redact_uri, split_options
from launcher.spec.job import JobSpec, TaskSpec
from launcher.spec.messages import not_one_of
from launcher.tasks import build_task
from launcher.tasks.base import ColumnKind, Task
from launcher.tasks.metrics.labels import remarks

_ROWS_AT_ONCE = 4096
# Tokenizers read some MiB a second.
_REMARKED_ROWS, _REMARKED_BYTES = 256, 2 << 20


@dataclass(frozen=True)
class PreparedJob:
    """A job ready to run."""

    job: JobSpec
    """Resolved: absolute paths, class names filled in."""
    run: RunDir
    splits: dict[str, Split]
    plan: Plan


OnData = Callable[[JobSpec, dict[str, Split]], None]
"""Is given the resolved job and its splits as soon as they are known."""


def prepare(
    job: JobSpec,
    told: OnProgress | None = None,
    cache: str | None = None,
    measure: bool = False,
    on_data: OnData | None = None,
) -> PreparedJob:
    """Resolve a job and plan it.

    Args:
        job: the job.
        told: how many footers of a split are read.
        cache: where converted files and footers are kept; None is the storage's own, which other jobs share.
        measure: Whether to predict memory even where nothing is to be decided by it, and to look for remarks on the
            training data, for a second or two.
        on_data: Called before memory is predicted; begins what needs the data alone.

    Raises:
        UserError: data, columns, labels or model do not fit the job file.
    """
    if job.train.optimizer.type == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed here; pip install "
            "'launcher[bitsandbytes]' on every node, or take adamw"
        )
    job = with_absolute_paths(job)
    root_of(job)  # refuses
    splits = open_splits(job, told, cache)
    task = build_task(job)
    for split in splits.values():
        check_columns(split, task)
    check_label_types(job, task, splits)
    job = infer_task_params(_with_base(job, task, splits["train"]), task, splits["train"])
    task = build_task(job)
    for split in splits.values():  # training may have columns that the other splits lack
        check_columns(split, task)
    if job.data.on_bad_row == "error":
        check_targets(task, [split for name, split in splits.items() if name != "train"])
    facts = task.check_model()
    if facts.get("packs") is False:
        task_spec = TaskSpec.model_validate({**job.task.model_dump(), "packing": False})
        job = job.model_copy(update={"task": task_spec})
    notes = [*lost_notes(task, list(splits.values())), *sorted_notes(job, task, splits["train"])]
    run = RunDir(join(job.output.storage, job.name))
    if on_data is not None:
        on_data(job, splits)
    room = resolve_auto_parallel(job, run, splits["train"], measure)
    notes += _remarks(task, splits["train"]) if measure else ()
    return PreparedJob(room.job, run, splits, make_plan(room, build_task(room.job), splits, facts, notes))


def _remarks(task: Task, train: Split) -> tuple[str, ...]:
    """Return what some rows of the training data tell; pictures tell nothing, and are large."""
    if task.from_scratch == "image":
        return ()
    rows = max(1, min(_REMARKED_ROWS, int(_REMARKED_BYTES / row_bytes(train))))
    read = [*dict.fromkeys(task.input_columns + task.target_columns)]
    return task.remarks(sample(train, read, rows), [name for name in train.schema.names if name not in read])


def with_absolute_paths(job: JobSpec) -> JobSpec:
    """Local paths made absolute, so that they mean the same in every process."""
    data: dict[str, object] = {
        name: tuple(_absolute(location) for location in locations)
        for name in ("train", "validation", "test")
        if (locations := getattr(job.data, name)) is not None
    }
    data["files_below"] = tuple(_absolute(location) for location in job.data.files_below)
    cache = job.data.cache
    if cache is not None and cache.path is not None:
        data["cache"] = cache.model_copy(update={"path": _absolute(cache.path)})
    model = {"name": absolute_model_name(job.model.name)}
    return job.model_copy(
        update={
            "data": job.data.model_copy(update=data),
            "model": job.model.model_copy(update=model),
            "output": job.output.model_copy(update={"storage": _bare_end(_absolute(job.output.storage))}),
            "logging": job.logging.model_copy(update={"mlflow": _absolute_store(job.logging.mlflow)}),
        }
    )


def absolute_model_name(name: str) -> str:
    """Return the path of a model's directory made absolute; what is none is a name on the hub, a URI or nowhere."""
    path = os.path.abspath(os.path.expanduser(name))
    return path if name and os.path.isdir(path) else name


def _absolute_store(uri: str | None) -> str | None:
    """SQLAlchemy takes `sqlite:///name` as relative, which would be another file on every worker."""
    scheme = "sqlite:///"
    if uri is not None and uri.startswith(("~", ".", "/")):
        return _absolute(uri)
    if uri is None or not uri.startswith(scheme):
        return uri
    return scheme + os.path.abspath(os.path.expanduser(uri[len(scheme) :]))


def _bare_end(storage: str) -> str:
    bare, options = split_options(storage)
    return bare.rstrip("/") + options


def _absolute(location: str) -> str:
    if "://" in location or location.startswith("hub:"):
        return location
    return os.path.abspath(os.path.expanduser(location))


def open_splits(job: JobSpec, told: OnProgress | None = None, cache: str | None = None) -> dict[str, Split]:
    """Every split the job names, from footers; formats without footers are converted into the storage's cache."""
    splits: dict[str, Split] = {}
    kinds = build_task(job).columns()
    for name in ("train", "validation", "test"):
        locations = getattr(job.data, name)
        if locations is not None:
            splits[name] = _open(job, name, locations, told, cache, kinds=kinds)
            kinds = _as_trained(kinds, splits["train"])
    return with_class_names(job, splits)


def _as_trained(kinds: dict[str, ColumnKind], train: Split) -> dict[str, ColumnKind]:
    """Return what columns hold once the training data is known: `12` is a class beside `007`, and no integer."""
    names = train.schema.names
    texts = [
        n for n, k in kinds.items() if k == "class" and n in names and pa.types.is_string(train.schema.field(n).type)
    ]
    return kinds | dict.fromkeys(texts, "text")


def open_part(job: JobSpec, name: str, locations: Sequence[str]) -> Split:
    """Return one split of a job, or other data that is read as one.

    Args:
        job: Job that says the format, the classes, and where converted files and footers are kept.
        name: Name of the split.
        locations: Paths, URIs or globs of its files.

    Raises:
        DataError: It cannot be read.
    """
    return with_class_names(job, {name: _open(job, name, locations)})[name]


def _open(
    job: JobSpec,
    name: str,
    locations: Sequence[str],
    told: OnProgress | None = None,
    cache: str | None = None,
    *,
    kinds: Mapping[str, ColumnKind] | None = None,
) -> Split:
    cache = cache or join(job.output.storage, ".cache")
    kinds = build_task(job).columns() if kinds is None else kinds
    digest = hashlib.sha256(repr((tuple(locations), job.data.format)).encode()).hexdigest()[:24]
    with uncollected():  # a hundred thousand files, each some tuples
        files = splittable_files(name, locations, job.data.format, cache, kinds)
        return open_files(name, files, join(cache, f"footers/{digest}.arrow"), told, kinds)


def _with_base(job: JobSpec, task: Task, train: Split) -> JobSpec:
    """For `model.from_config`: the model directory is made once, in the storage's cache."""
    if job.model.from_config is None:
        return job
    facts = [job.model.model_dump(mode="json", include={"name", "revision", "from_config"}), train.fingerprint]
    key = hashlib.sha256(
        json.dumps([*facts, from_config.VERSION, task.from_scratch, task.input_columns], sort_keys=True).encode()
    )
    cache = RunDir(join(job.output.storage, f".cache/models/{key.hexdigest()[:24]}"))
    if not cache.exists("base/config.json"):
        with tempfile.TemporaryDirectory() as folder:
            columns = [] if task.from_scratch == "image" else _text_columns(task, train)
            from_config.create_base_model(job.model, task.from_scratch, _cells(train, columns), Path(folder) / "base")
            made = job.model.model_copy(update={"name": f"{folder}/base", "revision": None})
            without_weights(task.auto_model, made, load_config(made))  # what makes no model does not get into the cache
            cache.publish_directory(Path(folder) / "base", "base", keep=True)
    return job.model_copy(update={"model": job.model.model_copy(update={"name": cache.path("base")})})


def _text_columns(task: Task, train: Split) -> list[str]:
    targets = [c for c in task.target_columns if pa.types.is_string(train.schema.field(c).type)]
    return [*task.input_columns, *targets]


def _cells(split: Split, columns: list[str]) -> Iterator[object]:
    """The cells of some columns, a few rows at a time."""
    for begin in range(0, split.rows if columns else 0, _ROWS_AT_ONCE):
        rows = np.arange(begin, min(begin + _ROWS_AT_ONCE, split.rows))
        yield from split.read(rows, columns).to_pylist()


def make_plan(
    room: MemoryPlan, task: Task, splits: dict[str, Split], facts: dict[str, object], remarks: Sequence[str] = ()
) -> Plan:
    """Return steps, shares and memory.

    Args:
        room: Job with its memory settled.
        task: Task of the job.
        splits: Splits of the job.
        facts: Facts of the model (`Task.check_model`).
        remarks: Notes on the data.

    Raises:
        DataError: the metric that should decide does not exist.
    """
    job = room.job
    rows = {name: split.rows for name, split in splits.items()}
    modes = {**task.metric_modes, "loss": "min"}
    metric = job.evaluation.metric or next(iter(modes))
    if metric not in modes:
        raise DataError(not_one_of("evaluation.metric", metric, tuple(modes)))
    if total_steps(rows["train"], job) > MAX_STEPS:
        raise DataError(
            f"train.epochs: {job.train.epochs} epochs of {steps_of(rows['train'], job.train.batch_size)} steps are "
            f"more than the {MAX_STEPS} steps a run may have; lower it, or set train.max_steps"
        )
    mode = job.evaluation.mode if job.evaluation.mode != "auto" else modes[metric]
    share = largest_local_batch(job, splits["train"])
    given = job.parallel.micro_batch
    micro = min(given, share) if isinstance(given, int) else share
    parameters = int(str(facts.get("parameters", 0)))
    return Plan(
        task=job.task.type,
        train_rows=rows["train"],
        validation_rows=rows.get("validation", 0),
        test_rows=rows.get("test", 0),
        fingerprint=splits["train"].fingerprint,
        batch_size=job.train.batch_size,
        window_steps=job.data.window_steps,
        steps_per_epoch=steps_of(rows["train"], job.train.batch_size),
        epochs=job.train.epochs,
        total_steps=total_steps(rows["train"], job),
        evaluate_every_steps=job.evaluation.every_steps,
        metric=metric,
        metric_mode=mode,
        workers=job.cluster.workers,
        zero=job.zero_stage,
        samples_per_worker=share,
        micro_batch=micro,
        accumulation=-(-share // micro),
        model={k: v for k, v in facts.items() if v and isinstance(v, (str, int, float, bool))},
        model_files=model_files(job.model),
        parameters=parameters,
        state_bytes_per_worker=state_bytes(parameters, int(str(facts.get("trained", parameters))), job),
        memory=room.memory,
        memory_limit_bytes=room.limit,
        notes=(*remarks, *_notes(job, task, rows, facts), *_twice(splits), *room.notes),
    )


def _notes(job: JobSpec, task: Task, rows: dict[str, int], facts: dict[str, object]) -> list[str]:
    notes = []
    if "validation" not in rows:
        notes.append("no validation data: the last weights are exported, whatever they are worth")
    if has_classes(task):
        notes += remarks(getattr(task.params, "labels", None) or (), task.target_columns[0])
    if task.for_evaluation() is not task:
        notes.append("validation and test losses are plain cross entropy: smoothing and class weights shape training")
    if rows["train"] < job.train.batch_size:
        notes.append(f"fewer training rows ({rows['train']}) than train.batch_size: one smaller batch per epoch")
    if job.train.optimizer.type == "adamw_8bit" and job.zero_stage:
        notes.append(
            "adamw_8bit quantises blocks of each worker's shard: another number of workers changes the last digits of "
            "the curve, and cannot go on from its checkpoints; parallel.zero: 0 has neither limit"
        )
    if job.data.cache is not None and task.augments:
        notes.append("data.cache: training rows are augmented, so only validation and test rows are kept")
    return notes + _model_notes(job, facts) + _cluster_notes(job)


def _model_notes(job: JobSpec, facts: dict[str, object]) -> list[str]:
    notes = []
    if job.model.syncs_batch_norm and facts.get("batch_norms"):
        notes.append(
            "BatchNorm sees one micro-batch of all workers: parallel.micro_batch changes the result"
            if job.parallel.micro_batch
            else "BatchNorm is synchronised over all workers; leave parallel.micro_batch alone, or the result changes"
        )
    elif facts.get("batch_norms"):
        notes.append("BatchNorm keeps its pretrained statistics; model.batch_norm: sync learns them anew")
    if facts.get("packs") is False:
        notes.append(
            f"task.packing: off, as packed samples would see each other in a {facts['model_type']} model; shorter rows "
            "are padded, and the loss curve is the same"
        )
    if job.model.dropout != 0.0:
        notes.append("dropout draws other noise for another number of workers or micro-batch; all else stays equal")
    return notes


def _twice(splits: dict[str, Split]) -> list[str]:
    """Return a note for each split that has a file more than once."""
    notes = []
    for name, split in splits.items():
        counted = split.fragments.files.column("path").value_counts().to_pylist()
        again = next((entry["values"] for entry in counted if entry["counts"] > 1), None)
        if again is not None:
            place = np.flatnonzero(np.asarray(split.fragments.files.column("path")) == again)[0]
            known = split.fragments.files.column("origin")[int(place)].as_py() or again
            notes.append(f"data.{name}: {redact_uri(known)} is named more than once, and its rows count as often")
    return notes


def _cluster_notes(job: JobSpec) -> list[str]:
    notes = []
    if job.cluster.workers > job.train.batch_size:
        notes.append(
            f"cluster.workers: of {job.cluster.workers} workers only {job.train.batch_size} ever get a sample, as "
            "train.batch_size has no more"
        )
    notes += [lacks] if (lacks := missing_local_resources(job)) is not None else []
    if job.cluster.gpus_per_worker and not job.train.deterministic:
        notes.append("GPU kernels may differ in the last bits from run to run; train.deterministic: true refuses them")
    return notes
