"""Formats without footers, turned into Parquet once. Runs on the client and the head.

CSV, JSON Lines and hub data sets stream through pyarrow file by file into `<storage>/.cache/`, keyed by the file's
path, size and time, so a changed file is converted again and an unchanged one never is.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from launcher.data.files import list_files
from launcher.errors import DataError
from launcher.rundir import open_uri
from launcher.spec.hub import PREFIX, parse_hub

_ROW_GROUP = 16384


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
    ready = []
    for location in locations:
        if location.startswith(PREFIX):
            ready.append(_from_hub(name, location, cache))
            continue
        for path, _, kind in list_files(name, location, format):
            ready.append(_converted(path, kind, cache) if kind in ("csv", "jsonl") else path)
    return ready


def _converted(path: str, kind: str, cache: str) -> str:
    fs, inner = open_uri(path)
    info = fs.get_file_info(inner)
    target = _target(cache, path.rsplit("/", 1)[-1], (path, info.size, info.mtime_ns))
    if open_uri(target)[0].get_file_info(open_uri(target)[1]).size:
        return target
    try:
        with fs.open_input_stream(inner) as stream:
            _write(target, _read_csv(stream, path) if kind == "csv" else _read_jsonl(stream))
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
        what = str(error).strip().split("\n")[0][:200]
        raise DataError(f"{path}: not a readable {kind} file ({what}); mend the file, or set data.format") from error
    return target


def _read_csv(stream: "pa.NativeFile", path: str) -> Iterator[pa.RecordBatch]:
    delimiter = "\t" if path.endswith(".tsv") else ","
    # Quoted texts may hold line breaks.
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    reader = pa.csv.open_csv(stream, parse_options=parse)
    for field in reader.schema:
        if pa.types.is_binary(field.type):  # what pyarrow makes of text that is not UTF-8
            raise pa.ArrowInvalid(f"column {field.name!r} is not UTF-8")
    yield from reader


def _read_jsonl(stream: "pa.NativeFile") -> Iterator[pa.RecordBatch]:
    yield from pa.json.open_json(stream)


def _write(target: str, batches: Iterator[pa.RecordBatch]) -> None:
    """Stream batches into a Parquet file that appears only when it is whole."""
    fs, path = open_uri(target)
    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    staged = f"{path}.{os.getpid()}.tmp"
    try:
        first = next(batches, None)
        if first is None:
            raise pa.ArrowInvalid("no rows")
        with pq.ParquetWriter(staged, first.schema, filesystem=fs, compression="zstd") as writer:
            writer.write_batch(first, row_group_size=_ROW_GROUP)
            for batch in batches:
                writer.write_batch(batch, row_group_size=_ROW_GROUP)
        fs.move(staged, path)
    finally:
        if fs.get_file_info(staged).size is not None:
            fs.delete_file(staged)


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
        _write(target, iter(found.with_format("arrow").data.table.to_batches(_ROW_GROUP)))
    return target


def _target(cache: str, file_name: str, key: tuple[object, ...]) -> str:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return f"{cache}/{digest}/{file_name.rsplit('.', 1)[0]}.parquet"
