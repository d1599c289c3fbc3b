"""Data files of a location (a file, a directory or a glob, local or remote), and how to open them.

Runs on the client and the head. Read `splits.py` next for the rows in them.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from launcher.errors import DataError, RunError
from launcher.rundir.uri import describe_os_error, open_uri
from launcher.spec.data import COMPRESSED, SUFFIXES

# A row must fit into a block: pyarrow's CSV and JSON readers do not join blocks, and infer types from the first one.
BLOCK_BYTES = 8 << 20
ROW_GROUP = 16384
"""Rows of a batch and of a Parquet row group that conversion writes."""


class DataFile(NamedTuple):
    """A file of a split."""

    path: str
    relative: str
    """Path relative to the location that names the file."""
    format: str
    size: int | None = None
    """Size in bytes."""
    mtime_ns: int | None = None
    partition: tuple[tuple[str, str | None], ...] = ()
    """Columns and values in the names of the folders below the location, as Hive writes them: `label=pos`."""


class _Listing(NamedTuple):
    """Files of one location."""

    infos: list[pafs.FileInfo]
    base: str
    """Directory that relative paths start from."""
    is_file: bool
    """The location names one file."""


# Metadata files that `datasets` writes next to the rows.
_SIDECARS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json"))
# A folder with `job.yaml` and one of these is a run; a folder with `config.json` and one of the others is a model.
_RUN = ("plan.json", "sweep.json", "sweep/sweep.json")
_MODEL = (
    "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
)  # fmt: skip
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def list_files(name: str, location: str, format: str = "auto") -> list[DataFile]:
    """Return the data files at a location, sorted by path.

    The order of the files is part of the fingerprint and of the row ids, so it must not depend on the file system.

    Args:
        name: Name of the split, for messages.
        location: File, directory or glob; local or a URI.
        format: Format of all files, or `auto` to tell it from their names.

    Raises:
        DataError: The location does not exist, cannot be listed, or has no data files.
    """
    scheme = location.split("://", 1)[0] + "://" if "://" in location else ""
    # In a URI a question mark begins options of the storage (region, endpoint_override), which every file needs.
    bare, mark, options = location.partition("?") if scheme else (location, "", "")
    query = mark + options
    try:
        is_glob = any(c in bare for c in "*?[") and not _exists(location)
        listing = _list_glob(bare, scheme, query) if is_glob else _list_path(location)
    except RunError as error:  # no such protocol
        raise DataError(f"data.{name}: {error.message}") from error
    except (re.error, pa.ArrowInvalid) as error:
        raise DataError(f"data.{name}: {location} is no path or glob ({first_line(error)}); fix it") from error
    except FileNotFoundError as error:
        where = f"data.{name}: {location} does not exist"
        raise DataError(f"{where}; give a file, a directory or a glob that does") from error
    except OSError as error:
        where = f"data.{name}: {location} cannot be listed ({describe_os_error(error)})"
        raise DataError(f"{where}; check the address, the network and your rights") from error
    head = _uri_head(bare, scheme, listing.base)
    files = [_data_file(info, head, listing.base, query, format) for info in listing.infos]
    if format == "auto" and not listing.is_file:
        known = [file for file in files if file.format]
        # Next to other data, a text file is a README or a licence.
        files = [file for file in known if file.format != "text"] or known
    unknown = [file.path for file in files if not file.format]
    if unknown or not files:
        empty = "matches no data files" if is_glob else "holds no data files"
        what = f"{unknown[0]} has no known ending" if unknown else f"{location} {empty}"
        if not unknown and any(info.path.lower().endswith(PICTURE_SUFFIXES) for info in listing.infos):
            raise DataError(
                f"data.{name}: {location} holds pictures and no table of them; where their folders are the classes, "
                f"write hub:{location}#train"
            )
        raise DataError(f"data.{name}: {what} ({', '.join(SUFFIXES)}); name the files so, or set data.format")
    return files


@contextmanager
def errors_without_keys(name: str, *, can_set_format: bool = False) -> Iterator[None]:
    """Raise DataErrors without the key of a location that stands on the command line, not in a job file.

    Args:
        name: Name of the split in the messages.
        can_set_format: True if the command takes `data.format` as a change.
    """
    try:
        yield
    except DataError as error:
        message = error.message.removeprefix(f"data.{name}: ")
        if not can_set_format:
            message = re.sub(r",? (or|and) set data\.format", "", message)
        raise DataError(message) from error


@contextmanager
def open_data_file(path: str) -> Iterator[pa.NativeFile]:
    """Open a file as a stream of bytes, decompressed as its ending says.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        fs, inner = open_uri(path)
        # pyarrow decompresses `.gz`, `.bz2` and `.zst` by their ending; `open_input_file` would not.
        with fs.open_input_stream(inner) as stream:
            yield stream
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({describe_os_error(error)}); check the file and your rights"
        ) from error


def _data_file(info: pafs.FileInfo, head: str, base: str, query: str, format: str) -> DataFile:
    relative = info.path[len(base) :].lstrip("/")
    path = head + info.path + query
    return DataFile(
        path, relative, _file_format(info.path, format), info.size, info.mtime_ns, _parse_partition(relative)
    )


