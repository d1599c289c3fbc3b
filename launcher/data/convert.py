"""Formats without footers, turned into Parquet once. Runs on the client and the head.

CSV, JSON Lines, Arrow streams and hub data sets go through pyarrow file by file into `<storage>/.cache/`, keyed by the
file's path, size and time, so a changed file is converted again and an unchanged one never is.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from launcher.data.csv_files import CSV_NULLS, header_hint, read_csv, read_texts
from launcher.data.files import DataFile, first_line, list_files
from launcher.data.footers import ORIGIN, plain
from launcher.data.json_files import changed_column, is_array, read_json
from launcher.data.opened import ROW_GROUP, open_data_file
from launcher.data.splits import unique_columns
from launcher.errors import DataError, RunError
from launcher.rundir.uri import describe_os_error, is_local, join, open_uri, storage_error, translate_errors
from launcher.spec.data import COMPRESSED
from launcher.spec.hub import PREFIX, parse_hub
from launcher.tasks.base import ColumnKind

if TYPE_CHECKING:
    import datasets

# A file whose types change after its first block is read whole, if it is small enough for that; packed, it is larger.
_WHOLE_BYTES, _PACKED = 1 << 30, 8
_TEXT_FORMATS = ("csv", "jsonl", "text")
_STREAM_MAGIC = b"\xff\xff\xff\xff"  # how an Arrow stream begins; an Arrow file begins with ARROW1
_UNREADABLE = (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError)
_VERSION = 2
"""Of what conversion makes of a file: what an older one made is not used."""

Kinds = Mapping[str, ColumnKind]


def convert_to_parquet(
    name: str, locations: Sequence[str], format: str, cache: str, kinds: Kinds | None = None
) -> list[str]:
    """Return the locations as paths of Parquet or Arrow files; see `splittable_files`."""
    return [file.path for file in splittable_files(name, locations, format, cache, kinds)]


def splittable_files(
    name: str, locations: Sequence[str], format: str, cache: str, kinds: Kinds | None = None
) -> list[DataFile]:
    """Return the files at some locations as Parquet or Arrow files, with what the listing tells of each.

    Args:
        name: Split, for messages.
        locations: From the job file.
        format: From the job file.
        cache: Directory or URI for converted files.
        kinds: What the columns that a task reads hold; None where no task is chosen yet.

    Raises:
        DataError: A file cannot be read in its format.
    """
    ready: list[DataFile] = []
    for location in locations:
        if location.startswith(PREFIX):
            ready += list_files(name, _from_hub(name, location, cache, kinds or {}))
            continue
        listed = list_files(name, location, format)
        _check_apart(name, location, listed)
        # Spark leaves parts of no bytes; they say nothing, not even names.
        for file in [file for file in listed if file.size or file.format not in _TEXT_FORMATS] or listed:
            if file.format in _TEXT_FORMATS or (file.format == "arrow" and _is_stream(file.path)):
                (made,) = list_files(name, _converted(file, cache, kinds))
                ready.append(_by_name(made, file))
            else:
                ready.append(_by_name(file, file))
    return ready


def _check_apart(name: str, location: str, files: Sequence[DataFile]) -> None:
    """Refuse all splits of `DatasetDict.save_to_disk` as one.

    Raises:
        DataError: The location is the folder of several.
    """
    splits = sorted({file.relative.rpartition("/")[0] for file in files if file.format == "arrow"})
    if len(splits) > 1 and _is_made(join(location, "dataset_dict.json")):
        raise DataError(
            f"data.{name}: {location} holds the splits {', '.join(splits)} of a DatasetDict; name one of them, "
            f"{join(location, splits[-1])}"
        )


def _by_name(ready: DataFile, listed: DataFile) -> DataFile:
    """Return a file by its name alone, as if it had been named: the fingerprint does not change with the directory.

    Folders that tell a column stay, as they tell what is in the file.
    """
    if "/" not in ready.relative and not listed.partition:
        return ready
    folders = [f"{name}={value}" for name, value in listed.partition]
    relative = "/".join([*folders, ready.relative.rsplit("/", 1)[-1]])
    return ready._replace(relative=relative, partition=listed.partition)


def _is_stream(path: str) -> bool:
    with open_data_file(path) as stream:
        return bool(stream.read(4) == _STREAM_MAGIC)


def _converted(file: DataFile, cache: str, kinds: Kinds | None) -> str:
    """Return the path of a file's Parquet form, made now unless it is there.

    What is made of a CSV depends on what its columns are read as; what is made of JSON only where the columns that are
    read are well and others are not.
    """
    name, key = file.relative.rsplit("/", 1)[-1], (_VERSION, file.path, file.size, file.mtime_ns)
    plain, own = _target(cache, name, key), _target(cache, name, (*key, sorted((kinds or {}).items())))
    if file.format == "csv":
        return _made(own, file, kinds or {})
    if _is_made(own):
        return own
    try:
        return _made(plain, file, {})
    except DataError as error:
        if file.format != "jsonl" or kinds is None:
            raise
        return _made_of_mixed(own, file, kinds, error)


def _made_of_mixed(target: str, file: DataFile, kinds: Kinds, error: DataError) -> str:
    """Return the path of a JSON file's Parquet form in which columns that nobody reads may have had any types.

    Raises:
        DataError: The last one, where the first or a later one is about something else.
    """
    mixed: set[str] = set()
    while (name := changed_column(error.__cause__ or error)) and name not in {*kinds, *mixed}:
        mixed.add(name)
        try:
            return _made(target, file, kinds, mixed)
        except DataError as again:
            error = again
    raise error


def _is_made(target: str) -> bool:
    with translate_errors(target):
        fs, inner = open_uri(target)
        return bool(fs.get_file_info(inner).size)


def _made(target: str, file: DataFile, kinds: Kinds, mixed: Collection[str] = ()) -> str:
    """Return the path of a converted file, which is made unless it is there.

    Raises:
        DataError: The file cannot be read; its cause is what the reader said.
    """
    if _is_made(target):
        return target
    try:
        try:
            _write(target, file.path, _batches(file, False, kinds, mixed), kinds)
        except _UNREADABLE:
            is_packed = file.path.endswith(COMPRESSED)
            if file.format not in _TEXT_FORMATS or (file.size or 0) * (_PACKED if is_packed else 1) > _WHOLE_BYTES:
                raise
            _write(target, file.path, _batches(file, True, kinds, mixed), kinds)
    except _UNREADABLE as error:
        what = _other_kind(file.path) or _what_is_wrong(file, error, mixed)
        raise DataError(
            f"{file.path}: not a readable {file.format} file ({what}); mend the file, or set data.format"
        ) from error
    return target


def _batches(file: DataFile, whole: bool, kinds: Kinds, mixed: Collection[str]) -> Iterator[pa.RecordBatch]:
    if file.format == "csv":
        return read_csv(file.path, whole, kinds)
    if file.format == "jsonl":
        return read_json(file.path, whole, mixed)
    if file.format == "text":
        return _read_lines(file.path)
    return _read_arrow_stream(file.path)


def _read_lines(path: str) -> Iterator[pa.RecordBatch]:
    """Read lines as rows with the column `text`; those without a character but blanks are left out."""
    with open_data_file(path) as stream, io.TextIOWrapper(stream, "utf-8-sig") as lines:
        texts = (line.rstrip("\n") for line in lines if line.strip())
        while part := list(islice(texts, ROW_GROUP)):
            yield pa.record_batch({"text": pa.array(part, pa.string())})


def _read_arrow_stream(path: str) -> Iterator[pa.RecordBatch]:
    with open_data_file(path) as stream:
        yield from pa.ipc.open_stream(stream)


def _what_is_wrong(file: DataFile, error: Exception, mixed: Collection[str]) -> str:
    if file.format == "jsonl" and not is_array(file.path):
        return _broken_line(file.path, mixed) or first_line(error)
    if "UTF" in str(error) or isinstance(error, UnicodeDecodeError):
        return f"{_not_utf8(file.path) or first_line(error)}; save it as UTF-8"
    return (header_hint(file.path) if file.format == "csv" else "") or first_line(error)


def _not_utf8(path: str) -> str:
    """Return which line is the first that is not UTF-8; "" where all are."""
    with open_data_file(path) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8"
    return ""


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
    with open_data_file(path) as stream:
        start = bytes(stream.read(8))
    return next((what for magic, what in _MAGIC.items() if start.startswith(magic)), "")


def _broken_line(path: str, mixed: Collection[str]) -> str:
    """The first line that is no JSON object or gives a key another kind of value; "" where all are well."""
    kinds: dict[str, str] = {}
    with open_data_file(path) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            if line.strip() and (wrong := _wrong_with(line, kinds, mixed)):
                return f"line {number}: {wrong}"
    return ""


def _wrong_with(line: bytes, kinds: dict[str, str], mixed: Collection[str]) -> str:
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
    for path, value in _cells(row):
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            return f"{path} holds half a character (\\uD800 to \\uDFFF come in pairs)"
        kind = _kind(value)
        if kind and path.split(".")[0].removesuffix("[]") not in mixed and kinds.setdefault(path, kind) != kind:
            return f"{path} is {kind}, and {kinds[path]} before"
    return ""


def _cells(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value within a row with the path of its keys, as `messages[].content`."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _cells(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _cells(inner, f"{path}[]")


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "")


def _write(target: str, origin: str, batches: Iterator[pa.RecordBatch], kinds: Kinds | None = None) -> None:
    """Stream batches into a Parquet file that appears only when it is whole."""
    batches = map(plain, batches)
    first = next(batches, None)
    if first is None:
        raise DataError(f"{origin}: has no rows; give a file that has")
    columns = unique_columns(origin, first.schema, kinds)
    if not columns.names:
        raise DataError(f"{origin}: has no columns; give a file whose rows hold something")
    fs, path = open_uri(target)
    folder = path.rsplit("/", 1)[0]
    is_new = not _is_there(fs, folder)
    # An object appears whole, but also when the writer ends with an error.
    staged = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
    schema = columns.with_metadata({**(columns.metadata or {}), ORIGIN: origin.encode()})
    try:
        fs.create_dir(folder, recursive=True)
        with pq.ParquetWriter(staged, schema, filesystem=fs, compression="zstd") as writer:
            for batch in chain((first,), batches):
                kept = batch.select(schema.names) if len(batch.schema) > len(schema) else batch
                writer.write_batch(kept.replace_schema_metadata(schema.metadata), row_group_size=ROW_GROUP)
        fs.move(staged, path)
    except OSError as error:
        if not is_local(fs):
            raise storage_error(f"output.storage: {target}", error) from error
        raise RunError(
            f"output.storage: {target} cannot be written ({describe_os_error(error)}); give a directory that can be"
        ) from error
    finally:
        with suppress(OSError):  # of a storage that just refused; the error above says so
            if fs.get_file_info(staged).size is not None:
                fs.delete_file(staged)
            if is_new and _is_there(fs, folder) and not _is_there(fs, path):
                fs.delete_dir(folder)  # of what was begun nothing stays


def _is_there(fs: pafs.FileSystem, path: str) -> bool:
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def _from_hub(name: str, location: str, cache: str, kinds: Kinds) -> str:
    """Return the path of a data set of the hub (`spec/hub.py`), or of a local directory laid out like one."""
    import datasets

    try:
        source, config, split = parse_hub(location)
    except ValueError as error:
        raise DataError(f"data.{name}: {error}") from error
    load = partial(datasets.load_dataset, os.path.expanduser(source), config, split=split or name)
    try:
        found = load()
        is_csv = found.info.builder_name == "csv"
        if is_csv:
            found = load(**_as_texts(found.features, kinds))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = " ".join(str(error).split())[:200]
        remedy = "write hub:NAME#SPLIT, with the CONFIG it needs as hub:ORG/NAME/CONFIG#SPLIT"
        if "load_from_disk" in what:
            what, remedy = "it is a folder of save_to_disk", f"write {source} alone, or the folder of a split in it"
        raise DataError(f"data.{name}: {location} cannot be loaded ({what}); {remedy}") from error
    key = (_VERSION, location, found._fingerprint, sorted(kinds.items()))
    target = _target(cache, source.rsplit("/", 1)[-1] + ".parquet", key)
    if not _is_made(target):
        table = found.with_format("arrow").data.table
        _write(target, location, read_texts(table, kinds) if is_csv else iter(table.to_batches(ROW_GROUP)), kinds)
    return target


def _as_texts(features: "datasets.Features", kinds: Kinds) -> dict[str, object]:
    """Return how `datasets` has to read a CSV so that its cells keep their text; pandas would take 0123 for 123."""
    import datasets

    names = [
        name
        for name, feature in features.items()
        if kinds.get(name, "text" if feature.dtype in ("int64", "float64") else "number") != "number"
    ]
    others = dict.fromkeys(set(features) - set(names), CSV_NULLS.to_pylist())
    texts = {name: datasets.Value("string") if name in names else features[name] for name in features}
    return {"features": datasets.Features(texts), "keep_default_na": False, "na_values": others}


def _target(cache: str, file_name: str, key: tuple[object, ...]) -> str:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return join(cache, f"{digest}/{file_name.rsplit('.', 1)[0]}.parquet")
