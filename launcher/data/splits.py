"""Splits: data files as fragments, described by their footers alone. Runs on the client, the head and data workers.

A row id is the position of a row in its split, files in order; everything else about order is `sampler.py`. Files
without footers (CSV, JSON) pass through `convert.py` first. Read `sampler.py` and `stream.py` next.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any  # JSON of another library

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from launcher.data.files import DataFile, first_line, is_integer, list_files
from launcher.data.footers import (
    Footer,
    OnProgress,
    arrow_reader,
    castable,
    distinct_schemas,
    read_footers,
    to_plain_types,
)
from launcher.data.fragments import ClassNames, Fragment, Fragments
from launcher.data.mixture import SourceRows
from launcher.data.sampler import RowIds
from launcher.errors import DataError, UserError
from launcher.rundir.uri import is_transient, open_uri, storage_error
from launcher.tasks.params import ColumnKind, is_list, item_type

_BATCH_BYTES = 4 << 20
BUFFER_BYTES = 1 << 20
"""Read buffer for a look at the data: a column of a row group of pictures may have gigabytes."""


@dataclass(frozen=True)
class Reading:
    """Limits on how much of a fragment is in memory at once."""

    rows_at_once: int = 16384
    buffer_bytes: int = 0
    """Size of the buffer that pages are read through; 0 reads a whole column chunk first."""


READING = Reading()
"""Fastest way to read a window."""


@dataclass(frozen=True)
class Split:
    """All fragments of one split, their schema, and the fingerprint of the data."""

    name: str
    fragments: Fragments
    schema: pa.Schema
    fingerprint: str
    """Hash of the relative paths, and of the rows and bytes of each fragment. The order of training depends on it, so
    absolute paths and modification times are left out of it: moving or copying files keeps the order."""
    class_names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Columns whose integers are classes with names, by the files' Hugging Face metadata."""
    left_out: tuple[str, ...] = ()
    """Columns that the task does not read and that not all files have with one type."""
    numberings: tuple[ClassNames, ...] = ({},)
    """Distinct class numberings of the files' own metadata; `class_names` joins them, the first file's names first."""
    version: str = ""
    """Hash of paths, sizes and modification times, and of a mixture's columns. Changes with any file; for caches."""
    sources: tuple[SourceRows, ...] = ()
    """Sources of a mixture, in row order; () for data without."""

    @property
    def starts(self) -> RowIds:
        """First row id of each fragment, then the number of rows: int64 (fragments + 1,)."""
        return self.fragments.starts

    @property
    def rows(self) -> int:
        """Number of rows, by the footers."""
        return int(self.starts[-1])

    @property
    def source_rows(self) -> tuple[int, ...]:
        """Number of rows of each source; of all rows without a mixture."""
        return tuple(source.rows for source in self.sources) or (self.rows,)

    def locate(self, row: int) -> tuple[str, int]:
        """Return the file that the user knows and the row within it, for a row id."""
        files, rows = self.locate_all(np.array([row], np.int64))
        return files[0], int(rows[0])

    def locate_all(self, ids: RowIds) -> tuple[list[str], RowIds]:
        """Return the file that the user knows and the row within it, for each row id."""
        owner = np.searchsorted(self.starts, ids, side="right") - 1
        files, inverse = np.unique(self.fragments.file[owner], return_inverse=True)
        names = [self.fragments.shown_name(int(file)) for file in files]
        return [names[i] for i in inverse], self.fragments.file_row[owner] + ids - self.starts[owner]

    def with_named_classes(self, columns: ClassNames) -> "Split":
        """Return this split with integer columns read as names, each file by its own numbering.

        Args:
            columns: Names for files that have no numbering of their own.
        """
        # Columns of texts have names already; those of numbers get them.
        columns = {name: names for name, names in columns.items() if is_numbered(self.schema.field(name).type)}
        if not columns:
            return self
        types = {name: _to_names(pa.array([], self.schema.field(name).type), ()).type for name in columns}
        schema = pa.schema([field.with_type(types.get(field.name, field.type)) for field in self.schema])
        each = tuple({name: own.get(name, names) for name, names in columns.items()} for own in self.numberings)
        return replace(self, schema=schema, fragments=replace(self.fragments, names=each))

    def read(self, ids: RowIds, columns: Sequence[str]) -> pa.Table:
        """Return rows by id, in the order of `ids`, with only the columns asked for."""
        columns = list(dict.fromkeys(columns))  # a task may read one column as two things
        schema = castable(pa.schema([self.schema.field(name) for name in columns]))
        owner = np.searchsorted(self.starts, ids, side="right") - 1
        # Each fragment is opened once, however its rows are spread over `ids`.
        by_owner = np.argsort(owner, kind="stable")
        parts = []
        for index in np.unique(owner):
            local = ids[by_owner][owner[by_owner] == index] - self.starts[index]
            # One type for a column, whichever file a row is from: 1 must not read as 1.0 in some windows.
            parts.append(read_rows(self.fragments[index], local, columns).cast(schema))
        if not parts:
            return schema.empty_table()
        inverse = np.empty(len(ids), np.int64)
        inverse[by_owner] = np.arange(len(ids))
        return pa.concat_tables(parts).take(pa.array(inverse)).combine_chunks()

    def iter_column(self, column: str) -> Iterator[pa.Array]:
        """Yield a whole column in parts; only one part is in memory."""
        kind = self.schema.field(column).type
        for fragment in self.fragments:
            for batch in read_batches(fragment, [column]):
                yield batch.column(0).cast(kind)


