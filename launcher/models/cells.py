"""Files that the cells of a table name (pictures): read only where the data lie. Runs in data workers and the client.

Data are not trusted: a cell might name a file of the machine, a server of the network, or a protocol that runs what it
finds. So a cell may name what lies below the directories of the job's data, and of `data.files_below`, alone.
"""

import os
from dataclasses import dataclass
from urllib.parse import unquote

from launcher.errors import RunError, StorageUnavailableError
from launcher.formatting import show_value
from launcher.rundir.uri import (
    describe_os_error,
    is_local,
    is_transient,
    open_uri,
    parent,
    split_options,
    storage_error,
)
from launcher.spec.data import COMPRESSED, SUFFIXES, DataSpec
from launcher.spec.hub import PREFIX

# Other protocols fetch from anywhere, or run what they find there.
_SCHEMES = ("s3", "gs", "gcs", "abfs", "hdfs", "file")
_SAME = {"gcs": "gs"}


@dataclass(frozen=True)
class CellSource:
    """Where the files that cells name may lie.

    Args:
        local: Directories of this machine, without links in their paths.
        remote: URIs without options, and the options that a cell below each may have.
    """

    local: tuple[str, ...] = ()
    remote: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, data: DataSpec) -> "CellSource":
        """Return the directories in which the data of a job lie, and those that the job adds."""
        locations = (*data.train, *(data.validation or ()), *(data.test or ()))
        roots = [_directory(location) for location in locations if not location.startswith(PREFIX)]
        roots += data.files_below
        local = (os.path.realpath(open_uri(root)[1]) for root in roots if _is_path(root))
        remote = (split_options(root) for root in roots if not _is_path(root))
        return cls(tuple(dict.fromkeys(local)), tuple(dict.fromkeys((_plain(uri), options) for uri, options in remote)))

    def holds_path(self, path: str) -> bool:
        """Return whether a local path lies below one of the directories, when its links are followed."""
        real = os.path.realpath(path)
        return any(real.startswith(f"{root.rstrip('/')}/") for root in self.local)

    def holds_uri(self, uri: str) -> bool:
        """Return whether a URI lies below one of the URIs, on the same server and for the same account."""
        bare, options = split_options(uri)
        if ".." in unquote(bare).split("/"):
            return False
        plain = _plain(bare)
        return any(plain.startswith(f"{root}/") and options in ("", known) for root, known in self.remote)


def cell_bytes(cell: object, places: CellSource) -> bytes:
    """Return the file in a cell, or the one that the cell names.

    Args:
        cell: Content; a path or URI; or {bytes, path} as `datasets` stores files.
        places: Where the file may lie.

    Raises:
        ValueError: There is none, it lies elsewhere, or it cannot be read.
        StorageUnavailableError: Its storage does not answer, for now, which says nothing of the file.
    """
    if isinstance(cell, dict):
        if not {"bytes", "path"} & set(cell):
            raise ValueError(f"holds {', '.join(map(str, cell))}, but neither bytes nor path")
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise ValueError("is null" if cell is None else f"is {type(cell).__name__}, which is no file")
    scheme, mark, _ = cell.partition("://")
    if (mark and scheme not in _SCHEMES) or "::" in cell:
        kinds = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ValueError(
            f"is {show_value(cell)}, and files are read from paths and {kinds} alone; copy it to one of them"
        )
    try:
        return _read(cell, places)
    except StorageUnavailableError:
        raise
    except (OSError, RunError) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise storage_error(cell, error) from error
        reason = describe_os_error(error) if isinstance(error, OSError) else error.message
        raise ValueError(f"is {show_value(cell)}, which cannot be read ({reason})") from error


def _read(cell: str, places: CellSource) -> bytes:
    if not (places.holds_path(open_uri(cell)[1]) if _is_path(cell) else places.holds_uri(cell)):
        raise ValueError(
            f"is {show_value(cell)}, which lies outside of the directories of the data; if you trust whoever wrote "
            "them, add its directory to data.files_below"
        )
    fs, path = open_uri(cell)
    if is_local(fs) and not os.path.isfile(path):  # a device or a pipe might never end
        raise ValueError(f"is {show_value(cell)}, which is no file here")
    with fs.open_input_file(path) as file:
        return bytes(file.read())


def _directory(location: str) -> str:
    """Return the directory of a file or glob; a directory itself."""
    if _is_path(location):
        path = open_uri(location)[1]
        if os.path.exists(path):
            return location if os.path.isdir(path) else os.path.dirname(path)
    bare, options = split_options(location) if not _is_path(location) else (location, "")
    begin = min((place for place in map(bare.find, "*?[") if place >= 0), default=None)
    if begin is not None:
        return (bare[:begin].rpartition("/")[0] or ("/" if bare.startswith("/") else ".")) + options
    return parent(location) if os.path.splitext(bare)[1].lower() in {*SUFFIXES, *COMPRESSED} else location


def _is_path(location: str) -> bool:
    return "://" not in location or location.startswith("file://")


def _plain(uri: str) -> str:
    scheme, mark, rest = uri.rstrip("/").partition("://")
    return f"{_SAME.get(scheme, scheme)}{mark}{rest}"
