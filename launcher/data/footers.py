"""Footers of data files, read in parallel once and kept: the second command does not read 100,000 of them again.

Runs on the client and the head. What was read lies as one Arrow file in the run's cache, by path, size and time of
change; a file that changed is read anew, and a cache that cannot be read is made anew.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from launcher.data.files import DataFile, first_line
from launcher.errors import DataError, RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.uri import describe_os_error, is_local, open_uri, parent, split_options

ORIGIN = b"launcher.origin"
"""Key of a converted file's metadata that says what it was converted from."""

OnProgress = Callable[[int, int], None]
"""Called with (footers read, footers to read), now and then."""

# A local footer is a matter of the processor, and threads wait for each other; a remote one is a matter of waiting.
_THREADS, _REMOTE_THREADS = 8, 64
_AT_ONCE = 64
_WORTH_KEEPING = 64
"""Files; fewer are read again sooner than a cache."""
_log = logging.getLogger("launcher")


class Footer(NamedTuple):
    """What one footer says: rows and uncompressed bytes of each fragment, the schema, what it was converted from."""

    rows: list[int]
    size_bytes: list[int]
    schema: bytes
    origin: str


@dataclass
class Footers:
    """Footers of some files, in their order; each different schema once."""

    footers: list[Footer]

    def schemas(self, added: Sequence[Mapping[str, pa.DataType]]) -> Iterator[tuple[int, pa.Schema]]:
        """Yield each different schema, with the first file that has it.

        Args:
            added: Columns of each file beside its own; its own are taken where both have one of a name.
        """
        seen: set[tuple[bytes, tuple[str, ...]]] = set()
        for place, (footer, more) in enumerate(zip(self.footers, added, strict=True)):
            if (footer.schema, tuple(more)) in seen:
                continue
            seen.add((footer.schema, tuple(more)))
            schema = plain_schema(pa.ipc.read_schema(pa.py_buffer(footer.schema)))
            for name in [name for name in more if name not in schema.names]:
                schema = schema.append(pa.field(name, more[name]))
            yield place, schema


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema without types that few functions of pyarrow take.

    These are views, which files of Polars have, and structs without fields (`{}` in JSON), which Parquet cannot hold;
    they get one of nulls. Dictionaries are columns of their values: their codes mean something else in each file.
    """
    fields = [field.with_type(_plain(field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind] or [("_", pa.null())])
    return kind


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch as `plain_schema` has it."""
    schema = plain_schema(batch.schema)
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def read_footers(files: Sequence[DataFile], cache: str | None = None, told: OnProgress | None = None) -> Footers:
    """The footers of files, from the cache where they stand in it.

    Args:
        files: what to read.
        cache: path or URI of the file that keeps them; None keeps nothing.
        told: of progress.

    Raises:
        DataError: a file is not readable in its format.
    """
    kept = _load(cache) if cache is not None and len(files) >= _WORTH_KEEPING else {}
    found = [kept.get((file.path, file.size, file.mtime_ns)) for file in files]
    missing = [place for place, footer in enumerate(found) if footer is None]
    for place, footer in _read_all(files, missing, told):
        found[place] = footer
    footers = [footer for footer in found if footer is not None]
    if cache is not None and missing and len(files) >= _WORTH_KEEPING:
        _keep(cache, files, footers)
    return Footers(footers)


def _read_all(files: Sequence[DataFile], places: list[int], told: OnProgress | None) -> Iterator[tuple[int, Footer]]:
    """Read some footers with many threads; the first broken file in order is the one that is told."""
    if not places:
        return
    threads = _THREADS if is_local(open_uri(files[places[0]].path)[0]) else _REMOTE_THREADS
    schemas: dict[bytes, bytes] = {}  # equal ones are one object

    def read(some: list[int]) -> "list[tuple[int, Footer | DataError]]":
        return [(place, _tried(files[place], schemas)) for place in some]

    parts = [places[i : i + _AT_ONCE] for i in range(0, len(places), _AT_ONCE)]
    broken: tuple[int, DataError] | None = None
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for future in as_completed([pool.submit(read, part) for part in parts]):
            for place, footer in future.result():
                if isinstance(footer, DataError):
                    broken = min(broken or (place, footer), (place, footer), key=lambda pair: pair[0])
                else:
                    yield place, footer
            done += len(future.result())
            if told is not None:
                told(done, len(places))
            if broken is not None and done < len(places):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if broken is not None:
        raise broken[1]


