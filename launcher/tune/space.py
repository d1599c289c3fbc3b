"""The search space: what a trial's values make of the job. Pure; runs on the head.

Keys are dotted paths of the job file; `search.py` chooses the values.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any  # a job as JSON

from pydantic import BaseModel, JsonValue, ValidationError

from launcher.errors import SpecError, UserError
from launcher.spec.job import JobSpec
from launcher.spec.messages import Document, Place, not_one_of, problems_of
from launcher.spec.schema import JobKeys
from launcher.spec.tune import Dimension, TuneSpec
from launcher.tasks.base import MetricMode

Params = dict[str, JsonValue]
# Beyond it no sweep comes to an end, and the list of its cells would fill the memory.
_LARGEST_GRID = 100_000
_FIXED = ("name", "tune", "output", "data", "evaluation.metric", "evaluation.mode", "cluster.address")
# What pbt may change while a trial goes on: neither its steps nor its weights' shapes depend on it.
_LIVE = ("train.learning_rate", "train.max_grad_norm", "train.optimizer.", "model.dropout")


def trial_job(base: JobSpec, params: Params, params_of: Callable[[str], type[BaseModel]]) -> JobSpec:
    """The job with the trial's values in place of its own.

    Raises:
        SpecError: a key is unknown, or a value is refused; names the key.
    """
    raw = base.model_dump(mode="json")
    for key, value in params.items():
        *sections, last = key.split(".")
        place = raw
        for section in sections:
            inner = place.get(section)
            place = place.setdefault(section, {}) if inner is None else inner
            if not isinstance(place, dict):
                raise SpecError((f"tune.space: {key}: {section} holds no keys of its own; name a key of the job file",))
        place[last] = value
    try:
        job = JobSpec.model_validate(raw)
        params_of(job.task.type).model_validate(job.task.parameters())
    except ValidationError as error:
        raise SpecError(_sentences(error, raw, params_of)) from error
    return job


def _sentences(
    error: ValidationError, raw: dict[str, Any], params_of: Callable[[str], type[BaseModel]]
) -> tuple[str, ...]:
    """What is wrong with a trial's values, as `load_job` would say it of a job file."""
    task = raw["task"]
    kind = params_of(task["type"]) if isinstance(task, dict) and isinstance(task.get("type"), str) else None
    document = Document(raw, {(): Place((0, 0), "tune.space")})
    at = ("task",) if kind is not None and error.title == kind.__name__ else ()
    return tuple(str(problem) for problem in problems_of(error, document, JobKeys(kind), at))


def check_space(base: JobSpec, spec: TuneSpec, params_of: Callable[[str], type[BaseModel]]) -> None:
    """Refuse a space in which some trial could not start.

    Raises:
        SpecError: one sentence per problem.
    """
    problems: list[str] = []
    for key, dimension in spec.space.items():
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            problems.append(f"tune.space: {key} cannot be searched: all trials share it; take it out of the space")
            continue
        if spec.scheduler == "pbt" and (key == "train.optimizer.type" or not key.startswith(_LIVE)):
            problems.append(
                f"tune.space: {key} cannot change while a trial goes on, as scheduler: pbt wants; search it with "
                f"another scheduler ({', '.join(_LIVE)} can)"
            )
        for value in dimension.choice or dimension.ends or ():  # the values most likely to be refused
            try:
                trial_job(base, {key: value}, params_of)
            except UserError as error:
                problems += [*error.problems] if isinstance(error, SpecError) else [error.message]
                break
    if spec.search == "grid":
        endless = [key for key, d in spec.space.items() if d.ends and not d.is_whole]
        problems += [f"tune.space: {key} has no end of values, which a grid cannot try; use choice" for key in endless]
        cells = 1 if endless else math.prod(_values(dimension) for dimension in spec.space.values())
        if cells > _LARGEST_GRID:
            problems.append(
                f"tune.space: the grid has {cells} cells, more than {_LARGEST_GRID}; use choice, or search: random"
            )
    if problems:
        raise SpecError(tuple(problems))


def _values(dimension: Dimension) -> int:
    low, high = dimension.ends or (0, -1)
    return len(dimension.choice) if dimension.choice else int(high) - int(low) + 1


def grid(space: Mapping[str, Dimension]) -> list[Params]:
    """Every combination, the last key changing first."""
    axes: list[Iterable[JsonValue]] = []
    for dimension in space.values():
        low, high = dimension.ends or (0, -1)
        axes.append(dimension.choice or range(int(low), int(high) + 1))
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def metric_of(spec: TuneSpec, base: JobSpec, modes: Mapping[str, MetricMode]) -> tuple[str, MetricMode]:
    """The metric that ranks trials and whether more of it is better.

    Raises:
        UserError: the task has no such metric.
    """
    known: dict[str, MetricMode] = {**modes, "loss": "min"}
    metric = spec.metric or base.evaluation.metric or next(iter(known))
    if metric not in known:
        raise UserError(not_one_of("tune.metric", metric, tuple(known)))
    mode = spec.mode if spec.mode != "auto" else base.evaluation.mode
    return metric, known[metric] if mode == "auto" else mode