def read_rows(fragment: Fragment, rows: RowIds, columns: Sequence[str], how: Reading = READING) -> pa.Table:
    """Return some rows (at least one) of a fragment, in the order asked for.

    A large row group is decoded batch by batch and only the wanted rows stay, so memory depends on the window alone.
    Pages have no index: decoding starts at the beginning of the row group and ends behind the last wanted row.
    """
    # Decoding runs forwards, so rows are collected in file order and put into the order asked for at the end.
    wanted = np.sort(rows)
    parts = []
    begin = 0
    for batch in read_batches(fragment, columns, how):
        low, high = np.searchsorted(wanted, [begin, begin + batch.num_rows])
        if high > low:
            parts.append(batch.take(pa.array(wanted[low:high] - begin)))
        begin += batch.num_rows
        # The rest of the row group is never decoded.
        if high == len(wanted):
            break
    table = pa.Table.from_batches(parts)
    return table.take(pa.array(np.searchsorted(wanted, rows)))


def read_batches(fragment: Fragment, columns: Sequence[str], how: Reading = READING) -> Iterator[pa.RecordBatch]:
    """Yield all rows of a fragment in order, batch by batch; raises as `read_fragments`."""
    return read_fragments([fragment], columns, how)


def read_fragments(
    fragments: Sequence[Fragment], columns: Sequence[str], how: Reading = READING
) -> Iterator[pa.RecordBatch]:
    """Yield all rows of some fragments of one file in order, batch by batch.

    Raises:
        DataError: The file cannot be read, or is not the one whose footer was read.
        StorageUnavailableError: The storage does not answer at the moment.
    """
    first = fragments[0]
    own_names = [first.columns.get(name, name) for name in columns]
    read = list(dict.fromkeys(own_names))
    try:
        stored = _parquet_batches if first.format == "parquet" else _arrow_batches
        for batch in _with_partition(map(to_plain_types, stored(fragments, read, how)), first, read):
            # `select` too: two columns of the split may be one of the file.
            renamed = batch.select(own_names).rename_columns(list(columns)) if first.columns else batch
            yield _with_names(renamed, first.names)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable_file_error(first.path, error) from error


def _parquet_batches(fragments: Sequence[Fragment], names: Sequence[str], how: Reading) -> Iterator[pa.RecordBatch]:
    fs, path = open_uri(fragments[0].path)
    with fs.open_input_file(path) as source:
        # `pre_buffer` would hold the whole row group; threads of pyarrow would compete with the data workers and with
        # those of the model.
        file = pq.ParquetFile(source, pre_buffer=False, buffer_size=how.buffer_bytes)
        own = _own_columns(fragments[0], file.schema_arrow, names)
        groups = [fragment.index for fragment in fragments]
        for fragment, group in zip(fragments, groups, strict=True):
            _check_rows(fragment, file.metadata.row_group(group).num_rows if group < file.num_row_groups else 0)
        yield from file.iter_batches(how.rows_at_once, row_groups=groups, columns=own, use_threads=False)


