"""What is in the data: a sample of rows of a split as typed facts, and the counts of its labels. Runs on the client.

Reads footers, a few thousand rows at most, and the label column; read `guess.py` next for what is made of it.
"""

import difflib
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from launcher.data.splits import (
    BUFFER_BYTES,
    Reading,
    Split,
    hub_features,
    read_batches,
    row_bytes,
    sample,
    schema_of,
)
from launcher.errors import DataError
from launcher.init.columns import Column, describe_column, is_heavy
from launcher.tasks.padding import whole_numbers

_ROWS = 2000
_BYTES = 64 << 20
_HEAVY_ROWS = 16
_LISTED = 12
# Labels beyond these rows are not counted: they would tell nothing new about how rare a class is.
_COUNTED_ROWS = 5_000_000
_COUNTING = Reading(65536, BUFFER_BYTES)


@dataclass(frozen=True)
class DataProfile:
    """What is known of a split."""

    where: str
    """Where it is, as the user wrote it."""
    rows: int
    columns: tuple[Column, ...]
    row_bytes: float = 0.0
    """What a row takes on average, uncompressed."""

    def column(self, name: str, flag: str = "--text") -> Column:
        """A column by its name.

        Raises:
            DataError: there is none.
        """
        found = next((column for column in self.columns if column.name == name), None)
        if found is not None:
            return found
        names = [column.name for column in self.columns]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:_LISTED])}"
        raise DataError(f"{flag} {name}: {self.where} has no such column; {hint}")

    def named(self, text: str) -> tuple[str, ...]:
        """Column names in what the user wrote: a name, or several with commas between them."""
        whole = any(column.name == text for column in self.columns)
        return (text,) if whole else tuple(name.strip() for name in text.split(",") if name.strip())

    def listed(self) -> str:
        """All columns with their types, for messages."""
        more = f" and {len(self.columns) - _LISTED} more" if len(self.columns) > _LISTED else ""
        return ", ".join(column.said() for column in self.columns[:_LISTED]) + more


@dataclass(frozen=True)
class Labels:
    """How often each label occurs in a split."""

    counts: tuple[tuple[str, int], ...]
    """The most frequent first; empty where labels are numbers or spans."""
    rows: int
    """Rows that were counted."""
    nulls: int
    """Of them without a label."""


def profile_data(split: Split, where: str) -> DataProfile:
    """Read a sample of a split and describe its columns.

    Args:
        split: its training data.
        where: what to call it in messages.
    """
    names = split.schema.names
    told = hub_features(schema_of(split)).items()
    features = {name: str(one["_type"]) for name, one in told if isinstance(one, dict) and "_type" in one}
    classes = dict(split.class_names)
    heavy = [name for name in names if is_heavy(split.schema.field(name).type)]
    size = row_bytes(split)
    rows = min(split.rows, _ROWS if heavy else max(32, min(_ROWS, int(_BYTES / size))))
    light = sample(split, [name for name in names if name not in heavy], rows)
    content = sample(split, heavy, min(split.rows, _HEAVY_ROWS))
    columns = [
        describe_column(
            name, (content if name in heavy else light).column(name), features.get(name, ""), classes.get(name, ())
        )
        for name in names
    ]
    return DataProfile(where, split.rows, tuple(columns), size)


def count_labels(split: Split, column: str) -> Labels:
    """Count the labels of a split: values, or the items of lists.

    Args:
        split: what to read of.
        column: the labels.
    """
    found: Counter[object] = Counter()
    rows = nulls = 0
    names = dict(split.class_names).get(column)
    for fragment in (split.named({column: names}) if names else split).fragments:
        for batch in read_batches(fragment, [column], _COUNTING):
            values = batch.column(0)
            rows, nulls = rows + len(values), nulls + _unusable(values)
            found.update(_counts(values))
        if rows >= _COUNTED_ROWS:
            break
    return Labels(tuple((str(value), count) for value, count in found.most_common()), rows, nulls)


def _unusable(values: pa.Array) -> int:
    nan = pc.sum(pc.is_nan(values)).as_py() if pa.types.is_floating(values.type) else 0
    return int(values.null_count + (nan or 0))


def _counts(values: pa.Array) -> dict[object, int]:
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pc.list_flatten(values)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    values = whole_numbers(values)
    if pa.types.is_nested(values.type) or pa.types.is_floating(values.type):
        return {}
    counted = pc.value_counts(values).to_pylist()
    return {entry["values"]: entry["counts"] for entry in counted if entry["values"] is not None}
