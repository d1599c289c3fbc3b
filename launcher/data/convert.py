"""Formats without footers, turned into Parquet once. Runs on the client and the head.

CSV, JSON Lines, Arrow streams and hub data sets go through pyarrow file by file into `<storage>/.cache/`, keyed by the
file's path, size and time, so a changed file is converted again and an unchanged one never is.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.json
import pyarrow.parquet as pq

from launcher.data.files import DataFile, first_line, list_files
from launcher.data.footers import ORIGIN, plain
from launcher.data.sources import check_names
from launcher.errors import DataError, RunError
from launcher.spec.hub import PREFIX, parse_hub
from launcher.storage import asking, is_local, join, open_uri, os_reason, refusal

_ROW_GROUP = 16384
# Types are read off the first block, and a row must fit in one.
_BLOCK_BYTES = 8 << 20
# A file whose types change after its first block is read whole, if it is small enough for that.
_WHOLE_BYTES = 1 << 30
_STREAM_MAGIC = b"\xff\xff\xff\xff"  # how an Arrow stream begins; an Arrow file begins with ARROW1
_UNREADABLE = (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError)


def as_splittable(name: str, locations: Sequence[str], format: str, cache: str) -> list[str]:
    """The locations as Parquet or Arrow files.

    Args:
        name: the split, for messages.
        locations: from the job file.
        format: from the job file.
        cache: directory or URI for converted files.

    Raises:
        DataError: a file cannot be read in its format.
    """
    return [file.path for file in splittable_files(name, locations, format, cache)]


def splittable_files(name: str, locations: Sequence[str], format: str, cache: str) -> list[DataFile]:
    """`as_splittable` with what the listing told of each file, which need not be asked for again."""
    ready: list[DataFile] = []
    for location in locations:
        if location.startswith(PREFIX):
            ready += list_files(name, _from_hub(name, location, cache))
            continue
        for file in list_files(name, location, format):
            if file.format in _READERS or (file.format == "arrow" and _is_stream(file.path)):
                ready += list_files(name, _converted(file, cache))
            else:
                # By its name alone, as if it had been named: the fingerprint does not change with the directory.
                below = "/" in file.relative
                ready.append(file._replace(relative=file.relative.rsplit("/", 1)[-1]) if below else file)
    return ready


def _is_stream(path: str) -> bool:
    with _opened(path) as stream:
        return bool(stream.read(4) == _STREAM_MAGIC)


def _converted(file: DataFile, cache: str) -> str:
    path, kind = file.path, file.format
    target = _target(cache, file.relative.rsplit("/", 1)[-1], (path, file.size, file.mtime_ns))
    with asking(target):
        fs, inner = open_uri(target)
        if fs.get_file_info(inner).size:
            return target
    read = _READERS.get(kind, _read_arrow_stream)
    try:
        try:
            _write(target, path, read(path, False))
        except _UNREADABLE:
            if kind not in _READERS or (file.size or 0) > _WHOLE_BYTES:
                raise
            _write(target, path, read(path, True))
    except _UNREADABLE as error:
        what = _other_kind(path) or (_broken_line(path) if kind == "jsonl" else "") or first_line(error)
        raise DataError(f"{path}: not a readable {kind} file ({what}); mend the file, or set data.format") from error
    return target


@contextmanager
def _opened(path: str) -> Iterator[pa.NativeFile]:
    """The file as a stream of bytes; what its storage says against it names the file."""
    try:
        fs, inner = open_uri(path)
        with fs.open_input_stream(inner) as stream:
            yield stream
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({os_reason(error)}); check the file and your rights") from error


def _read_csv(path: str, whole: bool) -> Iterator[pa.RecordBatch]:
    # Quoted texts may hold line breaks.
    parse = pa.csv.ParseOptions(delimiter="\t" if path.endswith(".tsv") else ",", newlines_in_values=True)
    # `true` stays the text it is, as a class name or a word.
    convert = pa.csv.ConvertOptions(true_values=[], false_values=[])
    # One thread knows the number of the row that it cannot read.
    read = pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=not whole)
    with _opened(path) as stream:
        found = (pa.csv.read_csv if whole else pa.csv.open_csv)(stream, read, parse, convert)
        names = found.schema.names
        if len(names) == 1 and (mark := next((c for c in ";\t|" if c in names[0]), None)):
            tab = mark == "\t"
            remedy = "name it .tsv" if tab else "write them with commas"
            what = "tabs" if tab else f"{mark!r}"
            raise DataError(f"{path}: its columns are separated by {what}, not by commas; {remedy}")
        for field in found.schema:
            if pa.types.is_binary(field.type):  # what pyarrow makes of text that is not UTF-8
                raise pa.ArrowInvalid(f"column {field.name!r} is not UTF-8")
        yield from found.to_batches(_ROW_GROUP) if whole else found


def _read_jsonl(path: str, whole: bool, texts: pa.Schema | None = None) -> Iterator[pa.RecordBatch]:
    """Read JSON Lines; pyarrow takes some texts for dates, which JSON does not have, unless `texts` is the schema."""
    read, parse = pa.json.ReadOptions(block_size=_BLOCK_BYTES), pa.json.ParseOptions(explicit_schema=texts)
    with _opened(path) as stream:
        found = (pa.json.read_json if whole else pa.json.open_json)(stream, read, parse)
        known = pa.schema([field.with_type(_dates_as_text(field.type)) for field in found.schema])
        if known != found.schema:
            yield from _read_jsonl(path, whole, known)
            return
        for batch in found.to_batches(_ROW_GROUP) if whole else found:
            batch.validate(full=True)  # pyarrow's JSON reader takes any bytes for UTF-8
            yield batch


def _dates_as_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_dates_as_text(kind.value_type)))
    return pa.struct([f.with_type(_dates_as_text(f.type)) for f in kind]) if pa.types.is_struct(kind) else kind


def _read_arrow_stream(path: str, _: bool) -> Iterator[pa.RecordBatch]:
    with _opened(path) as stream:
        yield from pa.ipc.open_stream(stream)


_Reader = Callable[[str, bool], Iterator[pa.RecordBatch]]
_READERS: dict[str, _Reader] = {"csv": _read_csv, "jsonl": _read_jsonl}


# How files of other kinds begin.
_MAGIC = {
    b"\x1f\x8b": "it is packed with gzip; name it .gz beside data.format, or unpack it",
    b"PK\x03\x04": "it is a zip archive or a spreadsheet; save it as text",
    b"PAR1": "it is a Parquet file; name it .parquet",
    b"ARROW1": "it is an Arrow file; name it .arrow",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
    b"%PDF": "it is a PDF document",
}


def _other_kind(path: str) -> str:
    """What a file is that is not of the kind its name says; "" where nobody knows."""
    with _opened(path) as stream:
        start = bytes(stream.read(8))
    return next((what for magic, what in _MAGIC.items() if start.startswith(magic)), "")


def _broken_line(path: str) -> str:
    """The first line that is no JSON object or gives a key another kind of value; "" where all are well."""
    kinds: dict[str, str] = {}
    with _opened(path) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            if line.strip() and (wrong := _wrong_with(line, kinds)):
                return f"line {number}: {wrong}"
    return ""


def _wrong_with(line: bytes, kinds: dict[str, str]) -> str:
    if line.lstrip().startswith(b"["):
        return "an array begins; write one object per line, as `jq -c .[]` does"
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return "it is not UTF-8"
    except RecursionError:
        return "it is nested too deeply"
    except json.JSONDecodeError as error:
        return f"{error.msg} at character {error.pos + 1}"
    if not isinstance(row, dict):
        return "it holds no object"
    for key, value in row.items():
        kind = _kind(value)
        if kind and kinds.setdefault(key, kind) != kind:
            return f"{key} is {kind}, and {kinds[key]} before"
    return ""


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "")


def _write(target: str, origin: str, batches: Iterator[pa.RecordBatch]) -> None:
    """Stream batches into a Parquet file that appears only when it is whole."""
    batches = map(plain, batches)
    first = next(batches, None)
    while first is not None and not first.num_rows:
        first = next(batches, None)
    if first is None:
        raise DataError(f"{origin}: has no rows; give a file that has")
    check_names(origin, first.schema)
    if not first.schema.names:
        raise DataError(f"{origin}: has no columns; give a file whose rows hold something")
    fs, path = open_uri(target)
    folder = path.rsplit("/", 1)[0]
    is_new = not _is_there(fs, folder)
    # An object appears whole, but also when the writer ends with an error.
    staged = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
    schema = first.schema.with_metadata({**(first.schema.metadata or {}), ORIGIN: origin.encode()})
    try:
        fs.create_dir(folder, recursive=True)
        with pq.ParquetWriter(staged, schema, filesystem=fs, compression="zstd") as writer:
            writer.write_batch(first.replace_schema_metadata(schema.metadata), row_group_size=_ROW_GROUP)
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata), row_group_size=_ROW_GROUP)
        fs.move(staged, path)
    except OSError as error:
        if not is_local(fs):
            raise refusal(f"output.storage: {target}", error) from error
        raise RunError(
            f"output.storage: {target} cannot be written ({os_reason(error)}); give a directory that can be"
        ) from error
    finally:
        with suppress(OSError):  # of a storage that just refused; the error above says so
            if fs.get_file_info(staged).size is not None:
                fs.delete_file(staged)
            if is_new and _is_there(fs, folder) and not _is_there(fs, path):
                fs.delete_dir(folder)  # of what was begun nothing stays


def _is_there(fs: pafs.FileSystem, path: str) -> bool:
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def _from_hub(name: str, location: str, cache: str) -> str:
    """A data set of the hub (`spec/hub.py`), or a local directory laid out like one, through `datasets`."""
    import datasets

    try:
        source, config, split = parse_hub(location)
    except ValueError as error:
        raise DataError(f"data.{name}: {error}") from error
    try:
        found = datasets.load_dataset(os.path.expanduser(source), config, split=split or name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = " ".join(str(error).split())[:200]
        raise DataError(
            f"data.{name}: {location} cannot be loaded ({what}); write hub:NAME#SPLIT, with the CONFIG it needs as "
            "hub:ORG/NAME/CONFIG#SPLIT"
        ) from error
    target = _target(cache, source.rsplit("/", 1)[-1] + ".parquet", (location, found._fingerprint))
    fs, path = open_uri(target)
    if not fs.get_file_info(path).size:
        _write(target, location, iter(found.with_format("arrow").data.table.to_batches(_ROW_GROUP)))
    return target


def _target(cache: str, file_name: str, key: tuple[object, ...]) -> str:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return join(cache, f"{digest}/{file_name.rsplit('.', 1)[0]}.parquet")