def _arrow_batches(fragments: Sequence[Fragment], names: Sequence[str], how: Reading) -> Iterator[pa.RecordBatch]:
    reader = arrow_reader(*open_uri(fragments[0].path))
    own = _own_columns(fragments[0], reader.schema, names)
    for fragment in fragments:
        if fragment.index >= reader.num_record_batches:
            _check_rows(fragment, 0)
        # A record batch is read whole and then sliced: from a remote storage it takes its full size in memory.
        whole = reader.get_batch(fragment.index).select(own)
        _check_rows(fragment, whole.num_rows)
        yield from (whole.slice(begin, how.rows_at_once) for begin in range(0, fragment.rows, how.rows_at_once))


def _check_rows(fragment: Fragment, rows: int) -> None:
    # Other rows would stand under the row ids of those that the order was made of.
    if rows != fragment.rows:
        raise _changed_file_error(fragment.path, f"it had {fragment.rows} rows where it has {rows}")


def _changed_file_error(path: str, change: str) -> DataError:
    return DataError(f"{path}: changed while it was in use ({change}); restore the file")


def is_numbered(kind: pa.DataType) -> bool:
    """Return whether a column holds integers, or lists of them."""
    return bool(pa.types.is_integer(item_type(kind)))


def _with_names(batch: pa.RecordBatch, names: ClassNames) -> pa.RecordBatch:
    for position, column in enumerate(batch.schema.names):
        if column in names:
            batch = batch.set_column(position, column, _to_names(batch.column(position), names[column]))
    return batch


def _to_names(values: pa.Array, names: Sequence[str]) -> pa.Array:
    """Replace integers, or lists of them, by their names; an integer without a name becomes its digits."""
    if is_list(values.type):
        # `list_flatten` drops what lies under null lists, so a null list must count as empty in the offsets.
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        flat = _to_names(pc.list_flatten(values), names)
        return pa.LargeListArray.from_arrays(offsets, flat, mask=values.is_null())
    is_known = pc.and_(pc.greater_equal(values, 0), pc.less(values, len(names)))
    # `take` raises for an index out of range, also where the `if_else` below drops the result.
    indices = pc.if_else(is_known, values, 0)
    texts = pa.array([*names, ""], pa.string()).take(indices.cast(pa.int64()))
    return pc.if_else(is_known, texts, values.cast(pa.string()))


def _unreadable_file_error(path: str, error: pa.ArrowInvalid | OSError) -> UserError:
    """Return the error for a file that cannot be read; a `StorageUnavailableError` if a later attempt may succeed."""
    if isinstance(error, OSError) and is_transient(error):
        return storage_error(path, error)
    return DataError(f"{path}: cannot be read ({first_line(error)}); restore the file")


def open_split(name: str, locations: Sequence[str], format: str = "auto") -> Split:
    """List the files of a split and read their footers, as `open_files`."""
    return open_files(name, [file for location in locations for file in list_files(name, location, format)])


