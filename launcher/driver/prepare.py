"""Turns a job into everything a run needs before it starts: absolute paths, splits, class names, plan.

Runs on the client (`check`) and the head (`train`). Reads footers, one column, and the model's config; no weights. What
could stop the run is checked next, in `preflight.py`.
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
    note_lost_labels,
    note_sorted_rows,
    with_class_names,
)
from launcher.data.convert import splittable_files
from launcher.data.encoded_cache import cache_root
from launcher.data.footers import OnProgress, gc_paused
from launcher.data.label_inference import infer_task_params
from launcher.data.mixed_splits import mix_splits
from launcher.data.row_sample import sample_rows
from launcher.data.splits import Split, open_files, row_bytes
from launcher.driver.memory.auto import MemoryPlan, largest_part, resolve_auto_parallel
from launcher.driver.mixture_plan import count_epoch_steps, metric_modes, mixture_notes, with_row_weights
from launcher.driver.plan_notes import cluster_notes, model_notes, repeated_file_notes, training_notes
from launcher.errors import DataError, ModelError
from launcher.models import from_config
from launcher.models.fingerprint import fingerprint_model
from launcher.models.pretrained import load_config, without_weights
from launcher.rundir.directory import RunDir
from launcher.rundir.plan import MAX_STEPS, Plan, state_bytes, total_steps
from launcher.rundir.uri import join, split_options
from launcher.spec.data import DataSpec, SourceSpec
from launcher.spec.exactness import inexact_reasons
from launcher.spec.job import JobSpec, TaskSpec
from launcher.spec.messages import not_one_of
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.tasks.params import ColumnKind
from launcher.tasks.results import MetricMode

_BATCH_ROWS = 4096
# Sample for remarks on the training data: tokenizers read some MiB a second.
_SAMPLE_ROWS, _SAMPLE_BYTES = 256, 2 << 20


@dataclass(frozen=True)
class PreparedJob:
    """A job ready to run."""

    job: JobSpec
    """Job with absolute paths, class names, and numbers where it said `auto`."""
    run: RunDir
    splits: dict[str, Split]
    plan: Plan


OnData = Callable[[JobSpec, dict[str, Split]], None]
"""Called with the resolved job and its splits as soon as they are known."""


def prepare(
    job: JobSpec,
    on_progress: OnProgress | None = None,
    cache: str | None = None,
    measure: bool = False,
    on_data: OnData | None = None,
) -> PreparedJob:
    """Resolve a job and plan its run.

    Args:
        job: Job as the user gave it.
        on_progress: Callback with the number of footers of a split that are read, and their total.
        cache: Directory or URI for converted files and footers; None is the storage's own, which all jobs share.
        measure: True to estimate memory even if nothing is `auto`, and to look for remarks on the training data;
            takes a second or two.
        on_data: Callback before memory is estimated, to start work that needs only the data.

    Raises:
        UserError: Data, columns, labels or model do not fit the job file.
    """
    _check_bitsandbytes(job)
    job = with_absolute_paths(job)
    # Called for its error alone: it checks data.cache.
    cache_root(job)
    splits = open_splits(job, on_progress, cache)
    job = _resolve_packing(_resolve_task(job, splits))
    task = build_task(job)
    job = with_row_weights(job, task, splits["train"])
    model_facts = task.check_model()
    if model_facts.get("packs") is False:
        job = _with_packing(job, False)
    data_notes = [*note_lost_labels(task, list(splits.values())), *note_sorted_rows(job, task, splits["train"])]
    run = RunDir(join(job.output.storage, job.name))
    job = _with_virtual_ranks(job, run)
    if on_data is not None:
        on_data(job, splits)
    memory = resolve_auto_parallel(job, run, splits["train"], measure)
    if measure:
        data_notes += _sample_remarks(task, splits["train"])
    return PreparedJob(memory.job, run, splits, _make_plan(memory, splits, model_facts, data_notes))


def _with_virtual_ranks(job: JobSpec, run: RunDir) -> JobSpec:
    """Return the job with the number of parts of a batch; that of the run, if it has begun with other workers."""
    if job.train.virtual_ranks is not None:
        return job
    old = run.find_record("plan.json", Plan)
    parts = (
        old.virtual_ranks if old is not None and 0 < old.virtual_ranks <= job.train.batch_size else job.virtual_ranks
    )
    return job.model_copy(update={"train": job.train.model_copy(update={"virtual_ranks": parts})})


def _resolve_packing(job: JobSpec) -> JobSpec:
    """Return the job with `task.packing` true or false where it is `auto`."""
    # Batches of similar lengths have little padding. A packed sequence pays attention over its whole length, which a
    # GPU makes up for by larger kernels and a CPU does not (tests/benchmarks/README.md).
    packs = bool(job.cluster.gpus_per_worker) or not job.data.group_by_length
    return _with_packing(job, packs) if job.task.parameters().get("packing") == "auto" else job


def _with_packing(job: JobSpec, packing: bool) -> JobSpec:
    return job.model_copy(update={"task": TaskSpec.model_validate({**job.task.model_dump(), "packing": packing})})


def _check_bitsandbytes(job: JobSpec) -> None:
    # transformers quantizes with both.
    if all(importlib.util.find_spec(name) for name in ("bitsandbytes", "accelerate")):
        return
    keys = {
        "train.optimizer: adamw_8bit needs": "take adamw" if job.train.optimizer.type == "adamw_8bit" else None,
        "model.quantization: nf4 needs": "drop it" if job.model.quantization else None,
    }
    for key, alternative in keys.items():
        if alternative is not None:
            raise ModelError(
                f"{key} bitsandbytes, which is not installed here; pip install 'launcher[bitsandbytes]' on every node, "
                f"or {alternative}"
            )


def _resolve_task(job: JobSpec, splits: dict[str, Split]) -> JobSpec:
    """Fill in the class names and, with `model.from_config`, the model; check columns and labels.

    Raises:
        DataError: A column is missing, or labels do not fit.
    """
    task = build_task(job)
    for split in splits.values():
        check_columns(split, task)
    check_label_types(job, task, splits)
    job = infer_task_params(_with_base_model(job, task, splits["train"]), task, splits["train"])
    task = build_task(job)
    # Again: the inferred task may read columns that only the training data has.
    for split in splits.values():
        check_columns(split, task)
    if job.data.on_bad_row == "error":
        check_targets(task, [split for name, split in splits.items() if name != "train"])
    return job


def _sample_remarks(task: Task, train: Split) -> tuple[str, ...]:
    """Return the task's remarks on a sample of the training data; none for images, which are large and need none."""
    if task.from_scratch == "image":
        return ()
    rows = max(1, min(_SAMPLE_ROWS, int(_SAMPLE_BYTES / row_bytes(train))))
    columns = [*dict.fromkeys(task.input_columns + task.target_columns)]
    return task.remarks(sample_rows(train, columns, rows), [name for name in train.schema.names if name not in columns])


