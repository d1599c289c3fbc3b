"""Windows of a run in the order in which they are streamed: training, and evaluations where they are due. Pure.

Runs on the head, on data workers and on train workers. `sampler.py` has the rows of a window; `stream.py` reads and
encodes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from launcher.rundir.plan import Plan
from launcher.spec.job import JobSpec

TRAIN = "train"
VALIDATION = "validation"

FIRST_SEGMENT, NEXT_SEGMENTS = 128, 1024
"""Windows per Ray Data dataset. The first segment is short: Ray Data builds all tasks before it runs the first one."""


@dataclass(frozen=True)
class Window:
    """Consecutive global batches of one split that one task reads and encodes."""

    kind: str
    """`train`, or the name of the split that is evaluated."""
    epoch: int
    index: int
    first_step: int
    """Steps completed before the window's first batch; for an evaluation, the step it belongs to."""
    begin: int
    """First batch of the window that is not done yet; above 0 only in the first window after a resume."""
    end: int
    """End of the batches, exclusive."""
    is_last: bool = False
    """True in the last window of an evaluation."""
    first_row: int = 0
    """First row id of an evaluation's window, whose rows are consecutive and of one source."""
    rows: int = 0
    """Number of rows of an evaluation's window."""
    batches: int = 0
    """Number of batches that a training window is cut into; a limit of steps may end the run before the last one."""


def stream_windows(name: str, rows: Sequence[int], plan: Plan, job: JobSpec, start: int) -> Iterator[Window]:
    """Yield the windows of a stream.

    Args:
        name: Name of the stream: `train`, or the split that is evaluated.
        rows: Number of rows of each source of the split; one number without a mixture.
        plan: Plan of the run.
        job: Job of the run.
        start: Steps completed before the first window of training.
    """
    if name == TRAIN:
        return train_windows(plan, job, start)
    return evaluation_windows(name, rows, job, plan.total_steps)


def stream_segments(name: str, rows: Sequence[int], plan: Plan, job: JobSpec, start: int) -> Iterator[list[Window]]:
    """Yield the windows of a stream in lists, at least one list; arguments as in `stream_windows`."""
    # One iterator for all segments: where a segment ends is no place in the order, only in the transport.
    windows = stream_windows(name, rows, plan, job, start)
    # Also an empty list: `DeterministicDataConfig` takes the first segment before anybody knows that nothing is left.
    yield list(islice(windows, FIRST_SEGMENT))
    while segment := list(islice(windows, NEXT_SEGMENTS)):
        yield segment


def train_windows(plan: Plan, job: JobSpec, start_step: int) -> Iterator[Window]:
    """Yield the windows of training from `start_step` on, each followed by the evaluations that are due in it.

    A resumed run starts inside the window of its checkpoint: the window is read and encoded whole, as the batches
    depend on all its rows, and the batches before `begin` are dropped.
    """
    # Windows do not cross epochs. The last one of an epoch may be short, so positions count from the epoch's first
    # step.
    windows = -(-plan.steps_per_epoch // plan.window_steps)
    first_epoch, done_steps = divmod(start_step, plan.steps_per_epoch)
    for epoch in range(first_epoch, plan.epochs):
        for index in range(done_steps // plan.window_steps if epoch == first_epoch else 0, windows):
            first = epoch * plan.steps_per_epoch + index * plan.window_steps
            # A limit of steps cuts `stop`, not the rows of the window: a longer run begins with the same batches.
            batches = min(plan.window_steps, (epoch + 1) * plan.steps_per_epoch - first)
            stop = min(first + batches, plan.total_steps)
            if stop <= max(start_step, first):
                return
            # A checkpoint in the middle of a window resumes there; windows before it are never read again.
            begin = max(0, start_step - first)
            # The training window comes before the evaluations that are due inside of it: a rank holds the whole window
            # while it evaluates. `ShardStream` and this order belong together.
            yield Window(TRAIN, epoch, index, first, begin, stop - first, batches=batches)
            # After `start_step` only: an evaluation at that step was done before its checkpoint was saved.
            for step in range(first + begin + 1, stop + 1):
                if plan.evaluates_after(step):
                    rows = plan.validation_sources or (plan.validation_rows,)
                    yield from evaluation_windows(VALIDATION, rows, job, step)


def training_window(plan: Plan, job: JobSpec, step: int) -> Window:
    """Return the training window with the batch after `step` completed steps, which is the batch at its `begin`."""
    # An evaluation never comes first: those due at `step` belong to the window before.
    return next(train_windows(plan, job, step))


def evaluation_windows(split: str, rows: Sequence[int], job: JobSpec, step: int) -> Iterator[Window]:
    """Yield the windows of one pass over a split, in file order; a window has rows of one source.

    Args:
        split: Name of the split.
        rows: Number of rows of each source; one number without a mixture.
        job: Job of the run.
        step: Steps completed.
    """
    # An evaluation has windows of its own size, as its batch size is another.
    size = job.evaluation_batch_size * job.data.window_steps
    starts = [(first, count) for first, count in zip(accumulate((0, *rows)), rows, strict=False) if count]
    begins = [
        (begin, min(size, first + count - begin))
        for first, count in starts
        for begin in range(first, first + count, size)
    ]
    for index, (begin, count) in enumerate(begins):
        end = -(-count // job.evaluation_batch_size)
        is_last = index == len(begins) - 1
        yield Window(split, 0, index, step, 0, end, is_last, begin, count)
