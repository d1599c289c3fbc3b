"""The windows of a run in the order they are streamed: training, and evaluations where they fall due. Pure; anywhere.

Which rows a window holds is told by `sampler.py`; `stream.py` reads and encodes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from launcher.rundir.plan import Plan
from launcher.spec.job import JobSpec

TRAIN = "train"
VALIDATION = "validation"


@dataclass(frozen=True)
class Window:
    """One window of the plan: which batches of which rows, and for which step."""

    kind: str
    """`train`, or the split that is evaluated."""
    epoch: int
    index: int
    first_step: int
    """Steps done before the window's first batch; for an evaluation, the step it belongs to."""
    begin: int
    """First batch of the window that is still to do."""
    end: int
    """One past the last batch to do."""
    last: bool = False


FIRST_SEGMENT, NEXT_SEGMENTS = 128, 1024
"""Windows that Ray Data is given at once: few at first, so that the first of them comes soon."""


def windows_of(name: str, rows: int, plan: Plan, job: JobSpec, start: int) -> Iterator[Window]:
    """Yield the windows of a stream.

    Args:
        name: `train`, or the split that is evaluated.
        rows: Of the split.
        plan: Of the run.
        job: Of the run.
        start: Steps done before the training's first window.
    """
    if name == TRAIN:
        return train_windows(plan, job, start)
    return evaluation_windows(name, rows, job, plan.total_steps)


def segments_of(name: str, rows: int, plan: Plan, job: JobSpec, start: int) -> Iterator[list[Window]]:
    """Yield the windows of a stream in lists that are dealt one after the other, at least one; `windows_of`'s Args."""
    windows = windows_of(name, rows, plan, job, start)
    yield list(islice(windows, FIRST_SEGMENT))
    while segment := list(islice(windows, NEXT_SEGMENTS)):
        yield segment


def train_windows(plan: Plan, job: JobSpec, start_step: int) -> Iterator[Window]:
    """Every window from `start_step` on, with the evaluations that fall inside or behind each; one at a time."""
    windows = -(-plan.steps_per_epoch // plan.window_steps)
    first_epoch, behind = divmod(start_step, plan.steps_per_epoch)
    for epoch in range(first_epoch, plan.epochs):
        for index in range(behind // plan.window_steps if epoch == first_epoch else 0, windows):
            first = epoch * plan.steps_per_epoch + index * plan.window_steps
            stop = min(first + plan.window_steps, (epoch + 1) * plan.steps_per_epoch, plan.total_steps)
            if stop <= max(start_step, first):
                return
            begin = max(0, start_step - first)
            yield Window(TRAIN, epoch, index, first, begin, stop - first)
            for step in range(first + begin + 1, stop + 1):
                if plan.evaluates_after(step):
                    yield from evaluation_windows(VALIDATION, plan.validation_rows, job, step)


def evaluation_windows(split: str, rows: int, job: JobSpec, step: int) -> Iterator[Window]:
    """One pass over a split in file order; the last window says so."""
    size = job.evaluation.batch_size * job.data.window_steps
    count = -(-rows // size)
    for i in range(count):
        end = -(-min(size, rows - i * size) // job.evaluation.batch_size)
        yield Window(split, 0, i, step, 0, end, i == count - 1)
