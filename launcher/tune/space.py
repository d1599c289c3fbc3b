"""The search space: its checks, and the job of a trial. Pure; runs on the head and on train workers.

Keys are dotted paths of the job file. Read `search.py` next, which chooses the values.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # a job as JSON

from pydantic import BaseModel, JsonValue, ValidationError

from launcher.errors import SpecError, UserError
from launcher.spec.job import JobSpec
from launcher.spec.messages import Document, Place, not_one_of, translate_errors
from launcher.spec.schema import JobKeys
from launcher.spec.tune import Dimension, TuneSpec
from launcher.tasks.results import MetricMode

Params = dict[str, JsonValue]
# A larger grid would never finish, and the list of its combinations would fill the memory.
_MAX_GRID = 100_000
_FIXED = ("name", "tune", "output", "data", "evaluation.metric", "evaluation.mode", "cluster.address")
# Keys that PBT may change during a trial: neither the number of steps nor the shapes of the weights depend on them.
_MUTABLE = ("train.learning_rate", "train.max_grad_norm", "train.optimizer.", "model.dropout")


def trial_job(base: JobSpec, params: Params, params_of: Callable[[str], type[BaseModel]]) -> JobSpec:
    """Return the job with the trial's values in place of its own.

    Args:
        base: Job of the sweep.
        params: Values by dotted key.
        params_of: Function that returns the parameter model of a task type.

    Raises:
        SpecError: A key is unknown, or a value is invalid.
    """
    # As JSON, which is validated as a whole: `model_copy` checks neither a value nor the rules between keys.
    raw = base.model_dump(mode="json")
    for key, value in params.items():
        *sections, last = key.split(".")
        parent = raw
        for section in sections:
            child = parent.get(section)
            if child is None:
                # A section that is null in the job, such as `model.lora`, begins with the searched key.
                child = parent[section] = {}
            parent = child
            if not isinstance(parent, dict):
                raise SpecError((f"tune.space: {key}: {section} has no keys; name a key of the job file",))
        parent[last] = value
    try:
        job = JobSpec.model_validate(raw)
        params_of(job.task.type).model_validate(job.task.parameters())
    except ValidationError as error:
        raise SpecError(_describe_problems(error, raw, params_of)) from error
    return job


def _describe_problems(
    error: ValidationError, raw: dict[str, Any], params_of: Callable[[str], type[BaseModel]]
) -> tuple[str, ...]:
    """Describe invalid values of a trial in the sentences that `load_job` uses for a job file."""
    task = raw["task"]
    kind = params_of(task["type"]) if isinstance(task, dict) and isinstance(task.get("type"), str) else None
    document = Document(raw, {(): Place((0, 0), "tune.space")})
    prefix = ("task",) if kind is not None and error.title == kind.__name__ else ()
    return tuple(str(problem) for problem in translate_errors(error, document, JobKeys(kind), prefix))


def check_space(base: JobSpec, spec: TuneSpec, params_of: Callable[[str], type[BaseModel]]) -> None:
    """Check that every trial of a space could start.

    Raises:
        SpecError: At least one key or value cannot be searched. Has one sentence per problem.
    """
    problems: list[str] = []
    for key, dimension in spec.space.items():
        is_weight = key.startswith("data.mixture.") and key.endswith(".weight")
        if not is_weight and any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            problems.append(
                f"tune.space: {key} cannot be searched, because all trials share it; remove it from the space"
            )
            continue
        if spec.scheduler == "pbt" and (key == "train.optimizer.type" or not key.startswith(_MUTABLE)):
            problems.append(
                f"tune.space: {key} cannot change during a trial, which scheduler: pbt requires (only "
                f"{', '.join(_MUTABLE)} can); use another scheduler"
            )
        # Of a range, the ends are the most likely to be invalid.
        for value in dimension.choice or dimension.ends or ():
            try:
                trial_job(base, {key: value}, params_of)
            except UserError as error:
                problems += [*error.problems] if isinstance(error, SpecError) else [error.message]
                break
    if spec.search == "grid":
        continuous = [key for key, d in spec.space.items() if d.ends and not d.is_whole]
        problems += [
            f"tune.space: {key} is a continuous range, which a grid cannot list; use choice" for key in continuous
        ]
        size = 1 if continuous else math.prod(_count_values(dimension) for dimension in spec.space.values())
        if size > _MAX_GRID:
            problems.append(
                f"tune.space: the grid has {size} combinations, more than {_MAX_GRID}; use choice, or search: random"
            )
    if problems:
        raise SpecError(tuple(problems))


def list_grid(space: Mapping[str, Dimension]) -> list[Params]:
    """Return all combinations of the values, in which the last key changes fastest."""
    axes = [_grid_values(dimension) for dimension in space.values()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def _grid_values(dimension: Dimension) -> Sequence[JsonValue]:
    low, high = dimension.ends or (0, -1)
    return dimension.choice or range(int(low), int(high) + 1)


def _count_values(dimension: Dimension) -> int:
    low, high = dimension.ends or (0, -1)
    # Not len(range): it overflows at 2**63.
    return len(dimension.choice) if dimension.choice else int(high) - int(low) + 1


def choose_metric(spec: TuneSpec, base: JobSpec, modes: Mapping[str, MetricMode]) -> tuple[str, MetricMode]:
    """Return the metric that ranks the trials, and its direction.

    Args:
        spec: Sweep. Its metric and mode take precedence.
        base: Job of the sweep, whose evaluation has the next choice.
        modes: Direction of each metric that the task measures, its main metric first.

    Raises:
        UserError: The task has no such metric.
    """
    known: dict[str, MetricMode] = {**modes, "loss": "min"}
    metric = spec.metric or base.evaluation.metric or next(iter(known))
    if metric not in known:
        raise UserError(not_one_of("tune.metric", metric, tuple(known)))
    mode = spec.mode if spec.mode != "auto" else base.evaluation.mode
    return metric, known[metric] if mode == "auto" else mode