def _parse_partition(relative: str) -> tuple[tuple[str, str | None], ...]:
    if "=" not in relative:
        return ()
    pairs = [folder.partition("=") for folder in relative.split("/")[:-1]]
    return tuple((unquote(k), None if v == _HIVE_NULL else unquote(v)) for k, equals, v in pairs if k and equals)


def _uri_head(bare: str, scheme: str, base: str) -> str:
    """Return what a URI has before the paths of its file system: the scheme, and an account or host if it has one."""
    begin = bare.find(base, len(scheme)) if scheme else -1
    return bare[:begin] if begin >= 0 else scheme


def _list_path(location: str) -> _Listing:
    fs, path = open_uri(location)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        return _Listing([info], path.rsplit("/", 1)[0], is_file=True)
    if info.type == pafs.FileType.Unknown:
        raise OSError("it is a device or a pipe, neither file nor directory")
    # Raises FileNotFoundError if the path does not exist.
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    return _Listing(_data_infos(infos, path), path.rstrip("/"), is_file=False)


def _list_glob(location: str, scheme: str, query: str) -> _Listing:
    fixed = location[: min(i for i in map(location.find, "*?[") if i >= 0)].rpartition("/")[0]
    fs, root = open_uri((fixed + query) if fixed else ("/" if location.startswith("/") else "."))
    pattern = location[len(_uri_head(location, scheme, root)) :] if scheme else open_uri(location)[1]
    is_deep = "/" in location[len(fixed) :].lstrip("/") or "**" in location
    # One listing of the folder that no wildcard reaches; a pattern without `/` or `**` behind it needs no folders
    # below.
    infos = fs.get_file_info(pafs.FileSelector(root, recursive=is_deep))
    matches = glob_pattern(pattern).fullmatch
    return _Listing([info for info in _data_infos(infos, root) if matches(info.path)], root.rstrip("/"), is_file=False)


def _data_infos(infos: Sequence[pafs.FileInfo], root: str) -> list[pafs.FileInfo]:
    """Return the visible files that may hold rows, sorted by path."""
    files = [(info.path, info) for info in infos if info.type == pafs.FileType.File]
    # By code points, in no locale: the order is part of the row ids and must be the same on every machine.
    visible = [(path, info) for path, info in sorted(files, key=lambda pair: pair[0]) if not _is_hidden(path, root)]
    excluded = _excluded_prefixes({path for path, _ in files}, root.rstrip("/"))
    return [info for path, info in visible if not (excluded and path.startswith(excluded))]


def _excluded_prefixes(paths: set[str], root: str) -> tuple[str, ...]:
    """Return prefixes of paths that hold no rows: metadata of `datasets`, and folders of runs and models.

    A folder of predictions is excluded too, unless the location names it.
    """
    excluded = []
    saved_folders = {path.rpartition("/")[0] for path in paths if path.endswith(".arrow")}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name in _SIDECARS or (name == "state.json" and folder in saved_folders):
            excluded.append(path)
        if name == "_predictions.json" and folder != root:
            excluded.append(f"{folder}/")
        marks = {"job.yaml": _RUN, "config.json": _MODEL, "adapter_config.json": ("adapter_config.json",)}.get(name, ())
        if any(f"{folder}/{mark}" in paths for mark in marks):
            excluded.append(f"{folder}/")
    return tuple(excluded)


_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Translate a glob into a regular expression: `*` and `?` stay in one directory, `**` crosses directories."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^/\]]+\])", glob)
    regex = "".join(_WILDCARDS.get(part) or _character_class(part) or re.escape(part) for part in parts)
    return re.compile(regex, re.DOTALL)


def _character_class(part: str) -> str:
    """Translate `[a-z]` or `[!a-z]`; return "" for anything else."""
    if not (part.startswith("[") and part.endswith("]")):
        return ""
    is_negated = part[1] == "!"
    return f"[{'^' if is_negated else ''}{re.escape(part[1 + is_negated : -1]).replace(chr(92) + '-', '-')}]"


def _exists(location: str) -> bool:
    """Return True if a path with brackets or stars in its name exists as it stands; then it is no glob."""
    fs, path = open_uri(location)
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def _is_hidden(path: str, root: str) -> bool:
    below = path[len(root) :]
    if "_" not in below and "/." not in below:  # saves the split for nearly all of 100,000 files
        return False
    return any(part.startswith(("_", ".")) for part in below.split("/"))


def _file_format(path: str, format: str) -> str:
    """Return the format that a file's name tells, "" for an unknown one; only text formats may be compressed."""
    if format != "auto":
        return format
    name = path.rsplit("/", 1)[-1].lower()
    bare = name.removesuffix(next(filter(name.endswith, COMPRESSED), ""))
    known = SUFFIXES.get("." + bare.rsplit(".", 1)[-1], "") if "." in bare else ""
    return known if bare == name or known in ("csv", "jsonl", "text") else ""


INTEGER = r"^(?:0|-?[1-9][0-9]{0,17})$"
"""Pattern of texts that are the one way to write an int64: no leading zeros, no plus sign, no decimal point."""


def is_integer(text: str) -> bool:
    """Return whether a text is exactly how its integer is written."""
    return re.match(INTEGER, text) is not None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, shortened and without control characters of a terminal."""
    line = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
    return "".join(c if c.isprintable() else "?" for c in line)