def _tried(file: DataFile, schemas: dict[bytes, bytes]) -> "Footer | DataError":
    try:
        fs, inner = open_uri(file.path)
        footer = _parquet_footer(fs, inner) if file.format == "parquet" else _arrow_footer(fs, inner)
    except RunError as error:
        return DataError(error.message)
    except (pa.ArrowInvalid, OSError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else first_line(error)
        return DataError(f"{file.path}: not a readable {file.format} file ({reason}); restore or remove it")
    return footer._replace(schema=schemas.setdefault(footer.schema, footer.schema))


def _parquet_footer(fs: pafs.FileSystem, inner: str) -> Footer:
    with fs.open_input_file(inner) as stream:
        metadata = pq.read_metadata(stream)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    origin = (metadata.metadata or {}).get(ORIGIN, b"").decode()
    schema = metadata.schema.to_arrow_schema()
    if origin:  # of one file; the schema is that of many
        schema = schema.with_metadata({k: v for k, v in (schema.metadata or {}).items() if k != ORIGIN})
    rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
    return Footer(rows, sizes, schema.serialize().to_pybytes(), origin)


def _arrow_footer(fs: pafs.FileSystem, inner: str) -> Footer:
    reader = arrow_reader(fs, inner)
    batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    rows, sizes = [batch.num_rows for batch in batches], [batch.nbytes for batch in batches]
    return Footer(rows, sizes, reader.schema.serialize().to_pybytes(), "")


def arrow_reader(fs: pafs.FileSystem, path: str) -> pa.ipc.RecordBatchFileReader:
    """An Arrow file, opened."""
    # A memory map costs nothing to open and lets get_batch touch only what is asked for.
    source = pa.memory_map(path) if is_local(fs) else fs.open_input_file(path)
    return pa.ipc.open_file(source)


_Key = tuple[str, int | None, int | None]
_NUMBERS = pa.list_(pa.int64())


def _load(cache: str) -> dict[_Key, Footer]:
    """What the cache knows; nothing where there is none, or none that can be read."""
    run, name = _place(cache)
    try:
        if not run.exists(name):
            return {}
        table = pa.ipc.open_file(pa.py_buffer(run.read_bytes(name))).read_all()
        table.validate(full=True)
        columns = [table.column(c).to_pylist() for c in ("path", "size", "mtime_ns", "origin")]
        lists = [_lists(table.column(c).combine_chunks()) for c in ("rows", "size_bytes")]
        codes = table.column("schema").combine_chunks()
        schemas = codes.dictionary.to_pylist()
        return {
            (path, size, mtime): Footer(rows, sizes, schemas[code], origin)
            for path, size, mtime, origin, rows, sizes, code in zip(
                *columns, *lists, codes.indices.to_pylist(), strict=True
            )
        }
    except (pa.ArrowInvalid, OSError, KeyError, AttributeError, RunError) as error:
        _log.warning("%s: cannot be read (%s); footers are read anew", cache, " ".join(str(error).split())[:200])
        return {}


def _lists(column: pa.ListArray) -> list[list[int]]:
    """As `to_pylist`, in a tenth of the time."""
    numbers, ends = column.values.to_pylist(), column.offsets.to_pylist()
    return [numbers[begin:end] for begin, end in zip(ends[:-1], ends[1:], strict=True)]


def _keep(cache: str, files: Sequence[DataFile], footers: Sequence[Footer]) -> None:
    """Publish the footers at once: of two writers one stays, whole."""
    known = [(f, footer) for f, footer in zip(files, footers, strict=True) if f.mtime_ns is not None]
    table = pa.table(
        {
            "path": pa.array([file.path for file, _ in known], pa.string()),
            "size": pa.array([file.size for file, _ in known], pa.int64()),
            "mtime_ns": pa.array([file.mtime_ns for file, _ in known], pa.int64()),
            "rows": pa.array([footer.rows for _, footer in known], _NUMBERS),
            "size_bytes": pa.array([footer.size_bytes for _, footer in known], _NUMBERS),
            "origin": pa.array([footer.origin for _, footer in known], pa.string()),
            "schema": pa.array([footer.schema for _, footer in known], pa.binary()).dictionary_encode(),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    run, name = _place(cache)
    try:
        run.write_bytes(name, sink.getvalue().to_pybytes())
    except RunError as error:  # the next command reads the footers again
        _log.warning("%s", error.message)


def _place(cache: str) -> tuple[RunDir, str]:
    return RunDir(parent(cache)), split_options(cache)[0].rsplit("/", 1)[-1]