def with_absolute_paths(job: JobSpec) -> JobSpec:
    """Return the job with absolute local paths, which mean the same in every process."""
    data: dict[str, object] = _absolute_locations(job.data)
    if job.data.mixture is not None:
        sources = job.data.mixture.items()
        data["mixture"] = {name: spec.model_copy(update=_absolute_locations(spec)) for name, spec in sources}
    data["files_below"] = tuple(_absolute(location) for location in job.data.files_below)
    cache = job.data.cache
    if cache is not None and cache.path is not None:
        data["cache"] = cache.model_copy(update={"path": _absolute(cache.path)})
    model = {"name": absolute_model_name(job.model.name)}
    # No slash at the end: directories of runs are compared as text.
    storage, options = split_options(_absolute(job.output.storage))
    return job.model_copy(
        update={
            "data": job.data.model_copy(update=data),
            "model": job.model.model_copy(update=model),
            "output": job.output.model_copy(update={"storage": storage.rstrip("/") + options}),
            "logging": job.logging.model_copy(update={"mlflow": _absolute_mlflow_uri(job.logging.mlflow)}),
        }
    )


def _absolute_locations(spec: DataSpec | SourceSpec) -> dict[str, object]:
    return {
        name: tuple(_absolute(location) for location in locations)
        for name in ("train", "validation", "test")
        if (locations := getattr(spec, name)) is not None
    }


def absolute_model_name(name: str) -> str:
    """Return a model directory's absolute path; leave any other name (hub, URI) as it is."""
    path = os.path.abspath(os.path.expanduser(name))
    # "" would become the working directory.
    return path if name and os.path.isdir(path) else name


def _absolute_mlflow_uri(uri: str | None) -> str | None:
    # SQLAlchemy takes `sqlite:///name` as relative, which would be another file on every worker.
    scheme = "sqlite:///"
    if uri is not None and uri.startswith(("~", ".", "/")):
        return _absolute(uri)
    if uri is None or not uri.startswith(scheme):
        return uri
    return scheme + os.path.abspath(os.path.expanduser(uri[len(scheme) :]))


