"""Files that the cells of a table name (pictures), read from the directories of the data only.

Runs in data workers, in train workers (pictures for the report) and on the client. Data sets are not trusted: a cell
might name a private file of the machine, a server of the network, or a protocol that runs code. So a cell may only name
files below the directories of the job's data and of `data.files_below`.
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
from launcher.spec.hub import HUB_PREFIX

# Others are refused: http fetches from anywhere, fsspec's `reference::` and `zip::` chain to any of them.
_SCHEMES = ("s3", "gs", "gcs", "abfs", "hdfs", "file")
_SAME = {"gcs": "gs"}


@dataclass(frozen=True)
class CellSource:
    """Directories from which file names in cells may be read.

    Args:
        local: Local directories, with symbolic links resolved.
        remote: (URI, options) of each remote directory; a cell below it may have these options or none.
    """

    local: tuple[str, ...] = ()
    remote: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_data(cls, data: DataSpec) -> "CellSource":
        """Return the directories of a job's data and its `data.files_below`."""
        locations = [place for split in ("train", "validation", "test") for place in data.locations(split)]
        roots = [_directory(location) for location in locations if not location.startswith(HUB_PREFIX)]
        roots += data.files_below
        # Links are resolved on both sides: a directory may itself be a link, and a cell must not leave it by one.
        local = (os.path.realpath(open_uri(root)[1]) for root in roots if _is_path(root))
        split = (split_options(root) for root in roots if not _is_path(root))
        remote = ((_normalized(uri), options) for uri, options in split)
        return cls(tuple(dict.fromkeys(local)), tuple(dict.fromkeys(remote)))

    def holds_path(self, path: str) -> bool:
        """Return whether a local path is below one of the directories after resolving symbolic links."""
        real = os.path.realpath(path)
        # With the slash: /data must not admit /data-private.
        return any(real.startswith(f"{root.rstrip('/')}/") for root in self.local)

    def holds_uri(self, uri: str) -> bool:
        """Return whether a URI is below one of the remote directories, on the same server and account."""
        bare, options = split_options(uri)
        # Stores may resolve `..`, encoded or not.
        if ".." in unquote(bare).split("/"):
            return False
        uri = _normalized(bare)
        # Other options could name another server or account: a cell must not choose where files come from.
        return any(uri.startswith(f"{root}/") and options in ("", known) for root, known in self.remote)


def read_cell(cell: object, source: CellSource) -> bytes:
    """Return the content of the file in a cell, or of the file that the cell names.

    Args:
        cell: Content; a path or URI; or {bytes, path} as `datasets` stores files.
        source: Directories from which files may be read.

    Raises:
        ValueError: There is no file, it is outside of the directories, or it cannot be read; the row is bad.
        StorageUnavailableError: The storage does not answer for now; the row may be good.
    """
    if isinstance(cell, dict):
        if not {"bytes", "path"} & set(cell):
            raise ValueError(f"holds {', '.join(map(str, cell))}, but neither bytes nor path")
        # `datasets` keeps both keys, and often fills one only; content needs no reading.
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise ValueError("is null" if cell is None else f"is {type(cell).__name__}, which is not a file")
    scheme, mark, _ = cell.partition("://")
    # Before anything is opened: opening alone may send a request.
    if (mark and scheme not in _SCHEMES) or "::" in cell:
        kinds = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ValueError(
            f"is {show_value(cell)}, and files are read from paths and {kinds} alone; copy it to one of them"
        )
    try:
        return _read(cell, source)
    # Not a bad row: dropping rows because a store is busy would change the training data.
    except StorageUnavailableError:
        raise
    except (OSError, RunError) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise storage_error(cell, error) from error
        reason = describe_os_error(error) if isinstance(error, OSError) else error.message
        raise ValueError(f"is {show_value(cell)}, which cannot be read ({reason})") from error


def _read(cell: str, source: CellSource) -> bytes:
    if not (source.holds_path(open_uri(cell)[1]) if _is_path(cell) else source.holds_uri(cell)):
        raise ValueError(
            f"is {show_value(cell)}, which is outside of the directories of the data; if you trust the authors of the "
            "data, add its directory to data.files_below"
        )
    fs, path = open_uri(cell)
    # Reading a device or a pipe might never end.
    if is_local(fs) and not os.path.isfile(path):
        raise ValueError(f"is {show_value(cell)}, which is not a file of this machine")
    with fs.open_input_file(path) as file:
        return bytes(file.read())


def _directory(location: str) -> str:
    """Return the directory of a file or glob, or the directory itself."""
    if _is_path(location):
        path = open_uri(location)[1]
        if os.path.exists(path):
            return location if os.path.isdir(path) else os.path.dirname(path)
    bare, options = split_options(location) if not _is_path(location) else (location, "")
    # A glob may match files of several directories: what lies before its first wildcard holds all of them.
    glob_start = min((index for index in map(bare.find, "*?[") if index >= 0), default=None)
    if glob_start is not None:
        return (bare[:glob_start].rpartition("/")[0] or ("/" if bare.startswith("/") else ".")) + options
    return parent(location) if os.path.splitext(bare)[1].lower() in {*SUFFIXES, *COMPRESSED} else location


def _is_path(location: str) -> bool:
    return "://" not in location or location.startswith("file://")


def _normalized(uri: str) -> str:
    scheme, mark, rest = uri.rstrip("/").partition("://")
    return f"{_SAME.get(scheme, scheme)}{mark}{rest}"
