"""Data files as fragments: what is in a split, learned from footers alone. Runs on the client, head and data workers.

A fragment is a Parquet row group or an Arrow record batch. Row ids count the rows of a split, files in order.
Formats without footers pass through `convert.py` first. Read `sampler.py` and `stream.py` next.
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
from launcher.data.footers import Footer, OnProgress, arrow_reader, plain, read_footers
from launcher.data.fragments import ClassNames, Fragment, Fragments
from launcher.data.sampler import RowIds
from launcher.errors import DataError, UserError
from launcher.rundir.uri import is_transient, open_uri, redact_uri, storage_error
from launcher.tasks.base import ColumnKind


@dataclass(frozen=True)
class Reading:
    """How much of a fragment is held at once."""

    rows_at_once: int = 16384
    buffer_bytes: int = 0
    """Pages are read as they are needed, so many bytes at once; 0 reads the whole of a column first."""


READING = Reading()
"""What reads a window fastest."""


@dataclass(frozen=True)
class Split:
    """All fragments of one split, their schema, and the fingerprint that names the data."""

    name: str
    fragments: Fragments
    schema: pa.Schema
    fingerprint: str
    class_names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Columns whose integers are classes with names, as the files' Hugging Face metadata tells."""
    left_out: tuple[str, ...] = ()
    """Columns that nobody reads and that not all files have with one type."""
    numberings: tuple[ClassNames, ...] = ({},)
    """The different ones that files of the split have, by their own metadata; `class_names` are those of the first
    file that has any, and what others add."""
    version: str = ""
    """Changes whenever a file does: a hash of their paths, sizes and times. The fingerprint, which the order depends
    on, stays the same when files move."""

    @property
    def starts(self) -> RowIds:
        """First row id of each fragment, and the number of rows behind them: (fragments + 1,)."""
        return self.fragments.starts

    @property
    def rows(self) -> int:
        """Rows in the split, by the footers."""
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[str, int]:
        """File, as the user knows it, and row within that file of a row id."""
        index = int(np.searchsorted(self.starts, row, side="right")) - 1
        fragment = self.fragments[index]
        return redact_uri(fragment.origin or fragment.path), fragment.file_row + row - int(self.starts[index])

    def named(self, columns: ClassNames) -> "Split":
        """Return the same split, some integer columns of which are read as the names that each file gives them.

        Args:
            columns: Names that files without their own go by.
        """
        columns = {name: names for name, names in columns.items() if is_numbered(self.schema.field(name).type)}
        if not columns:
            return self
        types = {name: _as_names(pa.array([], self.schema.field(name).type), ()).type for name in columns}
        schema = pa.schema([field.with_type(types.get(field.name, field.type)) for field in self.schema])
        each = tuple({name: own.get(name, names) for name, names in columns.items()} for own in self.numberings)
        return replace(self, schema=schema, fragments=self.fragments.named(each))

    def read(self, ids: RowIds, columns: Sequence[str]) -> pa.Table:
        """Rows by id, in the order of `ids`, with only the columns asked for."""
        columns = list(dict.fromkeys(columns))  # a task may read one column as two things
        schema = pa.schema([self.schema.field(name) for name in columns])
        owner = np.searchsorted(self.starts, ids, side="right") - 1
        by_owner = np.argsort(owner, kind="stable")
        parts = []
        for index in np.unique(owner):
            local = ids[by_owner][owner[by_owner] == index] - self.starts[index]
            # One type for a column, whatever file a row is from: 1 must not read as 1.0 in some windows.
            parts.append(read_rows(self.fragments[index], local, columns).cast(schema))
        if not parts:
            return schema.empty_table()
        inverse = np.empty(len(ids), np.int64)
        inverse[by_owner] = np.arange(len(ids))
        return pa.concat_tables(parts).take(pa.array(inverse)).combine_chunks()

    def pieces(self, column: str) -> Iterator[pa.Array]:
        """A whole column, a part at a time; no more of it is held."""
        kind = self.schema.field(column).type
        for fragment in self.fragments:
            for batch in read_batches(fragment, [column]):
                yield batch.column(0).cast(kind)


def read_rows(fragment: Fragment, rows: RowIds, columns: Sequence[str], how: Reading = READING) -> pa.Table:
    """Some rows of one fragment, in the order asked for; at least one.

    A large row group is decoded batch by batch and only the wanted rows are kept, so memory stays with the window.
    """
    wanted = np.sort(rows)
    kept, seen = [], 0
    for batch in read_batches(fragment, columns, how):
        low, high = np.searchsorted(wanted, [seen, seen + batch.num_rows])
        if high > low:
            kept.append(batch.take(pa.array(wanted[low:high] - seen)))
        seen += batch.num_rows
        if high == len(wanted):
            break
    table = pa.Table.from_batches(kept)
    return table.take(pa.array(np.searchsorted(wanted, rows)))


