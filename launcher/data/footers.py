"""Footers of data files, read once in parallel and cached: a second command does not read 100,000 of them again.

Runs on the client and the head. The cache is one Arrow file under the storage's `.cache`, keyed by path, size and
modification time: a changed file is read again, and an unreadable cache is written again. Read `splits.py` next.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from launcher.data.files import DataFile, first_line
from launcher.errors import DataError, RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.uri import describe_os_error, is_local, open_uri, parent, split_options

ORIGIN = b"launcher.origin"
"""Key in a converted file's metadata. Its value is the path of the file that was converted."""

OnProgress = Callable[[int, int], None]
"""Callback with (footers read, footers to read)."""

# Reading a local footer costs CPU time under the GIL; reading a remote one is waiting for the network.
_THREADS, _REMOTE_THREADS = 8, 64
_FILES_PER_TASK = 64
_MIN_CACHED_FILES = 64
"""Fewer files are read faster than a cache."""
_log = logging.getLogger("launcher")


class Footer(NamedTuple):
    """Rows and uncompressed bytes of each fragment of a file, its schema, and the file it was converted from."""

    rows: list[int]
    size_bytes: list[int]
    schema: bytes
    origin: str


def distinct_schemas(
    footers: Sequence[Footer], added: Sequence[Mapping[str, pa.DataType]]
) -> Iterator[tuple[int, pa.Schema]]:
    """Yield each different schema once, with the position of the first file that has it.

    Args:
        footers: Footers of the files.
        added: Columns of each file that are not in the file itself; the file's own column of a name comes first.
    """
    # The serialized bytes decide, so that 100,000 equal schemas are parsed once.
    seen: set[tuple[bytes, tuple[str, ...]]] = set()
    for position, (footer, more) in enumerate(zip(footers, added, strict=True)):
        if (footer.schema, tuple(more)) in seen:
            continue
        seen.add((footer.schema, tuple(more)))
        schema = plain_schema(pa.ipc.read_schema(pa.py_buffer(footer.schema)))
        for name in [name for name in more if name not in schema.names]:
            schema = schema.append(pa.field(name, more[name]))
        yield position, schema


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause Python's garbage collector: it would walk millions of new objects again and again, and free none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema without types that most functions of pyarrow do not take.

    These are views (files of Polars have them), structs without fields (`{}` in JSON; Parquet cannot hold them, so they
    get one field of nulls) and dictionaries, whose codes mean something else in each file.
    """
    return pa.schema([field.with_type(_plain_type(field.type)) for field in schema], schema.metadata)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_struct(kind) and not kind.num_fields:
        return pa.struct([("_", pa.null())])
    return _with_items(kind, _plain_type)


def _with_items(kind: pa.DataType, convert: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return a list or struct of other items; another type as it is."""
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(convert(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(convert(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(convert(field.type)) for field in kind])
    return kind


def castable(schema: pa.Schema) -> pa.Schema:
    """Return a schema with texts where lists or structs hold nothing but nulls, as `name` of conversations may.

    pyarrow 26 cannot cast lists of structs with a field of nulls to their own type. For schemas that are merged: until
    then such a field fits any type.
    """
    return pa.schema([field.with_type(_with_items(field.type, _castable_item)) for field in schema], schema.metadata)


def _castable_item(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_null(kind) else _with_items(kind, _castable_item)


def to_plain_types(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Cast a batch to its `plain_schema`."""
    schema = plain_schema(batch.schema)
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def read_footers(
    files: Sequence[DataFile], cache: str | None = None, on_progress: OnProgress | None = None
) -> list[Footer]:
    """Return the footers of files, from the cache where it has them.

    Args:
        files: Files to read.
        cache: Path or URI of the cache file; None reads all footers and caches none.
        on_progress: Callback for progress.

    Raises:
        DataError: A file cannot be read in its format.
    """
    is_cached = cache is not None and len(files) >= _MIN_CACHED_FILES
    # A file that changed has another size or time and so another key: no entry is ever checked against its file.
    known = _load_cache(cache) if cache is not None and is_cached else {}
    found_or_none = [known.get((file.path, file.size, file.mtime_ns)) for file in files]
    missing = [position for position, footer in enumerate(found_or_none) if footer is None]
    for position, footer in _read_missing(files, missing, on_progress):
        found_or_none[position] = footer
    footers = [footer for footer in found_or_none if footer is not None]
    # Only the files of this command are written: footers of other files in the cache are dropped.
    if cache is not None and is_cached and missing:
        _save_cache(cache, files, footers)
    return footers


def _read_missing(
    files: Sequence[DataFile], positions: list[int], on_progress: OnProgress | None
) -> Iterator[tuple[int, Footer]]:
    """Read footers with many threads; raise the error of the first broken file in the order of the files."""
    if not positions:
        return
    threads = _THREADS if is_local(open_uri(files[positions[0]].path)[0]) else _REMOTE_THREADS
    # Equal schemas share one object, in memory and in the pickle.
    schemas: dict[bytes, bytes] = {}

    def read_some(some: list[int]) -> "list[tuple[int, Footer | DataError]]":
        return [(position, _read_footer(files[position], schemas)) for position in some]

    parts = [positions[i : i + _FILES_PER_TASK] for i in range(0, len(positions), _FILES_PER_TASK)]
    first_error: tuple[int, DataError] | None = None
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        # In the order of arrival, which the positions undo: waiting for the first part would hold up the progress.
        for future in as_completed([pool.submit(read_some, part) for part in parts]):
            for position, footer in future.result():
                if isinstance(footer, DataError):
                    first_error = min(first_error or (position, footer), (position, footer), key=lambda pair: pair[0])
                else:
                    yield position, footer
            done += len(future.result())
            if on_progress is not None:
                on_progress(done, len(positions))
            # Stop early, though a file before this one may be broken too and still be unread.
            if first_error is not None and done < len(positions):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if first_error is not None:
        raise first_error[1]


def _read_footer(file: DataFile, schemas: dict[bytes, bytes]) -> "Footer | DataError":
    try:
        fs, inner = open_uri(file.path)
        footer = _parquet_footer(fs, inner) if file.format == "parquet" else _arrow_footer(fs, inner)
    except RunError as error:
        return DataError(error.message)
    except (pa.ArrowInvalid, OSError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else first_line(error)
        return DataError(f"{file.path}: not a readable {file.format} file ({reason}); restore or remove it")
    # Threads share the dictionary without a lock: `setdefault` with a key of bytes is one step under the GIL.
    return footer._replace(schema=schemas.setdefault(footer.schema, footer.schema))


def _parquet_footer(fs: pafs.FileSystem, inner: str) -> Footer:
    # `read_metadata` reads the end of the file alone, whatever its size.
    with fs.open_input_file(inner) as stream:
        metadata = pq.read_metadata(stream)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    origin = (metadata.metadata or {}).get(ORIGIN, b"").decode()
    schema = metadata.schema.to_arrow_schema()
    # The origin differs from file to file; without it, all converted files share one schema.
    if origin:
        schema = schema.with_metadata({k: v for k, v in (schema.metadata or {}).items() if k != ORIGIN})
    rows = [group.num_rows for group in groups]
    sizes = [group.total_byte_size for group in groups]
    return Footer(rows, sizes, schema.serialize().to_pybytes(), origin)


def _arrow_footer(fs: pafs.FileSystem, inner: str) -> Footer:
    reader = arrow_reader(fs, inner)
    # An Arrow footer has no row counts, so each batch is opened. A memory map touches little for that; from a remote
    # storage each batch is read whole.
    batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    rows = [batch.num_rows for batch in batches]
    sizes = [batch.nbytes for batch in batches]
    return Footer(rows, sizes, reader.schema.serialize().to_pybytes(), "")


def arrow_reader(fs: pafs.FileSystem, path: str) -> pa.ipc.RecordBatchFileReader:
    """Open an Arrow file."""
    # Opening a memory map costs nothing, and get_batch then reads only the pages that are used.
    source = pa.memory_map(path) if is_local(fs) else fs.open_input_file(path)
    return pa.ipc.open_file(source)


_Key = tuple[str, int | None, int | None]
_NUMBERS = pa.list_(pa.int64())


def _load_cache(cache: str) -> dict[_Key, Footer]:
    """Return the cached footers; {} if the cache does not exist or cannot be read."""
    run, name = _split_cache_path(cache)
    try:
        if not run.exists(name):
            return {}
        table = pa.ipc.open_file(pa.py_buffer(run.read_bytes(name))).read_all()
        # A truncated or damaged file must not give wrong row counts: they are part of the order and of the fingerprint.
        table.validate(full=True)
        columns = [table.column(c).to_pylist() for c in ("path", "size", "mtime_ns", "origin")]
        lists = [_to_lists(table.column(c).combine_chunks()) for c in ("rows", "size_bytes")]
        codes = table.column("schema").combine_chunks()
        schemas = codes.dictionary.to_pylist()
        return {
            (path, size, mtime): Footer(rows, sizes, schemas[code], origin)
            for path, size, mtime, origin, rows, sizes, code in zip(
                *columns, *lists, codes.indices.to_pylist(), strict=True
            )
        }
    except (pa.ArrowInvalid, OSError, KeyError, AttributeError, RunError) as error:
        _log.warning("%s: cannot be read (%s); all footers are read again", cache, " ".join(str(error).split())[:200])
        return {}


def _to_lists(column: pa.ListArray) -> list[list[int]]:
    """Return what `to_pylist` returns, ten times as fast."""
    numbers = column.values.to_pylist()
    ends = column.offsets.to_pylist()
    return [numbers[begin:end] for begin, end in zip(ends[:-1], ends[1:], strict=True)]


def _save_cache(cache: str, files: Sequence[DataFile], footers: Sequence[Footer]) -> None:
    """Write the cache in one atomic step: of two writers, one wins with a whole file."""
    # Without a modification time a change of the same size would go unseen.
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
    run, name = _split_cache_path(cache)
    try:
        run.write_bytes(name, sink.getvalue().to_pybytes())
    # The next command reads the footers again: a cache that cannot be written must not stop a run.
    except RunError as error:
        _log.warning("%s", error.message)


def _split_cache_path(cache: str) -> tuple[RunDir, str]:
    return RunDir(parent(cache)), split_options(cache)[0].rsplit("/", 1)[-1]
