"""Conversion of formats without footers to Parquet, once per file. Runs on the client and the head.

CSV, JSON, text, Arrow streams and data sets of the Hugging Face Hub go through pyarrow, file by file, to
`<storage>/.cache/`. The key is the path, size and modification time of a file, so a changed file is converted again
and an unchanged one never. Read `csv_files.py` and `json_files.py` for the values, `splits.py` for what comes next.
"""

import hashlib
import io
import json
import os
import re
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
from launcher.data.files import ROW_GROUP, DataFile, first_line, list_files, open_data_file
from launcher.data.footers import ORIGIN, to_plain_types
from launcher.data.json_files import changed_keys, is_array, read_json
from launcher.data.splits import unique_columns
from launcher.errors import DataError, RunError
from launcher.rundir.uri import describe_os_error, is_local, join, open_uri, storage_error, translate_errors
from launcher.spec.data import COMPRESSED
from launcher.spec.hub import HUB_PREFIX, parse_hub
from launcher.tasks.params import ColumnKind

if TYPE_CHECKING:
    import datasets

# A file whose types change after its first block is read whole if it is up to this size; a compressed file counts as
# this many times its size.
_WHOLE_BYTES, _COMPRESSION = 1 << 30, 8
_TEXT_FORMATS = ("csv", "jsonl", "text")
_STREAM_MAGIC = b"\xff\xff\xff\xff"  # first bytes of an Arrow stream; an Arrow file begins with ARROW1
_UNREADABLE = (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError)
_VERSION = 2
"""Version of the conversion, part of the key: results of an older version are not used."""

Kinds = Mapping[str, ColumnKind]


def splittable_files(
    name: str, locations: Sequence[str], format: str, cache: str, kinds: Kinds | None = None
) -> list[DataFile]:
    """Return the files at some locations as Parquet or Arrow files, with the facts of their listing.

    Args:
        name: Name of the split, for messages.
        locations: Locations in the job file.
        format: Format in the job file, or `auto`.
        cache: Directory or URI for converted files.
        kinds: Kinds of the columns that the task reads; None if no task is chosen yet.

    Raises:
        DataError: A file cannot be read in its format.
    """
    ready: list[DataFile] = []
    for location in locations:
        # Not listed here: `datasets` knows which files of the repository are the split.
        if location.startswith(HUB_PREFIX):
            ready += list_files(name, _load_hub(name, location, cache, kinds or {}))
            continue
        listed = list_files(name, location, format)
        _check_one_split(name, location, listed)
        # Spark writes parts of no bytes: they have no rows, not even column names.
        for file in [file for file in listed if file.size or file.format not in _TEXT_FORMATS] or listed:
            if file.format in _TEXT_FORMATS or (
                file.format == "arrow" and _first_bytes(file.path).startswith(_STREAM_MAGIC)
            ):
                (converted,) = list_files(name, _convert(file, cache, kinds))
                ready.append(_with_short_name(converted, file))
            else:
                ready.append(_with_short_name(file, file))
    return ready


def _check_one_split(name: str, location: str, files: Sequence[DataFile]) -> None:
    """Refuse a folder with several splits of `DatasetDict.save_to_disk`: test rows would be trained on.

    Raises:
        DataError: The location is such a folder.
    """
    splits = sorted({file.relative.rpartition("/")[0] for file in files if file.format == "arrow"})
    if len(splits) > 1 and _has_content(join(location, "dataset_dict.json")):
        raise DataError(
            f"data.{name}: {location} holds the splits {', '.join(splits)} of a DatasetDict; name one of them, "
            f"{join(location, splits[-1])}"
        )


def _with_short_name(ready: DataFile, listed: DataFile) -> DataFile:
    """Return a file with its bare name as relative path, as if it had been named alone.

    The relative path is part of the fingerprint, which must not change with the directory. Folders that hold a column
    stay in it, as they are content.
    """
    if "/" not in ready.relative and not listed.partition:
        return ready
    folders = [f"{name}={value}" for name, value in listed.partition]
    relative = "/".join([*folders, ready.relative.rsplit("/", 1)[-1]])
    return ready._replace(relative=relative, partition=listed.partition)


def _convert(file: DataFile, cache: str, kinds: Kinds | None) -> str:
    """Return the path of a file's Parquet form; convert the file unless that exists.

    The result of a CSV depends on the kinds of its columns. The result of JSON does so only if a column that the task
    does not read has more than one type; otherwise all tasks share it.
    """
    name = file.relative.rsplit("/", 1)[-1]
    key = (_VERSION, file.path, file.size, file.mtime_ns)
    # Two places, so that tasks with other columns share the conversion of a file wherever it is the same for them.
    shared = _target(cache, name, key)
    own = _target(cache, name, (*key, sorted((kinds or {}).items())))
    if file.format == "csv":
        return _convert_to(own, file, kinds or {})
    if _has_content(own):
        return own
    try:
        return _convert_to(shared, file, {})
    except DataError as error:
        if file.format != "jsonl" or kinds is None:
            raise
        return _convert_mixed(own, file, kinds, error)