def read_batches(fragment: Fragment, columns: Sequence[str], how: Reading = READING) -> Iterator[pa.RecordBatch]:
    """All rows of one fragment in order, batch by batch.

    Raises:
        DataError: the file cannot be read.
        StorageUnavailableError: Its storage does not answer, for now.
    """
    fs, path = open_uri(fragment.path)
    rows = how.rows_at_once
    try:
        if fragment.format == "parquet":
            file = pq.ParquetFile(fs.open_input_file(path), pre_buffer=False, buffer_size=how.buffer_bytes)
            names = own_columns(fragment, file.schema_arrow, columns)
            batches = file.iter_batches(rows, row_groups=[fragment.index], columns=names, use_threads=False)
        else:
            reader = arrow_reader(fs, path)
            whole = reader.get_batch(fragment.index).select(own_columns(fragment, reader.schema, columns))
            batches = (whole.slice(begin, rows) for begin in range(0, whole.num_rows, rows))
        for batch in with_partition(map(plain, batches), fragment, columns):
            yield _with_names(batch, fragment.names)
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable_file_error(fragment.path, error) from error


def is_numbered(kind: pa.DataType) -> bool:
    """Return whether a column holds integers, or lists of them."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(pa.types.is_integer(kind.value_type if is_list else kind))


def _with_names(batch: pa.RecordBatch, names: ClassNames) -> pa.RecordBatch:
    for place, column in enumerate(batch.schema.names):
        if column in names:
            batch = batch.set_column(place, column, _as_names(batch.column(place), names[column]))
    return batch


def _as_names(values: pa.Array, names: Sequence[str]) -> pa.Array:
    """Return integers, or lists of them, as the names they stand for; one that stands for none as it is written."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        flat = _as_names(pc.list_flatten(values), names)
        return pa.LargeListArray.from_arrays(offsets, flat, mask=values.is_null())
    known = pc.and_(pc.greater_equal(values, 0), pc.less(values, len(names)))
    places = pc.if_else(known, values, 0)
    texts = pa.array([*names, ""], pa.string()).take(places.cast(pa.int64()))
    return pc.if_else(known, texts, values.cast(pa.string()))


def unreadable_file_error(path: str, error: pa.ArrowInvalid | OSError) -> UserError:
    """Return the error that says why a data file cannot be read; a `StorageUnavailableError` where that may pass."""
    if isinstance(error, OSError) and is_transient(error):
        return storage_error(path, error)
    return DataError(f"{path}: cannot be read ({first_line(error)}); restore the file")


def open_split(name: str, locations: Sequence[str], format: str = "auto") -> Split:
    """List the files of a split and read their footers, in parallel.

    Raises:
        DataError: nothing is found, a file is broken or empty of rows, or files disagree on their columns.
    """
    return open_files(name, [file for location in locations for file in list_files(name, location, format)])


def open_files(
    name: str,
    files: Sequence[DataFile],
    cache: str | None = None,
    told: OnProgress | None = None,
    kinds: Mapping[str, ColumnKind] | None = None,
) -> Split:
    """Read the footers of a split's files.

    Args:
        name: the split, for messages.
        files: at least one.
        cache: path or URI of the file that keeps their footers; None reads all of them.
        told: of progress.
        kinds: Columns that are read, in which files must agree; None for all.

    Raises:
        DataError: a file is broken or empty of rows, or files disagree on their columns.
    """
    found = read_footers(files, cache, told)
    footers = found.footers
    shown = [footer.origin or file.path for file, footer in zip(files, footers, strict=True)]
    schemas = [
        (place, unique_columns(shown[place], schema, kinds)) for place, schema in found.schemas(_partition_types(files))
    ]
    whole = schemas[0][1]
    schema = whole.remove_metadata()
    for place, other in schemas[1:]:
        schema = _one_schema(shown[0], schema, (shown[place], other), kinds)
    left_out = dict.fromkeys(name for _, one in schemas for name in one.names if name not in schema.names)
    owns = {place: dict(_class_names(other)) for place, other in schemas}
    numberings = [own for i, own in enumerate(owns.values()) if own not in list(owns.values())[:i]]
    table = pa.table(
        {
            "path": pa.array([file.path for file in files], pa.large_string()),
            "format": pa.array([file.format for file in files], pa.large_string()),
            "origin": pa.array([footer.origin for footer in footers], pa.large_string()),
            "numbering": pa.array(_numbering(footers, owns, numberings), pa.int32()),
        }
    )
    if any(file.partition for file in files):
        table = table.append_column("partition", pa.array(_partitions(files), pa.large_string()))
    counts = np.array([len(footer.rows) for footer in footers], np.int64)
    rows = np.fromiter((n for footer in footers for n in footer.rows), np.int64)
    sizes = np.fromiter((n for footer in footers for n in footer.size_bytes), np.int64)
    fragments = Fragments.of(table, counts, rows, sizes)
    if not len(fragments):
        raise DataError(f"data.{name}: {shown[0]} has no rows; give a file that has")
    version = hashlib.sha256(repr([(file.path, file.size, file.mtime_ns) for file in files]).encode()).hexdigest()
    names = tuple(_all_names(numberings).items())
    fingerprint = _fingerprint(files, footers)
    return Split(name, fragments, schema, fingerprint, names, tuple(left_out), tuple(numberings), version)


