"""Rows of a split by range, each file from front to back. Runs in a worker of `predict`.

A worker's parts come in rising order, so one open stream per worker serves them all: a row group that is larger than a
part is decoded once per worker and not from its beginning for every part, and a small one is no file opened again. Rows
of other workers in between are decoded and dropped: a hundredth, or less, of what a model takes for them. Row groups in
between are not touched. Memory is a few pages per column and the rows asked for.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launcher.data.footers import plain
from launcher.data.fragments import Fragment
from launcher.data.splits import Reading, Split, own_columns, read_batches, unreadable_file_error, with_partition
from launcher.errors import RowCountError
from launcher.rundir.uri import open_uri

# Of each column, read at once; a whole column chunk of a large row group would be gigabytes.
_BUFFER_BYTES = 1 << 20


class RowReader:
    """Reads ranges of rows; cheap as long as they rise.

    Args:
        split: whose rows.
        rows_at_once: decoded at once.
    """

    def __init__(self, split: Split, rows_at_once: int) -> None:
        self._split, self._how = split, Reading(rows_at_once, _BUFFER_BYTES)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        # Row ids: of the next row of the stream, and behind its last.
        self._at = self._end = 0

    def read(self, rows: range) -> pa.Table:
        """Rows by id with all columns, in the split's schema.

        Raises:
            DataError: a file cannot be read.
            RowCountError: a file has other rows than its footer said.
        """
        found: list[pa.Table] = []
        at = rows.start
        while at < rows.stop:
            self._seek(at)
            batch = self._next_batch()
            skipped = min(at - self._at, batch.num_rows)
            taken = batch.slice(skipped, rows.stop - at)
            used = skipped + taken.num_rows
            self._rest = batch.slice(used) if used < batch.num_rows else None
            self._at += used
            at += taken.num_rows
            if taken.num_rows:
                found.append(self._as_split(taken))
        return pa.concat_tables(found) if found else self._split.schema.empty_table()

    def _as_split(self, batch: pa.RecordBatch) -> pa.Table:
        # One type and one order of the columns, whatever file a row is from.
        return pa.Table.from_batches([batch]).select(self._split.schema.names).cast(self._split.schema)

    def _seek(self, row: int) -> None:
        """Make the stream reach a row without decoding what can be left out."""
        if self._at == row < self._end:
            return
        owner = self._owner(row)
        if self._at <= row < self._end and owner == self._owner(self._at):
            return  # further on in the same row group: the rows in between are decoded and dropped
        fragments = self._split.fragments
        last = owner
        while last + 1 < len(fragments) and fragments[last + 1].path == fragments[owner].path:
            last += 1
        self._batches = _stream(fragments[owner : last + 1], self._split.schema.names, self._how)
        self._rest = None
        self._at, self._end = int(self._split.starts[owner]), int(self._split.starts[last + 1])

    def _owner(self, row: int) -> int:
        return int(np.searchsorted(self._split.starts, row, side="right")) - 1

    def _next_batch(self) -> pa.RecordBatch:
        if self._rest is not None:
            return self._rest
        batch = next(self._batches, None)
        if batch is None:
            path = self._split.fragments[self._owner(self._at)].path
            raise RowCountError(f"{path}: has fewer rows than its footer said; did it change while it was read?")
        return batch


def _stream(fragments: Sequence[Fragment], names: Sequence[str], how: Reading) -> Iterator[pa.RecordBatch]:
    """All rows of consecutive fragments of one file, in order."""
    if fragments[0].format != "parquet":
        for fragment in fragments:
            yield from read_batches(fragment, names, how)
        return
    path = fragments[0].path
    try:
        fs, inner = open_uri(path)
        with fs.open_input_file(inner) as source:
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=how.buffer_bytes)
            groups = [fragment.index for fragment in fragments]
            own = own_columns(fragments[0], file.schema_arrow, names)
            batches = file.iter_batches(how.rows_at_once, row_groups=groups, columns=own, use_threads=False)
            yield from with_partition(map(plain, batches), fragments[0], names)
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable_file_error(path, error) from error
