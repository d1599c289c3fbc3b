"""Opens paths and URIs: one file system per bucket and process, patient with a server, though not for minutes.

Runs anywhere. What a storage says against a request becomes one sentence here. Read `rundir/directory.py` next.
"""

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any  # fsspec ships no types

import pyarrow as pa
import pyarrow.fs as pafs

from launcher.errors import RunError, StorageUnavailableError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Variables that name an S3-compatible server, the more special one first, as the AWS SDKs read them."""
SETTINGS = (*ENDPOINTS, "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED")
"""Variables of S3 that are no secrets."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

# pyarrow's default for a URI tries again after a refused connection alone, for 6 s; a server that is busy (503) or
# hangs up would end a run. Five attempts wait 8 s between them on the average, 15 s at most; with these timeouts a
# server that is not there is told after 8 s, one that accepts and never answers after 40.
_ATTEMPTS = 5
_CONNECT_S = 3.0
_REQUEST_S = 6.0
# Google's own limit is 15 minutes, and Hadoop's 45 attempts of 20 s each.
_OPTIONS = {
    "gs": {"retry_limit_seconds": "40"},
    "gcs": {"retry_limit_seconds": "40"},
    "hdfs": {"ipc.client.connect.timeout": "6000", "ipc.client.connect.max.retries.on.timeouts": "5"},
}
# A protocol of fsspec has whatever limits its author thought of. What moves content, or lists a large directory, may
# take minutes where all is well.
_ASKED_S, _MOVED_S = 60.0, 300.0
_QUICK = frozenset(("info", "exists", "isdir", "isfile", "mkdir", "makedirs", "rm_file", "mv", "created", "modified"))
# Stores whose objects appear when their stream closes, and whose directories are names alone.
_OBJECT_STORES = ("s3", "gcs", "abfs")


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path of a local path or URI (s3://, gs://, hdfs://, or any fsspec protocol).

    Raises:
        RunError: the protocol is unknown, its driver is not installed, or its server does not answer.
    """
    if "://" not in uri:
        return _LOCAL, os.path.abspath(os.path.expanduser(uri))
    if uri.startswith("s3://"):
        bare, _, options = uri.partition("?")
        bucket, _, key = bare[len("s3://") :].partition("/")
        # The account's part of `s3://key:secret@bucket` is no part of the path.
        key_of = (bucket, options, *(os.environ.get(name) for name in (*SETTINGS, *_SECRETS)))
        if key_of not in _BUCKETS:  # two threads at once make two, and one stays
            _BUCKETS[key_of] = _bucket(bucket, options)
        return _BUCKETS[key_of], f"{bucket.rpartition('@')[2]}/{key}".rstrip("/")
    try:
        return pafs.FileSystem.from_uri(_with_limits(uri))  # type: ignore[no-any-return]  # pyarrow ships no types
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec  # heavy drivers are loaded only for the protocols pyarrow does not know

        try:
            fs, path = _within(_ASKED_S, "opening it", lambda: fsspec.core.url_to_fs(uri))
        except TimeoutError as error:
            raise storage_error(uri, error) from error
        except (ValueError, ImportError) as error:
            raise RunError(f"{uri}: cannot be opened ({error}); install the fsspec driver of its protocol") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(_Limited(fs))), path
    except OSError as error:
        raise storage_error(uri, error) from error


_LOCAL = pafs.LocalFileSystem()
# Kept for their connections; by bucket, options and environment. A plain dict: the doctor sends this module by value.
_BUCKETS: dict[tuple[str | None, ...], pafs.FileSystem] = {}


def _bucket(bucket: str, options: str) -> pafs.FileSystem:
    uri = f"s3://{bucket}" + (f"?{options}" if options else "")
    try:
        found, _ = pafs.FileSystem.from_uri(uri)
    except OSError as error:  # the region of a bucket is asked for
        raise storage_error(f"s3://{bucket.rpartition('@')[2]}", error) from error
    # from_uri reads the options and the environment; it takes no retry strategy.
    _, (read,) = found.__reduce__()
    if read["connect_timeout"] < 0:
        read |= {"connect_timeout": _CONNECT_S, "request_timeout": _REQUEST_S}
    if not read["proxy_options"]["host"]:
        read["proxy_options"] = None
    return pafs.S3FileSystem(**read, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS))


def _with_limits(uri: str) -> str:
    """Return a URI whose options say how long its server may be silent; those that are given stay."""
    bare, _, given = uri.partition("?")
    options = given.split("&") if given else []
    names = {option.partition("=")[0] for option in options}
    wanted = _OPTIONS.get(uri.partition("://")[0], {})
    more = [f"{name}={value}" for name, value in wanted.items() if name not in names]
    return f"{bare}?{'&'.join((*options, *more))}" if more else uri


class _Limited:
    """A file system of fsspec, or one of its open files, each of whose calls ends in time.

    Args:
        inner: The file system or file.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __reduce__(self) -> tuple[object, ...]:
        return (_Limited, (self._inner,))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            seconds = _ASKED_S if name in _QUICK else _MOVED_S
            answer = _within(seconds, name, lambda: found(*args, **kwargs))
            return _Limited(answer) if name == "open" else answer

        return call


def _within(seconds: float, what: str, call: Callable[[], Any]) -> Any:
    """Return what a call returns, from a thread of its own that is left alone when the time is over.

    Raises:
        TimeoutError: It is.
    """
    done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:  # noqa: BLE001  # border of a thread: raised again below
            done.put((None, error))

    threading.Thread(target=run, name="storage", daemon=True).start()
    try:
        answer, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"{what}: no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return answer


def is_local(fs: pafs.FileSystem) -> bool:
    """Whether it is this machine's disks, or what is mounted like one."""
    return isinstance(fs, pafs.LocalFileSystem)


def is_object_store(fs: pafs.FileSystem) -> bool:
    """Whether objects appear whole when their stream closes, and directories are names alone."""
    return fs.type_name in _OBJECT_STORES


def append_whole(path: Path, content: bytes) -> None:
    """Add to a local file, all or nothing: a disk that fills up leaves no half of it.

    Raises:
        OSError: nothing was added.
    """
    with path.open("ab", buffering=0) as stream:
        size, left = stream.tell(), memoryview(content)
        try:
            while left:
                left = left[stream.write(left) or 0 :]
        except OSError:
            stream.truncate(size)
            raise


def split_options(uri: str) -> tuple[str, str]:
    """A URI and its options with the question mark (`?endpoint_override=...`), which every path below it needs."""
    if "://" not in uri:
        return uri, ""
    bare, mark, options = uri.partition("?")
    return bare, mark + options


def redact_uri(uri: str) -> str:
    """A path or URI for people: without its account and its options, where keys may stand."""
    scheme, mark, rest = split_options(uri)[0].rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2] if mark else host}{slash}{path}"