def _partition_types(files: Sequence[DataFile]) -> list[dict[str, pa.DataType]]:
    """Return the columns that each file's folders tell: of integers where all their values are, else of texts."""
    values = {pair for file in files for pair in file.partition}
    texts = {name for name, value in values if value is not None and not is_integer(value)}
    types = {name: pa.string() if name in texts else pa.int64() for name, _ in values}
    return [{name: types[name] for name, _ in file.partition} for file in files]


def _partitions(files: Sequence[DataFile]) -> list[str]:
    typed = zip(files, _partition_types(files), strict=True)
    return [
        json.dumps(
            {name: int(value) if value and types[name] == pa.int64() else value for name, value in file.partition}
        )
        if types
        else ""
        for file, types in typed
    ]


def with_partition(
    batches: Iterable[pa.RecordBatch], fragment: Fragment, names: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield batches of a fragment with the columns that its folders tell, in the order of some names."""
    given: dict[str, str | int | None] = json.loads(fragment.partition) if fragment.partition else {}
    for batch in batches:
        if not given:
            yield batch
            continue
        own = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns = [own[n] if n in own else pa.repeat(pa.scalar(given[n]), batch.num_rows) for n in names]
        yield pa.RecordBatch.from_arrays(columns, list(names))


def own_columns(fragment: Fragment, schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Return those of some columns that a fragment's file holds itself."""
    return [name for name in names if name in schema.names] if fragment.partition else list(names)


def _numbering(
    footers: Sequence[Footer], owns: dict[int, dict[str, tuple[str, ...]]], numberings: list[dict[str, tuple[str, ...]]]
) -> list[int]:
    """Return for each file which of the numberings it has; `owns` has that of the first file of each schema."""
    by_schema = {footers[place].schema: numberings.index(own) for place, own in owns.items()}
    return [by_schema[footer.schema] for footer in footers]


def _all_names(numberings: Sequence[ClassNames]) -> dict[str, tuple[str, ...]]:
    columns = dict.fromkeys(column for own in numberings for column in own)
    return {
        column: tuple(dict.fromkeys(name for own in numberings for name in own.get(column, ()))) for column in columns
    }


def _fingerprint(files: Sequence[DataFile], footers: Sequence[Footer]) -> str:
    """Names, and the rows and bytes of each fragment."""
    digest = hashlib.sha256()
    for file, footer in zip(files, footers, strict=True):
        said = [(n, size) for n, size in zip(footer.rows, footer.size_bytes, strict=True)]
        digest.update(f"{file.relative}\0{said}\n".encode())
    return digest.hexdigest()


def hub_features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` says of each column, in the metadata it leaves in files; {} where it says nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(schema: pa.Schema) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names of `ClassLabel` columns, and of lists of them."""
    try:
        features = hub_features(schema)
        inner = {name: feature.get("feature", feature) for name, feature in features.items()}
        return tuple((n, tuple(f["names"])) for n, f in inner.items() if f.get("_type") == "ClassLabel")
    except (KeyError, ValueError, AttributeError, TypeError):
        return ()  # of a kind that tells no names: labels then name themselves


def unique_columns(path: str, schema: pa.Schema, kinds: Mapping[str, ColumnKind] | None) -> pa.Schema:
    """Return the columns of a file that can be told apart.

    Raises:
        DataError: Two columns have one name, and that is read.
    """
    twice = [name for i, name in enumerate(schema.names) if name in schema.names[:i]]
    # A spreadsheet leaves columns without a name behind the others.
    read = next((name for name in twice if name and (not kinds or name in kinds)), None)
    if read is not None:
        raise DataError(f"{path}: has two columns named {read!r}; rename one of them")
    return pa.schema([field for field in schema if field.name not in twice], schema.metadata)


def _one_schema(
    first: str, schema: pa.Schema, other: tuple[str, pa.Schema], kinds: Mapping[str, ColumnKind] | None
) -> pa.Schema:
    """Return what both files can be read with; what nobody reads and one of them lacks is left out.

    Args:
        first: Path of the first file.
        schema: Its columns, as all files before the other can be read.
        other: Path and columns of another file.
        kinds: Columns that are read; None for all.
    """
    path, columns = other
    fields = []
    for field in schema:
        is_read = kinds is None or field.name in kinds
        if field.name not in columns.names:
            if is_read:
                raise DataError(
                    f"{path}: has no column {field.name!r}, which {first} has; give all files of a split the same "
                    "columns"
                )
            continue
        mine = columns.field(field.name)
        try:
            fields.append(field if field.type == mine.type else _wider(field, mine))
        except pa.ArrowTypeError as error:
            if is_read:
                raise DataError(
                    f"{path}: column {field.name!r} is {mine.type}, but {field.type} in {first}; give all files of a "
                    "split the same types"
                ) from error
    return pa.schema(fields)


def _wider(one: pa.Field, other: pa.Field) -> pa.Field:
    return pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)
