"""Reads ranges of rows of a split, each file from front to back. Runs in a worker of `predict`.

A worker's parts come in rising order, so one open stream serves them all: a row group larger than a part is decoded
once per worker, not from its beginning for every part, and a file of small ones is opened once. Rows of other workers
in between are decoded and dropped, at 1 % or less of the time that a model takes for them; row groups in between are
skipped. Memory is a few pages per column and the rows asked for.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from launcher.data.footers import castable
from launcher.data.splits import BUFFER_BYTES, Reading, Split, read_fragments


class RowReader:
    """Reader of row ranges; cheap as long as they rise.

    Args:
        split: Split to read.
        batch_rows: Number of rows that are decoded at once.
    """

    def __init__(self, split: Split, batch_rows: int) -> None:
        self._split = split
        self._reading = Reading(batch_rows, BUFFER_BYTES)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        # Row ids of the stream's next row and, exclusive, of its end.
        self._position = self._end = 0

    def read(self, rows: range) -> pa.Table:
        """Read rows by id with all columns, in the split's schema.

        Raises:
            DataError: A file cannot be read, or has changed since its footer was read.
        """
        tables: list[pa.Table] = []
        row = rows.start
        while row < rows.stop:
            self._seek(row)
            batch = self._rest if self._rest is not None else next(self._batches)
            skipped = min(row - self._position, batch.num_rows)
            # A slice, no copy. It keeps the whole batch in memory, which is why a batch has no more rows than a piece.
            taken = batch.slice(skipped, rows.stop - row)
            used = skipped + taken.num_rows
            # The rest of the batch is the beginning of the next piece; decoding it again would start at the row group's
            # first row.
            self._rest = batch.slice(used) if used < batch.num_rows else None
            self._position += used
            row += taken.num_rows
            if taken.num_rows:
                tables.append(self._with_split_schema(taken))
        return pa.concat_tables(tables) if tables else castable(self._split.schema).empty_table()

    def _with_split_schema(self, batch: pa.RecordBatch) -> pa.Table:
        # Files of a split may differ in column order and integer or string width.
        return pa.Table.from_batches([batch]).select(self._split.schema.names).cast(castable(self._split.schema))

    def _seek(self, row: int) -> None:
        """Move the stream to a row, or to a batch before it in the same row group."""
        if self._position == row < self._end:
            return
        fragment = self._fragment_of(row)
        if self._position <= row < self._end and fragment == self._fragment_of(self._position):
            return  # in the same row group: the rows in between are decoded and dropped
        # Another file, or past the row group: open at the right row group, which skips those in between without
        # decoding them.
        fragments = self._split.fragments
        last = fragment
        while last + 1 < len(fragments) and fragments[last + 1].path == fragments[fragment].path:
            last += 1
        self._batches = read_fragments(fragments[fragment : last + 1], self._split.schema.names, self._reading)
        self._rest = None
        self._position, self._end = int(self._split.starts[fragment]), int(self._split.starts[last + 1])

    def _fragment_of(self, row: int) -> int:
        return int(np.searchsorted(self._split.starts, row, side="right")) - 1
