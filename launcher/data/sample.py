"""A few rows of a split, for looking at them, and how little of it is held meanwhile. Client and head."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launcher.data.fragments import Fragment
from launcher.data.sampler import RowIds
from launcher.data.splits import Reading, Split, read_rows
from launcher.rundir.uri import open_uri

_FRAGMENTS = 8
# Row groups of up to this size are decoded whole, so that the sample is spread over their rows too.
_WHOLE_BYTES = 32 << 20
_BATCH_BYTES = 4 << 20
BUFFER_BYTES = 1 << 20
"""Of a read; whole columns are never held, as a row group of pictures may have gigabytes."""


def schema_of(split: Split) -> pa.Schema:
    """The schema of the split's first file, with the metadata that `datasets` and pandas leave there."""
    fragment = split.fragments[0]
    fs, path = open_uri(fragment.path)
    with fs.open_input_file(path) as stream:
        if fragment.format == "parquet":
            return pq.read_schema(stream)
        return pa.ipc.open_file(stream).schema


def first_rows(split: Split) -> Reading:
    """As many rows at once as make a batch of a few MiB."""
    return Reading(max(1, min(16384, int(_BATCH_BYTES / row_bytes(split)))), BUFFER_BYTES)


def row_bytes(split: Split) -> float:
    """What a row takes on average, uncompressed."""
    return max(1.0, float(split.fragments.size_bytes.sum()) / split.rows)


def sample(split: Split, columns: Sequence[str], rows: int) -> pa.Table:
    """Up to `rows` rows of a few fragments that are spread over the split.

    Args:
        split: what to read of.
        columns: what to read.
        rows: how many rows at most.
    """
    schema = pa.schema([split.schema.field(name) for name in columns])
    if not columns:
        return schema.empty_table()
    count = min(_FRAGMENTS, len(split.fragments))
    chosen = np.unique(np.linspace(0, len(split.fragments) - 1, count).round().astype(int))
    parts, left, how = [schema.empty_table()], rows, first_rows(split)
    for position, index in enumerate(chosen):
        fragment = split.fragments[index]
        share = min(fragment.rows, -(-left // (len(chosen) - position)))
        left -= share
        if share:
            parts.append(read_rows(fragment, _spread(fragment, share), columns, how).cast(schema))
    return pa.concat_tables(parts)


def _spread(fragment: Fragment, rows: int) -> RowIds:
    """Some rows of one fragment: spread evenly where it is small, else the first."""
    step = fragment.rows / rows if fragment.size_bytes <= _WHOLE_BYTES else 1.0
    return (np.arange(rows) * step).astype(np.int64)