def open_files(
    name: str,
    files: Sequence[DataFile],
    cache: str | None = None,
    on_progress: OnProgress | None = None,
    kinds: Mapping[str, ColumnKind] | None = None,
) -> Split:
    """Read the footers of a split's files, in parallel.

    Args:
        name: Name of the split, for messages.
        files: Files of the split, at least one.
        cache: Path or URI of the file that caches their footers; None reads all of them.
        on_progress: Callback for progress.
        kinds: Columns that the task reads, which must be alike in all files; None means all columns.

    Raises:
        DataError: A file is broken, no file has rows, or files disagree on the columns.
    """
    footers = read_footers(files, cache, on_progress)
    shown = [footer.origin or file.path for file, footer in zip(files, footers, strict=True)]
    schemas = [
        (position, unique_columns(shown[position], schema, kinds))
        for position, schema in distinct_schemas(footers, _partition_types(files))
    ]
    # Metadata names classes and indexes of one file; merged schemas would mix those of all.
    schema = schemas[0][1].remove_metadata()
    for position, other in schemas[1:]:
        schema = merge_schemas(shown[0], schema, shown[position], other, kinds)
    ignored = dict.fromkeys(name for _, other in schemas for name in other.names if name not in schema.names)
    owns = {position: dict(_class_names(other)) for position, other in schemas}
    numberings = [own for i, own in enumerate(owns.values()) if own not in list(owns.values())[:i]]
    numbering_of = {footers[position].schema: numberings.index(own) for position, own in owns.items()}
    table = pa.table(
        {
            "path": pa.array([file.path for file in files], pa.large_string()),
            "format": pa.array([file.format for file in files], pa.large_string()),
            "origin": pa.array([footer.origin for footer in footers], pa.large_string()),
            "numbering": pa.array([numbering_of[footer.schema] for footer in footers], pa.int32()),
        }
    )
    if any(file.partition for file in files):
        table = table.append_column("partition", pa.array(_partition_json(files), pa.large_string()))
    counts = np.array([len(footer.rows) for footer in footers], np.int64)
    # `fromiter` fills an array without a list of Python integers in between; there may be millions.
    rows = np.fromiter((n for footer in footers for n in footer.rows), np.int64)
    sizes = np.fromiter((n for footer in footers for n in footer.size_bytes), np.int64)
    fragments = Fragments.of(table, counts, rows, sizes)
    if not len(fragments):
        raise DataError(f"data.{name}: {shown[0]} has no rows; give a file that has")
    # Absolute paths and times: a moved copy has the same fingerprint, and so the same order, but another version.
    version = hashlib.sha256(repr([(file.path, file.size, file.mtime_ns) for file in files]).encode()).hexdigest()
    names = tuple(join_numberings(numberings).items())
    fingerprint = _fingerprint(files, footers)
    return Split(name, fragments, schema, fingerprint, names, tuple(ignored), tuple(numberings), version)


def _fingerprint(files: Sequence[DataFile], footers: Sequence[Footer]) -> str:
    """Hash the relative names, and the rows and bytes of each fragment. Changing this changes every order and run."""
    digest = hashlib.sha256()
    for file, footer in zip(files, footers, strict=True):
        # Rows and bytes of each fragment stand for its content: reading all values of a large split would take hours.
        sizes = [(n, size) for n, size in zip(footer.rows, footer.size_bytes, strict=True)]
        digest.update(f"{file.relative}\0{sizes}\n".encode())
    return digest.hexdigest()


def _partition_types(files: Sequence[DataFile]) -> list[dict[str, pa.DataType]]:
    """Return each file's folder columns: integers if all values of a column are, else texts."""
    values = {pair for file in files for pair in file.partition}
    texts = {name for name, value in values if value is not None and not is_integer(value)}
    types = {name: pa.string() if name in texts else pa.int64() for name, _ in values}
    return [{name: types[name] for name, _ in file.partition} for file in files]


def _partition_json(files: Sequence[DataFile]) -> list[str]:
    """Return the folder columns and values of each file as JSON, "" for a file without any."""
    texts = []
    for file, types in zip(files, _partition_types(files), strict=True):
        pairs = file.partition
        row = {name: int(value) if value and types[name] == pa.int64() else value for name, value in pairs}
        texts.append(json.dumps(row) if types else "")
    return texts


