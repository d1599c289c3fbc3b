"""Splits of several sources joined to one, for mixtures. Runs on the client and the head.

`mixture.py` has the shares of the sources.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from launcher.data.fragments import ClassNames, Fragments
from launcher.data.mixture import SourceRows
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
    renamed = [_renamed(split, mapping) for (_, split), mapping in zip(sources, columns, strict=True)]
    schema = renamed[0].schema
    shown = [split.locate(0)[0] for split in renamed]
    for path, split in zip(shown[1:], renamed[1:], strict=True):
        schema = merge_schemas(shown[0], schema, path, split.schema, kinds)
    numberings: list[ClassNames] = []
    parts: list[Fragments] = []
    rows: list[SourceRows] = []
    first_row = first_file = first_fragment = 0
    for index, ((source, _), split) in enumerate(zip(sources, renamed, strict=True)):
        own = split.fragments
        files = own.files
        numbering = pc.add(files.column("numbering"), len(numberings)).cast(pa.int32())
        files = files.set_column(files.column_names.index("numbering"), "numbering", numbering)
        files = files.append_column("source", pa.array(np.full(len(files), index, np.int32)))
        parts.append(replace(own, files=files, file=own.file + first_file))
        rows.append(SourceRows(source, first_row, split.rows, first_fragment, len(own), split.fingerprint))
        numberings += split.numberings
        first_row, first_file, first_fragment = (
            first_row + split.rows,
            first_file + len(files),
            first_fragment + len(own),
        )
    # A source whose folders hold no columns has no `partition`: its files get an empty one.
    files = pa.concat_tables([part.files for part in parts], promote_options="default")
    if "partition" in files.column_names:
        partition = pc.fill_null(files.column("partition"), "")
        files = files.set_column(files.column_names.index("partition"), "partition", partition)
    identity = repr([(source, split.fingerprint, split.version) for source, split in sources])
    return Split(
        name,
        Fragments(
            files,
            file=np.concatenate([part.file for part in parts]),
            place=np.concatenate([part.place for part in parts]),
            file_row=np.concatenate([part.file_row for part in parts]),
            rows=np.concatenate([part.rows for part in parts]),
            size_bytes=np.concatenate([part.size_bytes for part in parts]),
            columns=tuple(columns),
        ),
        schema,
        hashlib.sha256(repr([(source, split.fingerprint) for source, split in sources]).encode()).hexdigest(),
        tuple(join_numberings(numberings).items()),
        tuple(
            dict.fromkeys(
                field
                for split in renamed
                for field in (*split.left_out, *split.schema.names)
                if field not in schema.names
            )
        ),
        tuple(numberings),
        hashlib.sha256(identity.encode()).hexdigest(),
        tuple(rows),
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
    new_name = {old: new for new, old in columns.items()}
    schema = pa.schema([field.with_name(new_name.get(field.name, field.name)) for field in split.schema])
    numberings = tuple(
        {new_name.get(column, column): values for column, values in own.items()} for own in split.numberings
    )
    return replace(split, schema=schema, numberings=numberings)
