"""Whether runs can be written where `output.storage` says, told before anything else is done. Runs on the client."""

import errno
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from launcher.errors import RunError
from launcher.rundir.uri import describe_os_error, is_local, open_uri, translate_errors

# A run's first records; less room than that is none.
_PROBE_BYTES = 1 << 16
# What a file system says that has no files without names.
_NO_PROBE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_REMEDY = "give a directory that can be written"
_NO_STORAGE = {"http://": "a web server takes no files", "https://": "a web server takes no files",
               "hub:": "a data set of the hub takes no files"}  # fmt: skip


def check_storage(storage: str) -> None:
    """Refuse an `output.storage` that no run could be written to; leaves nothing there.

    A local one is tried with a file that has no name, where the file system knows such; an object store is listed.

    Raises:
        RunError: it, or the nearest directory above it that exists, is a file, full or read-only; it is no place; the
            server does not answer, has no such bucket, or lets nobody in.
    """
    for start, why in _NO_STORAGE.items():
        if storage.startswith(start):
            raise RunError(f"output.storage: {storage} cannot be written ({why}); {_REMEDY}, or a URI such as s3://")
    try:
        fs, path = open_uri(storage)
    except (OSError, pa.ArrowException) as error:
        what = " ".join(str(error).split())[:200]
        raise RunError(f"output.storage: {storage} cannot be opened ({what}); mend the URI, or its driver") from error
    except RunError as error:
        if isinstance(error.__cause__, OSError) and not storage.startswith("s3://"):
            what = describe_os_error(error.__cause__)
            raise RunError(
                f"output.storage: {storage} cannot be opened ({what}); mend the URI, or its driver"
            ) from error
        raise RunError(f"output.storage: {error.message}") from error
    if "://" in storage and not storage.partition("://")[2].strip("/"):
        raise RunError(f"output.storage: {storage} names no place; write it as {storage.rstrip('/')}//BUCKET/FOLDER")
    if is_local(fs):
        _check_local(Path(path))
        return
    try:
        with translate_errors(f"output.storage: {storage}"):
            fs.get_file_info(pafs.FileSelector(path))
    except FileNotFoundError:
        pass  # the first write makes it


def _check_local(place: Path) -> None:
    try:
        while not place.exists():
            if place.is_symlink():
                raise RunError(
                    f"output.storage: {place} is a link to {os.readlink(place)}, which is not there; {_REMEDY}"
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
    if sys.platform != "linux":  # which alone has files without names
        return
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR)
    try:
        if os.write(file, bytes(_PROBE_BYTES)) < _PROBE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)
