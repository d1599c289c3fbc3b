"""Check that runs can be written to `output.storage`, before any work is done. Runs on the client."""

import errno
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from launcher.errors import RunError
from launcher.rundir.uri import describe_os_error, is_local, open_uri, translate_errors

# Size of a run's first records. A disk with less free space counts as full.
_PROBE_BYTES = 1 << 16
# Errors of file systems without O_TMPFILE.
_NO_PROBE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_REMEDY = "give a directory that can be written"
_NO_STORAGE = {"http://": "a web server takes no files", "https://": "a web server takes no files",
               "hub:": "a data set of the hub takes no files"}  # fmt: skip


def check_storage(storage: str) -> None:
    """Check that a run can be written to a storage, without creating anything.

    Local directories are tested with an unnamed temporary file (O_TMPFILE), object stores by listing.

    Raises:
        RunError: The storage, or its nearest existing parent directory, is a file, full or read-only; the URI is
            incomplete; or the server does not answer, has no such bucket, or denies access.
    """
    for start, why in _NO_STORAGE.items():
        if storage.startswith(start):
            raise RunError(f"output.storage: {storage} cannot be written ({why}); {_REMEDY}, or a URI such as s3://")
    try:
        fs, path = open_uri(storage)
    except (OSError, pa.ArrowException) as error:
        raise _cannot_be_opened(storage, " ".join(str(error).split())[:200]) from error
    except RunError as error:
        if isinstance(error.__cause__, OSError) and not storage.startswith("s3://"):
            raise _cannot_be_opened(storage, describe_os_error(error.__cause__)) from error
        raise RunError(f"output.storage: {error.message}") from error
    if "://" in storage and not storage.partition("://")[2].strip("/"):
        raise RunError(
            f"output.storage: {storage} names no directory; write it as {storage.rstrip('/')}//BUCKET/FOLDER"
        )
    if is_local(fs):
        _check_local(Path(path))
        return
    try:
        with translate_errors(f"output.storage: {storage}"):
            # A listing asks the server for bucket and permission. It cannot show whether writing is allowed.
            fs.get_file_info(pafs.FileSelector(path))
    except FileNotFoundError:
        # A directory that is missing is no problem: the first write creates it.
        pass


def _cannot_be_opened(storage: str, reason: str) -> RunError:
    return RunError(f"output.storage: {storage} cannot be opened ({reason}); fix the URI, or install its driver")


def _check_local(place: Path) -> None:
    """Check the nearest existing directory at or above a local storage."""
    try:
        while not place.exists():
            # `exists` follows links, so a broken one looks like a missing directory, and creating that would fail.
            if place.is_symlink():
                raise RunError(
                    f"output.storage: {place} is a link to {os.readlink(place)}, which does not exist; {_REMEDY}"
                )
            place = place.parent
    except OSError as error:
        raise RunError(f"output.storage: {place} cannot be used ({describe_os_error(error)}); {_REMEDY}") from error
    if not place.is_dir():
        raise RunError(f"output.storage: {place} is a file; {_REMEDY}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"output.storage: {place} cannot be written (no permission); {_REMEDY}")
    try:
        _probe(place)
    except OSError as error:
        if error.errno not in _NO_PROBE:
            raise RunError(
                f"output.storage: {place} cannot be written ({describe_os_error(error)}); {_REMEDY}"
            ) from error


def _probe(folder: Path) -> None:
    if sys.platform != "linux":  # only Linux has O_TMPFILE
        return
    # The file never has a name: nothing is left behind, even by SIGKILL, and no other process sees it.
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR)
    try:
        # On a nearly full disk write(2) succeeds in part and reports no error.
        if os.write(file, bytes(_PROBE_BYTES)) < _PROBE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)