def join(uri: str, relative: str) -> str:
    """A path or URI below another; options stay behind it."""
    bare, options = split_options(uri)
    return f"{bare.rstrip('/')}/{relative}{options}"


def parent(uri: str) -> str:
    """The directory that holds a path or URI."""
    bare, options = split_options(uri)
    return bare.rstrip("/").rpartition("/")[0] + options


_WORDS = {
    "NO_SUCH_BUCKET": "there is no such bucket",
    "ACCESS_DENIED": "access is denied",
    "INVALID_ACCESS_KEY_ID": "the access key is not known",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong",
    "EXPIRED_TOKEN": "the token has expired",
}
_REMEDIES = {
    "NO_SUCH_BUCKET": "create it, or give another",
    "NETWORK_CONNECTION": "look at AWS_ENDPOINT_URL (or endpoint_override), the network, and whether the server is up",
}
_KEYS = "look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the rights of the account"


def describe_os_error(error: OSError) -> str:
    """Why a storage refused, in a few words: `Permission denied`, `there is no such bucket`."""
    if error.errno:
        return os.strerror(error.errno)
    kind = _aws(error)
    # One line, and nothing that a terminal would take for commands.
    line = str(error).strip().split("\n")[0] or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in line)
    if kind == "NETWORK_CONNECTION":
        details = re.search(r"(?:Details: |curlCode: \d+, )([^;]+)$", text)
        return f"no answer: {details.group(1) if details else 'the connection failed'}"[:200]
    # What S3 adds in brackets (request ids) helps nobody here.
    return _WORDS.get(kind, re.sub(r" \(Request ID: [^)]*\)$", "", text)[:200])


# What a mount says while its server, or the way to it, is gone for some time.
_PASSING = frozenset(
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EPIPE, errno.ENOTCONN,
     errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
     errno.ENETUNREACH, errno.ESHUTDOWN, getattr(errno, "EREMOTEIO", errno.EIO))
)  # fmt: skip
# AWS's names of answers that a later try would meet again, beside `_WORDS`.
_LASTING = frozenset(("RESOURCE_NOT_FOUND", "NO_SUCH_KEY", "VALIDATION", "INVALID_PARAMETER_VALUE", "NOT_IMPLEMENTED"))
_GCS_PASSING = re.compile(r"google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RESOURCE_EXHAUSTED)")


def is_transient(error: OSError) -> bool:
    """Return whether what a storage said may be over by itself: no answer, or a refusal for now."""
    if error.errno:
        return error.errno in _PASSING
    kind = _aws(error)
    return bool(kind and kind not in _WORDS and kind not in _LASTING) or bool(_GCS_PASSING.search(str(error)))


def storage_error(uri: str, error: OSError, remedy: str = "") -> RunError:
    """What a storage said, as one sentence: URI, reason, remedy."""
    kind = _aws(error)
    mend = _REMEDIES.get(kind) or (_KEYS if kind in _WORDS else remedy or "look at the storage and your rights there")
    error_kind = StorageUnavailableError if is_transient(error) else RunError
    return error_kind(f"{redact_uri(uri)}: cannot be used ({describe_os_error(error)}); {mend}")


def _aws(error: OSError) -> str:
    """The AWS SDK's name of what went wrong; "" where none is given."""
    text = str(error)
    if re.search(r"Bucket '[^']*' not found", text):
        return "NO_SUCH_BUCKET"
    named = re.search(r"AWS Error ([A-Z_]+)", text)
    if named is None:
        return ""
    # Newer errors reach the SDK without a name of their own.
    return next((kind for kind in _WORDS if kind.replace("_", "").lower() in text.lower()), named.group(1))


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """What the storage says against the requests of the block becomes one sentence; a missing file stays itself.

    Raises:
        RunError: the storage refuses, or does not answer.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error(uri, error) from error
