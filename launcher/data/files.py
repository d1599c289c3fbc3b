"""Which files a location of the job file means: a file, a directory or a glob, local or remote. Client and head.

Read `splits.py` next for what is in them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from launcher.errors import DataError, RunError
from launcher.rundir.uri import describe_os_error, open_uri
from launcher.spec.data import COMPRESSED, SUFFIXES


class DataFile(NamedTuple):
    """A file of a split."""

    path: str
    relative: str
    """To the location that names it."""
    format: str
    size: int | None = None
    """In bytes."""
    mtime_ns: int | None = None
    partition: tuple[tuple[str, str | None], ...] = ()
    """Columns that the folders below the location tell, as Hive writes them: `label=pos`."""


# What `datasets` leaves beside rows.
_SIDECARS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json"))
# Files that make the folder of `job.yaml`, or of `config.json`, one of a run or of a model.
_RUN = ("plan.json", "sweep.json", "sweep/sweep.json")
_MODEL = (
    "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
)  # fmt: skip
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def list_files(name: str, location: str, format: str = "auto") -> list[DataFile]:
    """The data files at a location, sorted by path.

    Args:
        name: the split, for messages.
        location: a file, directory or glob; local or a URI.
        format: a format for all files, or `auto` to read it off their names.
    """
    scheme = location.split("://", 1)[0] + "://" if "://" in location else ""
    # In a URI a question mark begins options of the storage (region, endpoint_override), which every file needs.
    bare, mark, options = location.partition("?") if scheme else (location, "", "")
    query = mark + options
    try:
        is_glob = any(c in bare for c in "*?[") and not _exists(location)
        found, base, is_file = _globbed(bare, scheme, query) if is_glob else _listed(location)
    except (RunError, re.error, pa.ArrowInvalid) as error:  # no such protocol, no glob, no path
        what = error.message if isinstance(error, RunError) else f"{location} is no path or glob ({first_line(error)})"
        raise DataError(f"data.{name}: {what}{'' if isinstance(error, RunError) else '; mend it'}") from error
    except FileNotFoundError as error:
        where = f"data.{name}: {location} does not exist"
        raise DataError(f"{where}; give a file, a directory or a glob that does") from error
    except OSError as error:
        where = f"data.{name}: {location} cannot be listed ({describe_os_error(error)})"
        raise DataError(f"{where}; check the address, the network and your rights") from error
    head = _head(bare, scheme, base)
    chosen = [_data_file(info, (head, base, query), format) for info in found]
    if format == "auto" and not is_file:
        known = [file for file in chosen if file.format]
        # Beside data, a text is a README or a licence.
        chosen = [file for file in known if file.format != "text"] or known
    unknown = [file.path for file in chosen if not file.format]
    if unknown or not chosen:
        nothing = "matches no data files" if is_glob else "holds no data files"
        what = f"{unknown[0]} has no known ending" if unknown else f"{location} {nothing}"
        if not unknown and any(info.path.lower().endswith(PICTURE_SUFFIXES) for info in found):
            raise DataError(
                f"data.{name}: {location} holds pictures and no table of them; where their folders are the classes, "
                f"write hub:{location}#train"
            )
        raise DataError(f"data.{name}: {what} ({', '.join(SUFFIXES)}); name the files so, or set data.format")
    return chosen


def _data_file(info: pafs.FileInfo, around: tuple[str, str, str], format: str) -> DataFile:
    head, base, query = around
    path = info.path
    relative = path[len(base) :].lstrip("/")
    kind, partition = _format_of(path, format), _partition(relative)
    return DataFile(head + path + query, relative, kind, info.size, info.mtime_ns, partition)


def _partition(relative: str) -> tuple[tuple[str, str | None], ...]:
    if "=" not in relative:
        return ()
    pairs = [folder.partition("=") for folder in relative.split("/")[:-1]]
    return tuple((unquote(k), None if v == _HIVE_NULL else unquote(v)) for k, equals, v in pairs if k and equals)


def _head(bare: str, scheme: str, base: str) -> str:
    """What a URI has before the paths of its file system: the scheme, with an account or a host where there is one."""
    begin = bare.find(base, len(scheme)) if scheme else -1
    return bare[:begin] if begin >= 0 else scheme


def _listed(location: str) -> tuple[list[pafs.FileInfo], str, bool]:
    """(files, the directory they are in, whether the location is a file itself)."""
    fs, path = open_uri(location)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [info], path.rsplit("/", 1)[0], True
    if info.type == pafs.FileType.Unknown:
        raise OSError("it is a device or a pipe, neither file nor directory")
    # Raises FileNotFoundError where nothing is.
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    return _files(found, path), path.rstrip("/"), False


def _globbed(location: str, scheme: str, query: str) -> tuple[list[pafs.FileInfo], str, bool]:
    fixed = location[: min(i for i in map(location.find, "*?[") if i >= 0)].rpartition("/")[0]
    fs, root = open_uri((fixed + query) if fixed else ("/" if location.startswith("/") else "."))
    pattern = location[len(_head(location, scheme, root)) :] if scheme else open_uri(location)[1]
    deep = "/" in location[len(fixed) :].lstrip("/") or "**" in location
    found = fs.get_file_info(pafs.FileSelector(root, recursive=deep))
    matches = glob_pattern(pattern).fullmatch
    return [info for info in _files(found, root) if matches(info.path)], root.rstrip("/"), False


def _files(found: Sequence[pafs.FileInfo], root: str) -> list[pafs.FileInfo]:
    kept = [(i.path, i) for i in found if i.type == pafs.FileType.File]
    shown = [(path, info) for path, info in sorted(kept, key=lambda pair: pair[0]) if not _hidden(path, root)]
    others = _not_data({path for path, _ in kept}, root.rstrip("/"))
    return [info for path, info in shown if not (others and path.startswith(others))]


def _not_data(paths: set[str], root: str) -> tuple[str, ...]:
    """Return what some paths begin with that hold no rows: what `datasets` notes, and folders of runs and models.

    Predictions are data where their folder itself is named.
    """
    found, saved = [], {path.rpartition("/")[0] for path in paths if path.endswith(".arrow")}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name in _SIDECARS or (name == "state.json" and folder in saved):
            found.append(path)
        if name == "_predictions.json" and folder != root:
            found.append(f"{folder}/")
        marks = {"job.yaml": _RUN, "config.json": _MODEL, "adapter_config.json": ("adapter_config.json",)}.get(name, ())
        if any(f"{folder}/{mark}" in paths for mark in marks):
            found.append(f"{folder}/")
    return tuple(found)


_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `*` and `?` stay in one directory, `**` crosses them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^/\]]+\])", glob)
    return re.compile("".join(_WILDCARDS.get(part) or _class_of(part) or re.escape(part) for part in parts), re.DOTALL)


def _class_of(part: str) -> str:
    """`[a-z]` and `[!a-z]`; "" for anything else."""
    if not (part.startswith("[") and part.endswith("]")):
        return ""
    negated = part[1] == "!"
    return f"[{'^' if negated else ''}{re.escape(part[1 + negated : -1]).replace(chr(92) + '-', '-')}]"


def _exists(location: str) -> bool:
    """Whether a path with brackets or stars in its name is there as it stands; then it is no glob."""
    fs, path = open_uri(location)
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def _hidden(path: str, root: str) -> bool:
    below = path[len(root) :]
    if "_" not in below and "/." not in below:
        return False
    return any(part.startswith(("_", ".")) for part in path[len(root) :].split("/"))


def _format_of(path: str, format: str) -> str:
    if format != "auto":
        return format
    name = path.rsplit("/", 1)[-1].lower()
    bare = name.removesuffix(next(filter(name.endswith, COMPRESSED), ""))
    found = SUFFIXES.get("." + bare.rsplit(".", 1)[-1], "") if "." in bare else ""
    return found if bare == name or found in ("csv", "jsonl", "text") else ""


INTEGER = r"^(?:0|-?[1-9][0-9]{0,17})$"
"""Text that an integer is written as, and no other text."""


def is_integer(text: str) -> bool:
    """Return whether a text is what its integer is written as."""
    return re.match(INTEGER, text) is not None


def first_line(error: BaseException) -> str:
    """What a library said, short enough for a message and free of what a terminal would take for commands."""
    line = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
    return "".join(c if c.isprintable() else "?" for c in line)