def _convert_mixed(target: str, file: DataFile, kinds: Kinds, error: DataError) -> str:
    """Convert a JSON file whose columns may have more than one type; `error` is that of the first attempt.

    A column that the task reads must have one type, but for what its objects hold: messages may be texts of JSON too
    (`models/conversation.py`), and OpenAI's have a text as content here and a list of parts there.

    Raises:
        DataError: An attempt failed for another reason.
    """
    mixed: set[str] = set()
    keys = changed_keys(error.__cause__ or error)
    # pyarrow names one column per error: a file with k such columns takes k + 1 attempts, the first time it is used.
    while keys and keys[0] not in mixed and (keys[0] not in kinds or (len(keys) > 1 and kinds[keys[0]] == "text")):
        mixed.add(keys[0])
        try:
            return _convert_to(target, file, kinds, mixed)
        except DataError as next_error:
            error = next_error
        keys = changed_keys(error.__cause__ or error)
    raise error


def _has_content(target: str) -> bool:
    with translate_errors(target):
        fs, inner = open_uri(target)
        return bool(fs.get_file_info(inner).size)


def _convert_to(target: str, file: DataFile, kinds: Kinds, mixed: Collection[str] = ()) -> str:
    """Convert a file to `target` unless that exists, and return `target`.

    Raises:
        DataError: The file cannot be read; the reader's error is its cause.
    """
    if _has_content(target):
        return target
    try:
        try:
            # Streaming first: it holds a block in memory, the second attempt the whole file.
            _write(target, file.path, _read_batches(file, False, kinds, mixed), kinds)
        except _UNREADABLE:
            # The types of the first block may not hold for the rest: try again with types of all rows.
            is_compressed = file.path.endswith(COMPRESSED)
            size = (file.size or 0) * (_COMPRESSION if is_compressed else 1)
            if file.format not in _TEXT_FORMATS or size > _WHOLE_BYTES:
                raise
            _write(target, file.path, _read_batches(file, True, kinds, mixed), kinds)
    except _UNREADABLE as error:
        wrong_kind = _wrong_kind(file.path)
        # What pyarrow says of a file without a byte, or of blank lines alone.
        if not wrong_kind and re.match(r"(CSV parse error: )?Empty (CSV|JSON) file", str(error)):
            raise DataError(f"{file.path}: has no rows; give a file that has") from error
        what = wrong_kind or _describe_error(file, error, mixed)
        raise DataError(
            f"{file.path}: not a readable {file.format} file ({what}); fix the file, or set data.format"
        ) from error
    return target


def _read_batches(
    file: DataFile, from_all_rows: bool, kinds: Kinds, mixed: Collection[str]
) -> Iterator[pa.RecordBatch]:
    if file.format == "csv":
        return read_csv(file.path, from_all_rows, kinds)
    if file.format == "jsonl":
        return read_json(file.path, from_all_rows, mixed)
    if file.format == "text":
        return _read_lines(file.path)
    return _read_arrow_stream(file.path)


def _read_lines(path: str) -> Iterator[pa.RecordBatch]:
    """Read lines as rows with the column `text`; blank lines are dropped."""
    with open_data_file(path) as stream, io.TextIOWrapper(stream, "utf-8-sig") as lines:
        # `utf-8-sig` drops the byte order mark that Windows writes; plain UTF-8 would keep it in the first text.
        texts = (line.rstrip("\n") for line in lines if line.strip())
        while part := list(islice(texts, ROW_GROUP)):
            yield pa.record_batch({"text": pa.array(part, pa.string())})


def _read_arrow_stream(path: str) -> Iterator[pa.RecordBatch]:
    with open_data_file(path) as stream:
        yield from pa.ipc.open_stream(stream)


def _describe_error(file: DataFile, error: Exception, mixed: Collection[str]) -> str:
    """Return what is wrong with a file; it is read once more to name the line."""
    if file.format == "jsonl" and not is_array(file.path):
        return _find_broken_line(file.path, mixed) or first_line(error)
    if "UTF" in str(error) or isinstance(error, UnicodeDecodeError):
        return f"{_find_bad_encoding(file.path) or first_line(error)}; save it as UTF-8"
    return (header_hint(file.path) if file.format == "csv" else "") or first_line(error)


def _find_bad_encoding(path: str) -> str:
    """Return a sentence with the number of the first line that is not UTF-8; "" if all lines are."""
    with open_data_file(path) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8"
    return ""


_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
# First bytes of other kinds of files.
_MAGIC = {
    b"\x1f\x8b": "it is compressed with gzip; add .gz to its name and set data.format, or decompress it",
    b"PK\x03\x04": "it is a zip archive or a spreadsheet; save it as text",
    b"PAR1": "it is a Parquet file; name it .parquet",
    b"ARROW1": "it is an Arrow file; name it .arrow",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
    b"%PDF": "it is a PDF document",
}


def _first_bytes(path: str) -> bytes:
    with open_data_file(path) as stream:
        return bytes(stream.read(8))