def _with_partition(
    batches: Iterable[pa.RecordBatch], fragment: Fragment, names: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Add the columns in the names of a fragment's folders to its batches; columns come in the order of `names`."""
    added: dict[str, str | int | None] = json.loads(fragment.partition) if fragment.partition else {}
    if not added:
        yield from batches
        return
    for batch in batches:
        own = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns = [own[n] if n in own else pa.repeat(pa.scalar(added[n]), batch.num_rows) for n in names]
        yield pa.RecordBatch.from_arrays(columns, list(names))


def _own_columns(fragment: Fragment, schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Return the columns among `names` that are in a fragment's file itself, not in the names of its folders.

    Raises:
        DataError: The file lacks a column.
    """
    added = json.loads(fragment.partition) if fragment.partition else {}
    own = [name for name in names if name in schema.names or name not in added]
    missing = next((name for name in own if name not in schema.names), None)
    if missing is not None:
        raise _changed_file_error(fragment.path, f"it had a column {missing!r}")
    return own


def join_numberings(numberings: Sequence[ClassNames]) -> dict[str, tuple[str, ...]]:
    """Return the class names of each column over all numberings, those of the first numbering first."""
    columns = dict.fromkeys(column for own in numberings for column in own)
    return {
        column: tuple(dict.fromkeys(name for own in numberings for name in own.get(column, ()))) for column in columns
    }


def hub_features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features of each column in the metadata that `datasets` writes; {} if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(schema: pa.Schema) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the names of `ClassLabel` columns, and of lists of them."""
    try:
        features = hub_features(schema)
        inner = {name: feature.get("feature", feature) for name, feature in features.items()}
        return tuple((n, tuple(f["names"])) for n, f in inner.items() if f.get("_type") == "ClassLabel")
    except (KeyError, ValueError, AttributeError, TypeError):
        return ()  # metadata of another layout: the labels name themselves


def unique_columns(path: str, schema: pa.Schema, kinds: Mapping[str, ColumnKind] | None) -> pa.Schema:
    """Return the columns of a file without those that share a name.

    Raises:
        DataError: The task reads a column whose name occurs twice.
    """
    repeated = [name for i, name in enumerate(schema.names) if name in schema.names[:i]]
    # A spreadsheet exports empty columns without a name behind the others.
    conflict = next((name for name in repeated if name and (not kinds or name in kinds)), None)
    if conflict is not None:
        raise DataError(f"{path}: has two columns named {conflict!r}; rename one of them")
    return pa.schema([field for field in schema if field.name not in repeated], schema.metadata)


def merge_schemas(
    first: str, schema: pa.Schema, path: str, other: pa.Schema, kinds: Mapping[str, ColumnKind] | None
) -> pa.Schema:
    """Return columns that both files can be read with, without those that differ and that the task does not read.

    Args:
        first: Path of the first file, for messages.
        schema: Columns that all files before the other one have.
        path: Path of the other file.
        other: Columns of the other file.
        kinds: Columns that the task reads; None means all.
    """
    fields = []
    for field in schema:
        is_read = kinds is None or field.name in kinds
        if field.name not in other.names:
            if is_read:
                raise DataError(
                    f"{path}: has no column {field.name!r}, which {first} has; give all files of a split the same "
                    "columns"
                )
            continue
        other_field = other.field(field.name)
        if field.type == other_field.type:
            fields.append(field)
            continue
        try:
            pair = [pa.schema([field]), pa.schema([other_field])]
            # Field by field, so that an error names the column and an unread column may differ.
            fields.append(pa.unify_schemas(pair, promote_options="permissive").field(0))
        except pa.ArrowTypeError as error:
            if is_read:
                raise DataError(
                    f"{path}: column {field.name!r} is {other_field.type}, but {field.type} in {first}; give all files "
                    "of a split the same types"
                ) from error
    return pa.schema(fields)


def read_file_schema(split: Split) -> pa.Schema:
    """Return the schema of the split's first file, with the metadata of `datasets` and pandas."""
    fragment = split.fragments[0]
    fs, path = open_uri(fragment.path)
    with fs.open_input_file(path) as stream:
        if fragment.format == "parquet":
            return pq.read_schema(stream)
        return pa.ipc.open_file(stream).schema


def small_batches(split: Split) -> Reading:
    """Return limits that read a batch of a few MiB."""
    return Reading(max(1, min(16384, int(_BATCH_BYTES / row_bytes(split)))), BUFFER_BYTES)


def row_bytes(split: Split) -> float:
    """Return the mean uncompressed size of a row in bytes."""
    return max(1.0, float(split.fragments.size_bytes.sum()) / split.rows)
