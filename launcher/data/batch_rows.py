"""Which rows a step's global batch is made of; asked when its loss is no number. Any worker."""

from launcher.data.sampler import RowIds
from launcher.data.splits import Split
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN, train_windows
from launcher.rundir.plan import Plan
from launcher.spec.job import JobSpec


def read_batch_rows(job: JobSpec, plan: Plan, splits: dict[str, Split], step: int) -> RowIds:
    """Row ids of the batch that follows `step` steps; reads and encodes its window once more.

    Returns:
        int64 (n,), ascending.
    """
    window = next(window for window in train_windows(plan, job, step) if window.kind == TRAIN)
    source = StreamSource(job, splits, 1)
    ids = source.row_ids(window)
    encoded = source.encode(source.task(False), window, ids)
    batch = source.batches(window, len(ids), encoded)[step - window.first_step]
    rows: RowIds = ids[encoded.valid_rows[batch]]
    rows.sort()
    return rows