def _wrong_kind(path: str) -> str:
    """Return what a file is if its first bytes belong to a kind in `_MAGIC`; "" otherwise."""
    start = _first_bytes(path)
    return next((what for magic, what in _MAGIC.items() if start.startswith(magic)), "")


def _find_broken_line(path: str, mixed: Collection[str]) -> str:
    """Return what is wrong with the first line that is no JSON object or changes the kind of a key; "" if none is."""
    kinds: dict[str, str] = {}
    with open_data_file(path) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            problem = _find_problem(line, kinds, mixed) if line.strip() else ""
            if problem:
                return f"line {number}: {problem}"
    return ""


def _find_problem(line: bytes, kinds: dict[str, str], mixed: Collection[str]) -> str:
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
    for path, value in _walk_values(row):
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            return f"{path} holds half a character (\\uD800 to \\uDFFF come in pairs)"
        kind = _KINDS.get(type(value), "")
        if kind and path.split(".")[0].removesuffix("[]") not in mixed and kinds.setdefault(path, kind) != kind:
            return f"{path} is {kind}, and {kinds[path]} before"
    return ""


def _walk_values(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value within a row with the path of its keys, as `messages[].content`."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk_values(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk_values(inner, f"{path}[]")


def _write(target: str, origin: str, batches: Iterator[pa.RecordBatch], kinds: Kinds | None = None) -> None:
    """Stream batches to a Parquet file that appears only when it is whole."""
    batches = map(to_plain_types, batches)
    first = next(batches, None)
    if first is None:
        raise DataError(f"{origin}: has no rows; give a file that has")
    # Before the folder is made: a file that is refused leaves nothing behind.
    columns = unique_columns(origin, first.schema, kinds)
    if not columns.names:
        raise DataError(f"{origin}: has no columns; give a file whose rows hold something")
    fs, path = open_uri(target)
    folder = path.rsplit("/", 1)[0]
    is_new_folder = not _exists(fs, folder)
    # An object store publishes an object when the writer is closed, also by an error: write aside, then move.
    staged = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
    schema = columns.with_metadata({**(columns.metadata or {}), ORIGIN: origin.encode()})
    try:
        fs.create_dir(folder, recursive=True)
        with pq.ParquetWriter(staged, schema, filesystem=fs, compression="zstd") as writer:
            for batch in chain((first,), batches):
                selected = batch.select(schema.names) if len(batch.schema) > len(schema) else batch
                writer.write_batch(selected.replace_schema_metadata(schema.metadata), row_group_size=ROW_GROUP)
        # The rename comes last, after the writer has closed and so written the footer. A reader that finds the name
        # finds it whole, and of two processes that convert the same file either result will do.
        fs.move(staged, path)
    except OSError as error:
        if not is_local(fs):
            raise storage_error(f"output.storage: {target}", error) from error
        raise RunError(
            f"output.storage: {target} cannot be written ({describe_os_error(error)}); give a directory that can be"
        ) from error
    finally:
        # The storage may refuse this too; the error above says so.
        with suppress(OSError):
            if fs.get_file_info(staged).size is not None:
                fs.delete_file(staged)
            if is_new_folder and _exists(fs, folder) and not _exists(fs, path):
                # A failed conversion leaves nothing.
                fs.delete_dir(folder)


def _exists(fs: pafs.FileSystem, path: str) -> bool:
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def _load_hub(name: str, location: str, cache: str, kinds: Kinds) -> str:
    """Convert a data set of the Hub (`spec/hub.py`), or a local directory of its layout; return the Parquet path."""
    import datasets

    try:
        source, config, split = parse_hub(location)
    except ValueError as error:
        raise DataError(f"data.{name}: {error}") from error
    load = partial(datasets.load_dataset, os.path.expanduser(source), config, split=split or name)
    try:
        dataset = load()
        is_csv = dataset.info.builder_name == "csv"
        if is_csv:
            # A second load, as only the first one tells that the builder reads CSV, and with which columns.
            dataset = load(**_csv_options(dataset.features, kinds))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = " ".join(str(error).split())[:200]
        remedy = "write hub:NAME#SPLIT, with the CONFIG it needs as hub:ORG/NAME/CONFIG#SPLIT"
        if "load_from_disk" in what:
            what = "it is a folder of save_to_disk"
            remedy = f"write {source} alone, or the folder of a split in it"
        raise DataError(f"data.{name}: {location} cannot be loaded ({what}); {remedy}") from error
    # `datasets` 5.2 has no public name for the fingerprint of a data set.
    key = (_VERSION, location, dataset._fingerprint, sorted(kinds.items()))
    target = _target(cache, source.rsplit("/", 1)[-1] + ".parquet", key)
    if not _has_content(target):
        table = dataset.with_format("arrow").data.table
        _write(target, location, read_texts(table, kinds) if is_csv else iter(table.to_batches(ROW_GROUP)), kinds)
    return target


def _csv_options(features: "datasets.Features", kinds: Kinds) -> dict[str, object]:
    """Return options with which `datasets` reads a CSV as `csv_files.py` does: pandas would read 0123 as 123."""
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
