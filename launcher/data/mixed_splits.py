"""Splits of several sources joined to one, for mixtures. Runs on the client and the head.

`mixture.py` has the shares of the sources.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from launcher.data.fragments import Fragments
from launcher.data.mixture import SourceRows
from launcher.data.sampler import RowIds
from launcher.data.splits import Split, join_numberings, merge_schemas
from launcher.errors import DataError
from launcher.tasks.params import ColumnKind


def mix_splits(
    name: str,
    sources: Sequence[tuple[str, Split]],
    columns: Sequence[Mapping[str, str]],
    kinds: Mapping[str, ColumnKind] | None = None,
) -> Split:
    """Join splits to one whose rows are those of all sources, one source after the other.

    Args:
        name: Name of the joint split.
        sources: Name and split of each source, at least one.
        columns: Columns of each source that its files name differently: {name in the joint split: name in the files}.
        kinds: Columns that the task reads, which all sources must have; None means all columns.

    Raises:
        DataError: Sources disagree on the columns.
    """
    splits = [_renamed(split, mapping) for (_, split), mapping in zip(sources, columns, strict=True)]
    schema = splits[0].schema
    shown = [split.locate(0)[0] for split in splits]
    for path, split in zip(shown[1:], splits[1:], strict=True):
        schema = merge_schemas(shown[0], schema, path, split.schema, kinds)
    present = dict.fromkeys(column for split in splits for column in (*split.left_out, *split.schema.names))
    numberings = tuple(numbering for split in splits for numbering in split.numberings)
    first_rows = accumulate((split.rows for split in splits), initial=0)
    first_fragments = accumulate((len(split.fragments) for split in splits), initial=0)
    return Split(
        name,
        _join_fragments(splits, columns),
        schema,
        fingerprint=_hash([(source, split.fingerprint) for source, split in sources]),
        class_names=tuple(join_numberings(numberings).items()),
        left_out=tuple(column for column in present if column not in schema.names),
        numberings=numberings,
        # With the columns: caches hold what was read through them.
        version=_hash(
            [
                (source, split.version, sorted(own.items()))
                for (source, split), own in zip(sources, columns, strict=True)
            ]
        ),
        sources=tuple(
            SourceRows(source, first_row, split.rows, first_fragment, len(split.fragments), split.fingerprint)
            for (source, split), first_row, first_fragment in zip(sources, first_rows, first_fragments, strict=False)
        ),
    )


def _hash(identity: object) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _join_fragments(splits: Sequence[Split], columns: Sequence[Mapping[str, str]]) -> Fragments:
    """Return the fragments of all sources, one source after the other; `columns` as in `mix_splits`."""
    tables: list[pa.Table] = []
    file: list[RowIds] = []
    first_file = first_numbering = 0
    for index, split in enumerate(splits):
        table = split.fragments.files
        numbering = pc.add(table.column("numbering"), first_numbering).cast(pa.int32())
        table = table.set_column(table.column_names.index("numbering"), "numbering", numbering)
        tables.append(table.append_column("source", pa.array(np.full(len(table), index, np.int32))))
        file.append(split.fragments.file + first_file)
        first_file += len(table)
        first_numbering += len(split.numberings)
    # A source whose folders hold no columns has no `partition`: its files get an empty one.
    files = pa.concat_tables(tables, promote_options="default")
    if "partition" in files.column_names:
        partition = pc.fill_null(files.column("partition"), "")
        files = files.set_column(files.column_names.index("partition"), "partition", partition)
    parts = [split.fragments for split in splits]
    return Fragments(
        files,
        file=np.concatenate(file),
        place=np.concatenate([part.place for part in parts]),
        file_row=np.concatenate([part.file_row for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        size_bytes=np.concatenate([part.size_bytes for part in parts]),
        columns=tuple(columns),
    )


def _renamed(split: Split, columns: Mapping[str, str]) -> Split:
    """Return a split whose columns have the names that the task reads.

    Raises:
        DataError: The files lack a column, or already have one of the new name.
    """
    shown, names = split.locate(0)[0], split.schema.names
    for new, old in columns.items():
        if old not in names:
            raise DataError(f"{shown}: has no column {old!r}, which data.mixture names; it has {', '.join(names)}")
        if new in names and new not in columns.values() and new != old:
            raise DataError(f"{shown}: already has a column {new!r}, which data.mixture takes from {old!r}; drop one")
    # The task may read one column of the files as two.
    new_names = {old: [new for new, source in columns.items() if source == old] for old in names}
    schema = pa.schema(
        [field.with_name(new) for field in split.schema for new in new_names[field.name] or [field.name]]
    )
    numberings = tuple(
        {new: values for column, values in own.items() for new in new_names.get(column) or [column]}
        for own in split.numberings
    )
    return replace(split, schema=schema, numberings=numberings)
