"""What a mixture means for a run: steps of an epoch, epochs of each source, and weights in rows. Client and head."""

import numpy as np

from launcher.data.mixture import cumulative_rows, steps_per_epoch, weights_of
from launcher.data.splits import Split
from launcher.errors import DataError
from launcher.formatting import format_percent
from launcher.rundir.plan import count_batches
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.tasks.results import MetricMode

_SAMPLE_PLACES, _SAMPLE_ROWS = 4, 64
"""Places of each source whose rows are measured, and rows at each."""


def count_epoch_steps(job: JobSpec, train: Split) -> int:
    """Return the number of optimizer steps of an epoch.

    Raises:
        DataError: A source of the mixture is too small for a batch, or an epoch would be too long.
    """
    if job.data.mixture is None:
        return count_batches(train.rows, job.train.batch_size)
    names = [source.name for source in train.sources]
    weights = weights_of([*job.data.mixture.values()])
    return steps_per_epoch(weights, job.train.batch_size, train.source_rows, names, job.data.until)


def metric_modes(task: Task, validation: Split | None) -> dict[str, MetricMode]:
    """Return the direction of each metric, the main one first: of the whole split, and of each source of a mixture."""
    modes: dict[str, MetricMode] = {**task.metric_modes, "loss": "min"}
    sources = () if validation is None else validation.sources
    return modes | {f"{source.name}/{name}": mode for source in sources for name, mode in modes.items()}


def mixture_notes(job: JobSpec, train: Split, total_steps: int) -> list[str]:
    """Return a note on the share and the effective epochs of each source, and on rows that are never read."""
    if job.data.mixture is None:
        return []
    weights = weights_of([*job.data.mixture.values()])
    taken = cumulative_rows(weights, job.train.batch_size, total_steps)[-1]
    lines = [
        f"{source.name} {format_percent(count / taken.sum())} of the rows, {count / source.rows:.2f} epochs"
        for source, count in zip(train.sources, taken.tolist(), strict=True)
    ]
    notes = [f"data.mixture: {'; '.join(lines)}"]
    notes += [
        f"data.mixture.{source.name}: {source.rows - count} of its {source.rows} rows are not read; train longer, or "
        "set data.until: repeat"
        for source, count in zip(train.sources, taken.tolist(), strict=True)
        # Of a run with a limit of steps nobody expects more.
        if count < source.rows and job.train.max_steps is None
    ]
    return notes


def with_row_weights(job: JobSpec, task: Task, train: Split) -> JobSpec:
    """Return the job with weights in rows: those in tokens are divided by the mean length of a source's rows.

    Raises:
        DataError: No row of a source's sample can be used.
    """
    if job.data.mixture is None or job.data.weight_unit == "rows":
        return job
    mixture = {}
    for source, (name, spec) in zip(train.sources, job.data.mixture.items(), strict=True):
        count = min(_SAMPLE_ROWS, source.rows)
        begins = np.linspace(0, source.rows - count, _SAMPLE_PLACES).astype(np.int64)
        ids = source.first_row + np.unique((begins[:, None] + np.arange(count)).ravel())
        lengths = task.encode(train.read(ids, task.input_columns + task.target_columns), True).lengths
        if not len(lengths):
            raise DataError(f"data.mixture.{name}: none of the {len(ids)} rows looked at can be used; fix its rows")
        mean = float(lengths.mean())
        weight = spec.weight
        # Rounded: these weights are written into job.yaml, and a resumed run must find the same ones.
        in_rows = (
            {k: round(w / mean, 9) for k, w in weight.items()} if isinstance(weight, dict) else round(weight / mean, 9)
        )
        mixture[name] = spec.model_copy(update={"weight": in_rows})
    data = job.data.model_copy(update={"mixture": mixture, "weight_unit": "rows"})
    return job.model_copy(update={"data": data})
