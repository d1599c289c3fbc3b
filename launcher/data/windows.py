"""The windows of a run in the order they are streamed: training, and evaluations where they fall due. Pure; anywhere.

Which rows a window holds is told by `order.py`; `stream.py` reads and encodes them.
"""

from dataclasses import dataclass

from launcher.plan import Plan
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


def train_windows(plan: Plan, job: JobSpec, start_step: int) -> list[Window]:
    """Every window from `start_step` on, with the evaluations that fall inside or behind each."""
    windows: list[Window] = []
    for epoch in range(plan.epochs):
        for index in range(-(-plan.steps_per_epoch // plan.window_steps)):
            first = epoch * plan.steps_per_epoch + index * plan.window_steps
            stop = min(first + plan.window_steps, (epoch + 1) * plan.steps_per_epoch, plan.total_steps)
            if stop <= start_step or stop <= first:
                continue
            begin = max(0, start_step - first)
            windows.append(Window(TRAIN, epoch, index, first, begin, stop - first))
            for step in range(first + begin + 1, stop + 1):
                if plan.evaluates_after(step):
                    windows += evaluation_windows(VALIDATION, plan.validation_rows, job, step)
    return windows


def evaluation_windows(split: str, rows: int, job: JobSpec, step: int) -> list[Window]:
    """One pass over a split in file order; the last window says so."""
    size = job.evaluation.batch_size * job.data.window_steps
    count = -(-rows // size)
    return [
        Window(split, 0, i, step, 0, -(-min(size, rows - i * size) // job.evaluation.batch_size), i == count - 1)
        for i in range(count)
    ]
