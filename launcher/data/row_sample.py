"""Samples of a split: some rows for a look at the data, before and beside training. Runs on the client and the head."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from launcher.data.footers import castable
from launcher.data.fragments import Fragment
from launcher.data.sampler import RowIds
from launcher.data.splits import Split, read_rows, small_batches

# Fragments that a sample is taken from. Small ones are decoded whole, so that the sample has rows of all their parts.
_SAMPLED_FRAGMENTS, _WHOLE_BYTES = 8, 32 << 20


def sample_rows(split: Split, columns: Sequence[str], rows: int) -> pa.Table:
    """Return up to `rows` rows of a few fragments that are spread over the split."""
    schema = castable(pa.schema([split.schema.field(name) for name in columns]))
    if not columns:
        return schema.empty_table()
    count = min(_SAMPLED_FRAGMENTS, len(split.fragments))
    # Spread over the split: the first fragments alone may all be of one class.
    chosen = np.unique(np.linspace(0, len(split.fragments) - 1, count).round().astype(int))
    parts = [schema.empty_table()]
    remaining = rows
    reading = small_batches(split)
    for position, index in enumerate(chosen):
        fragment = split.fragments[index]
        wanted = min(fragment.rows, -(-remaining // (len(chosen) - position)))
        remaining -= wanted
        if wanted:
            parts.append(read_rows(fragment, _sampled_rows(fragment, wanted), columns, reading).cast(schema))
    return pa.concat_tables(parts)


def _sampled_rows(fragment: Fragment, rows: int) -> RowIds:
    """Return rows of one fragment: evenly spread if it is small, else the first ones."""
    step = fragment.rows / rows if fragment.size_bytes <= _WHOLE_BYTES else 1.0
    return (np.arange(rows) * step).astype(np.int64)
