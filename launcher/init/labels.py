"""Counts of the labels of a split. Runs on the client; reads the label column alone."""

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from launcher.data.splits import BUFFER_BYTES, Reading, Split, read_batches
from launcher.tasks.padding import floats_to_integers
from launcher.tasks.params import is_list

# Counting stops here: more rows would not change the class frequencies noticeably.
_COUNTED_ROWS = 5_000_000
_COUNTING = Reading(65536, BUFFER_BYTES)


@dataclass(frozen=True)
class Labels:
    """Frequency of each label in a split."""

    counts: tuple[tuple[str, int], ...]
    """Labels with their counts, most frequent first; empty if labels are numbers or spans."""
    rows: int
    """Counted rows."""
    nulls: int
    """Rows without a label."""


def count_labels(split: Split, column: str) -> Labels:
    """Count the labels of a split: values, or the items of lists."""
    # Memory grows with the distinct values alone: each batch is counted in Arrow.
    counter: Counter[object] = Counter()
    rows = nulls = 0
    names = dict(split.class_names).get(column)
    for fragment in (split.with_named_classes({column: names}) if names else split).fragments:
        for batch in read_batches(fragment, [column], _COUNTING):
            values = batch.column(0)
            rows += len(values)
            nulls += _count_missing(values)
            counter.update(_count_values(values))
        if rows >= _COUNTED_ROWS:
            break
    return Labels(tuple((str(value), count) for value, count in counter.most_common()), rows, nulls)


def _count_missing(values: pa.Array) -> int:
    if is_list(values.type):
        # A run refuses a list that holds a null, as it does a null.
        holes = pc.list_parent_indices(values).filter(pc.is_null(pc.list_flatten(values)))
        return int(values.null_count + pc.count_distinct(holes).as_py())
    # pandas writes a missing number as NaN, which is no null in Arrow.
    nan = pc.sum(pc.is_nan(values)).as_py() if pa.types.is_floating(values.type) else 0
    return int(values.null_count + (nan or 0))


def _count_values(values: pa.Array) -> dict[object, int]:
    if is_list(values.type):
        values = pc.list_flatten(values)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    values = floats_to_integers(values)
    # Spans, or numbers with a fraction: there would be about one entry per row.
    if pa.types.is_nested(values.type) or pa.types.is_floating(values.type):
        return {}
    counted = pc.value_counts(values).to_pylist()
    return {entry["values"]: entry["counts"] for entry in counted if entry["values"] is not None}
