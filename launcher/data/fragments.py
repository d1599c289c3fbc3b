"""Fragments: what is read together, a Parquet row group or an Arrow record batch. Any process.

A split of a hundred thousand files travels to every worker and task, so fragments are columns of numbers that pickle
as they lie in memory; a `Fragment` is made when one is asked for. Read `splits.py` next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa

from launcher.data.sampler import RowIds

ClassNames = Mapping[str, tuple[str, ...]]
"""By column: names of its integers, which count from 0."""


@dataclass(frozen=True)
class Fragment:
    """Rows that are read together: one row group or record batch."""

    path: str
    format: str
    index: int
    """Which row group or record batch of the file."""
    file_row: int
    """The fragment's first row within its file."""
    rows: int
    size_bytes: int
    """Uncompressed."""
    origin: str = ""
    """What the file was converted from (`convert.py`), for messages; empty where it is the user's own."""
    partition: str = ""
    """JSON of the columns that the file's folders tell, with their values; empty where they tell none."""
    names: ClassNames = field(default_factory=dict)
    """Of the columns whose integers are read as names."""


@dataclass(frozen=True, eq=False)
class Fragments(Sequence[Fragment]):
    """The fragments of a split, files in order.

    Args:
        files: path, format, origin and, where folders tell columns, partition of each file, columns of strings, and
            `numbering`, which of the numberings of classes it has.
        file: which file each fragment is of, int64 (fragments,).
        place: which row group or record batch of the file.
        file_row: its first row within its file.
        rows: how many it has.
        size_bytes: uncompressed.
        names: Columns that are read as names, and these, for each numbering; () reads integers as they are.
    """

    files: pa.Table
    file: RowIds
    place: RowIds
    file_row: RowIds
    rows: RowIds
    size_bytes: RowIds
    names: tuple[ClassNames, ...] = ()

    @staticmethod
    def of(files: pa.Table, counts: RowIds, rows: RowIds, size_bytes: RowIds) -> "Fragments":
        """From what footers say; fragments without rows are left out.

        Args:
            files: as above.
            counts: fragments of each file, int64 (files,).
            rows: of all fragments, files in order.
            size_bytes: of all fragments.
        """
        begins = np.repeat(np.cumsum(counts) - counts, counts)
        behind = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        whole = Fragments(
            files,
            np.repeat(np.arange(len(counts), dtype=np.int64), counts),
            np.arange(len(rows), dtype=np.int64) - begins,
            behind[:-1] - behind[begins],
            rows,
            size_bytes,
        )
        return whole if bool((rows > 0).all()) else whole.some(np.flatnonzero(rows))

    def some(self, chosen: RowIds) -> "Fragments":
        """The fragments at some places, in that order."""
        columns = ("file", "place", "file_row", "rows", "size_bytes")
        return replace(self, **{column: getattr(self, column)[chosen] for column in columns})

    def named(self, names: tuple[ClassNames, ...]) -> "Fragments":
        """Return the same, some columns of which are read as names: those of each numbering."""
        return replace(self, names=names)

    @cached_property
    def starts(self) -> RowIds:
        """First row id of each fragment, and the number of rows behind them: (fragments + 1,)."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Fragment: ...
    @overload
    def __getitem__(self, index: slice) -> "Fragments": ...
    def __getitem__(self, index: "int | slice") -> "Fragment | Fragments":
        if isinstance(index, slice):
            return self.some(np.arange(len(self))[index])
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
        )
