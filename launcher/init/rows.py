"""Rows of a split in small batches, for looking at a few of them and for cutting them in two. Runs on the client."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launcher.data.files import first_line
from launcher.data.sources import Fragment, Split
from launcher.errors import DataError
from launcher.rundir import open_uri

_FRAGMENTS = 8
# Row groups of up to this size are decoded whole, so that the sample is spread over their rows too.
_WHOLE_BYTES = 32 << 20
_BATCH_BYTES = 4 << 20
# Pages are read as they are needed: a row group of pictures may hold gigabytes.
_BUFFER_BYTES = 1 << 20


def schema_of(split: Split) -> pa.Schema:
    """The schema of the split's first file, with the metadata that `datasets` and pandas leave there."""
    fragment = split.fragments[0]
    fs, path = open_uri(fragment.path)
    with fs.open_input_file(path) as stream:
        if fragment.format == "parquet":
            return pq.read_schema(stream)
        return pa.ipc.open_file(stream).schema


def batches(fragment: Fragment, columns: Sequence[str], at_once: int) -> Iterator[pa.RecordBatch]:
    """All rows of a fragment, a few at a time.

    Raises:
        DataError: the file cannot be read.
    """
    fs, path = open_uri(fragment.path)
    try:
        with fs.open_input_file(path) as stream:
            if fragment.format == "parquet":
                file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES)
                yield from file.iter_batches(
                    at_once, row_groups=[fragment.index], columns=list(columns), use_threads=False
                )
                return
            batch = pa.ipc.open_file(stream).get_batch(fragment.index).select(list(columns))
            yield from (batch.slice(begin, at_once) for begin in range(0, batch.num_rows, at_once))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{fragment.path}: cannot be read ({first_line(error)}); restore the file") from error


def rows_at_once(split: Split) -> int:
    """As many rows as make a batch of a few MiB."""
    return max(1, min(16384, int(_BATCH_BYTES / row_bytes(split))))


def row_bytes(split: Split) -> float:
    """What a row takes on average, uncompressed."""
    return max(1.0, sum(f.size_bytes for f in split.fragments) / split.rows)


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
    parts, left = [], rows
    for position, index in enumerate(chosen):
        fragment = split.fragments[index]
        share = min(fragment.rows, -(-left // (len(chosen) - position)))
        parts.append(_spread(fragment, schema, share, rows_at_once(split)))
        left -= share
    return pa.concat_tables(parts)


def _spread(fragment: Fragment, schema: pa.Schema, rows: int, at_once: int) -> pa.Table:
    """Some rows of one fragment: spread evenly where it is small, else the first."""
    step = fragment.rows / rows if fragment.size_bytes <= _WHOLE_BYTES else 1.0
    wanted = (np.arange(rows) * step).astype(np.int64)
    parts, seen = [], 0
    for batch in batches(fragment, schema.names, min(at_once, fragment.rows)):
        low, high = np.searchsorted(wanted, [seen, seen + batch.num_rows])
        if high > low:
            parts.append(pa.Table.from_batches([batch.take(pa.array(wanted[low:high] - seen))]).cast(schema))
        seen += batch.num_rows
        if high == rows:
            break
    return pa.concat_tables(parts) if parts else schema.empty_table()