def _absolute(location: str) -> str:
    if "://" in location or location.startswith("hub:"):
        return location
    return os.path.abspath(os.path.expanduser(location))


def open_splits(
    job: JobSpec,
    on_progress: OnProgress | None = None,
    cache: str | None = None,
    names: Sequence[str] = ("train", "validation", "test"),
) -> dict[str, Split]:
    """Open every split that the job names, from footers; convert formats without footers into the storage's cache.

    Args:
        job: Job with absolute paths.
        on_progress: Callback with the number of footers of a split that are read, and their total.
        cache: Directory or URI for converted files and footers; None is the storage's own.
        names: Names of the splits to open, `train` first if it is one of them.
    """
    splits: dict[str, Split] = {}
    kinds = build_task(job).columns()
    for name in names:
        if job.data.locations(name):
            splits[name] = _open_sources(job, name, kinds, on_progress, cache)
        if name == "train":
            # They come first: their classes decide how the same columns of the other splits are read.
            kinds = _kinds_of_training(kinds, splits["train"])
    return with_class_names(job, splits)


def _open_sources(
    job: JobSpec,
    name: str,
    kinds: Mapping[str, ColumnKind],
    on_progress: OnProgress | None,
    cache: str | None,
) -> Split:
    """Open a split: its files, or those of each source of a mixture that has this split."""
    locations = getattr(job.data, name)
    if locations is not None:
        return _open_split(job, name, locations, kinds, on_progress, cache)
    sources = {n: source for n, source in (job.data.mixture or {}).items() if getattr(source, name) is not None}
    opened = []
    for source_name, source in sources.items():
        # The files have their own names for some columns.
        own = {source.columns.get(column, column): kind for column, kind in kinds.items()}
        opened.append((source_name, _open_split(job, name, getattr(source, name), own, on_progress, cache)))
    return mix_splits(name, opened, [source.columns for source in sources.values()], kinds)


def _kinds_of_training(kinds: dict[str, ColumnKind], train: Split) -> dict[str, ColumnKind]:
    """Return the kinds of columns with the training data's: if its classes are text, `12` is one too, not a number."""
    text_columns = [
        column
        for column, kind in kinds.items()
        if kind == "class" and column in train.schema.names and pa.types.is_string(train.schema.field(column).type)
    ]
    return kinds | dict.fromkeys(text_columns, "text")


def open_split_file(job: JobSpec, name: str, locations: Sequence[str]) -> Split:
    """Open one split of a job, or other data that is read as one.

    Args:
        job: Job that says the format, the classes, and where converted files and footers are kept.
        name: Name of the split.
        locations: Paths, URIs or globs of its files.

    Raises:
        DataError: A file cannot be read.
    """
    return with_class_names(job, {name: _open_split(job, name, locations, build_task(job).columns())})[name]


def _open_split(
    job: JobSpec,
    name: str,
    locations: Sequence[str],
    kinds: Mapping[str, ColumnKind],
    on_progress: OnProgress | None = None,
    cache: str | None = None,
) -> Split:
    cache = cache or join(job.output.storage, ".cache")
    digest = hashlib.sha256(repr((tuple(locations), job.data.format)).encode()).hexdigest()[:24]
    # Without garbage collection: it would search the tuples of a hundred thousand files again and again.
    with gc_paused():
        files = splittable_files(name, locations, job.data.format, cache, kinds)
        return open_files(name, files, join(cache, f"footers/{digest}.arrow"), on_progress, kinds)


def _with_base_model(job: JobSpec, task: Task, train: Split) -> JobSpec:
    """Make the model directory for `model.from_config`, once, in the storage's cache; return the job that names it."""
    if job.model.from_config is None:
        return job
    # The tokenizer is trained on the training data, so their fingerprint is part of the key.
    facts = [job.model.model_dump(mode="json", include={"name", "revision", "from_config"}), train.fingerprint]
    key = hashlib.sha256(
        json.dumps([*facts, from_config.VERSION, task.from_scratch, task.input_columns], sort_keys=True).encode()
    )
    cache = RunDir(join(job.output.storage, f".cache/models/{key.hexdigest()[:24]}"))
    if not cache.exists("base/config.json"):
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            columns = [] if task.from_scratch == "image" else _text_columns(task, train)
            from_config.create_base_model(job.model, task.from_scratch, _iter_cells(train, columns), base)
            made = job.model.model_copy(update={"name": str(base), "revision": None})
            # Before the cache gets it: it may raise.
            without_weights(task.auto_model, made, load_config(made))
            # Never replaced: another command may have made it meanwhile, and its workers read it.
            cache.publish_directory(base, "base", keep=True)
    return job.model_copy(update={"model": job.model.model_copy(update={"name": cache.path("base")})})


