"""Fragments: the units that are read together, a Parquet row group or an Arrow record batch. Runs anywhere.

A split of 100,000 files is sent to every worker and every task, so its fragments are columns of numbers, which pickle
fast; a `Fragment` object is built on access. Read `splits.py` next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa

from launcher.data.sampler import RowIds
from launcher.rundir.uri import redact_uri

ClassNames = Mapping[str, tuple[str, ...]]
"""Names of the integers (from 0) of each numbered column."""


@dataclass(frozen=True)
class Fragment:
    """One row group or record batch."""

    path: str
    format: str
    index: int
    """Position of the row group or record batch in its file."""
    file_row: int
    """Position of the fragment's first row in its file."""
    rows: int
    size_bytes: int
    """Uncompressed size."""
    origin: str = ""
    """File that the user named and `convert.py` converted, for messages; empty for a file that was not converted."""
    partition: str = ""
    """JSON of the columns in the names of the file's folders, with their values; empty if there are none."""
    names: ClassNames = field(default_factory=dict)
    """Class names of the integer columns that are read as names."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names in the file of the columns that the split names differently."""


# No equality by value: comparing arrays gives arrays, not a truth value. Caches compare a split's fingerprint or
# version.
@dataclass(frozen=True, eq=False)
class Fragments(Sequence[Fragment]):
    """Fragments of a split, files in order.

    Args:
        files: Path, format, origin and, if folders hold columns, partition of each file, as columns of strings, and
            `numbering`, the index of the file's class numbering; in a mixture `source`, the index of its source.
        file: Index of the file of each fragment, int64 (fragments,).
        place: Position of each fragment in its file.
        file_row: Position of each fragment's first row in its file.
        rows: Number of rows of each fragment.
        size_bytes: Uncompressed size of each fragment.
        names: Columns that are read as names, with these names, for each numbering; () reads integers.
        columns: Columns of each source of a mixture that its files name differently; () outside of mixtures.
    """

    files: pa.Table
    file: RowIds
    place: RowIds
    file_row: RowIds
    rows: RowIds
    size_bytes: RowIds
    names: tuple[ClassNames, ...] = ()
    columns: tuple[Mapping[str, str], ...] = ()

    @staticmethod
    def of(files: pa.Table, counts: RowIds, rows: RowIds, size_bytes: RowIds) -> "Fragments":
        """Build the fragments that footers describe, without those that have no rows.

        Args:
            files: Table of the files, as in `Fragments`.
            counts: Number of fragments of each file, int64 (files,).
            rows: Number of rows of every fragment, files in order.
            size_bytes: Uncompressed size of every fragment.
        """
        # Arrays, not a loop: large data have millions of fragments.
        begins = np.repeat(np.cumsum(counts) - counts, counts)
        row_ends = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        fragments = Fragments(
            files,
            np.repeat(np.arange(len(counts), dtype=np.int64), counts),
            np.arange(len(rows), dtype=np.int64) - begins,
            row_ends[:-1] - row_ends[begins],
            rows,
            size_bytes,
        )
        # Dropped only now: `place` and `file_row` count a file's fragments with the empty ones, as its footer does.
        return fragments if bool((rows > 0).all()) else fragments.select(np.flatnonzero(rows))

    def select(self, positions: RowIds) -> "Fragments":
        """Return the fragments at some positions, in that order."""
        columns = ("file", "place", "file_row", "rows", "size_bytes")
        return replace(self, **{column: getattr(self, column)[positions] for column in columns})

    @cached_property
    def starts(self) -> RowIds:
        """First row id of each fragment, then the number of rows: int64 (fragments + 1,)."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    def shown_name(self, file: int) -> str:
        """Return the name that the user knows a file of `files` by, without the keys that a URI may hold."""
        return redact_uri(str(self.files.column("origin")[file]) or str(self.files.column("path")[file]))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Fragment: ...
    @overload
    def __getitem__(self, index: slice) -> "Fragments": ...
    def __getitem__(self, index: "int | slice") -> "Fragment | Fragments":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        # Plain integers, as `json` does not take NumPy's.
        file = int(self.file[index])
        path, format, origin = (str(self.files.column(name)[file]) for name in ("path", "format", "origin"))
        partition = str(self.files.column("partition")[file]) if "partition" in self.files.column_names else ""
        return Fragment(
            path,
            format,
            index=int(self.place[index]),
            file_row=int(self.file_row[index]),
            rows=int(self.rows[index]),
            size_bytes=int(self.size_bytes[index]),
            origin=origin,
            partition=partition,
            names=self.names[int(self.files.column("numbering")[file])] if self.names else {},
            columns=self.columns[int(self.files.column("source")[file])] if self.columns else {},
        )