def _text_columns(task: Task, train: Split) -> list[str]:
    targets = [c for c in task.target_columns if pa.types.is_string(train.schema.field(c).type)]
    return [*task.input_columns, *targets]


def _iter_cells(split: Split, columns: list[str]) -> Iterator[object]:
    """Iterate over the cells of some columns, a few thousand rows at a time."""
    for begin in range(0, split.rows if columns else 0, _BATCH_ROWS):
        rows = np.arange(begin, min(begin + _BATCH_ROWS, split.rows))
        yield from split.read(rows, columns).to_pylist()


def _make_plan(
    memory: MemoryPlan, splits: dict[str, Split], model_facts: dict[str, object], data_notes: Sequence[str]
) -> Plan:
    """Plan steps, local batches and memory.

    Args:
        memory: Memory plan, with the job whose stage and micro-batch are resolved.
        splits: Splits of the job.
        model_facts: Facts of the model (`Task.check_model`).
        data_notes: Notes on the data.

    Raises:
        DataError: `evaluation.metric` does not exist, or the run would have too many steps.
    """
    job, task = memory.job, build_task(memory.job)
    rows = {name: split.rows for name, split in splits.items()}
    validation = splits.get("validation")
    metric, mode = _choose_metric(job, task, validation)
    steps = count_epoch_steps(job, splits["train"])
    steps_in_all = total_steps(steps, job)
    if steps_in_all > MAX_STEPS:
        raise DataError(
            f"train.epochs: {job.train.epochs} epochs of {steps} steps are more than "
            f"the {MAX_STEPS} steps a run may have; lower it, or set train.max_steps"
        )
    part, parts = largest_part(job, splits["train"]), -(-job.virtual_ranks // job.cluster.workers)
    requested = job.parallel.micro_batch
    micro_batch = min(requested, part) if isinstance(requested, int) else part
    parameters = int(str(model_facts.get("parameters", 0)))
    return Plan(
        task=job.task.type,
        train_rows=rows["train"],
        validation_rows=rows.get("validation", 0),
        test_rows=rows.get("test", 0),
        validation_sources=() if validation is None else tuple(source.rows for source in validation.sources),
        fingerprint=splits["train"].fingerprint,
        batch_size=job.train.batch_size,
        window_steps=job.data.window_steps,
        steps_per_epoch=steps,
        epochs=job.train.epochs,
        total_steps=steps_in_all,
        evaluate_every_steps=job.evaluation.every_steps,
        metric=metric,
        metric_mode=mode,
        workers=job.cluster.workers,
        zero=job.zero_stage,
        samples_per_worker=min(parts * part, job.train.batch_size),
        virtual_ranks=job.virtual_ranks,
        inexact=inexact_reasons(job),
        micro_batch=micro_batch,
        accumulation=parts * -(-part // micro_batch),
        model={k: v for k, v in model_facts.items() if v and isinstance(v, (str, int, float, bool))},
        model_files=fingerprint_model(job.model),
        parameters=parameters,
        state_bytes_per_worker=state_bytes(parameters, int(str(model_facts.get("trained", parameters))), job),
        memory=memory.memory,
        memory_limit_bytes=memory.limit_bytes,
        notes=(
            *data_notes,
            *training_notes(job, task, rows),
            *model_notes(job, model_facts, part),
            *cluster_notes(job),
            *repeated_file_notes(splits),
            *mixture_notes(job, splits["train"], steps_in_all),
            *memory.notes,
        ),
    )


def _choose_metric(job: JobSpec, task: Task, validation: Split | None) -> tuple[str, MetricMode]:
    """Return the metric that selects the best checkpoint, and its direction.

    Raises:
        DataError: The task has no metric of that name.
    """
    modes = metric_modes(task, validation)
    metric = job.evaluation.metric or next(iter(modes))
    if metric not in modes:
        raise DataError(not_one_of("evaluation.metric", metric, tuple(modes)))
    return metric, modes[metric] if job.evaluation.mode == "auto" else job.evaluation.mode
