"""Storages: open local paths and URIs with bounded timeouts, and turn their errors into one sentence. Runs anywhere.

Read `rundir/directory.py` next.
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
"""Variables with the endpoint of an S3-compatible server, in the order in which the AWS SDKs read them."""
SETTINGS = (*ENDPOINTS, "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED")
"""S3 variables that hold no secrets."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

# By default pyarrow retries only after a refused connection, for 6 s; a busy server (503) or a dropped connection would
# end a run. Five attempts wait 8 s in total on average, 15 s at most. With these timeouts a missing server is reported
# after 8 s, one that accepts connections and never answers after 40 s.
_ATTEMPTS = 5
_CONNECT_S = 3.0
_REQUEST_S = 6.0
# Defaults without these options: 15 minutes for Google, 45 attempts of 20 s each for Hadoop.
_OPTIONS = {
    "gs": {"retry_limit_seconds": "40"},
    "gcs": {"retry_limit_seconds": "40"},
    "hdfs": {"ipc.client.connect.timeout": "6000", "ipc.client.connect.max.retries.on.timeouts": "5"},
}
# fsspec defines no timeouts; each driver has its own, or none. Calls that transfer content or list a large directory
# may take minutes in normal operation.
_QUICK_CALL_S = 60.0
_LONG_CALL_S = 300.0
_QUICK_CALLS = frozenset(
    ("info", "exists", "isdir", "isfile", "mkdir", "makedirs", "rm_file", "mv", "created", "modified")
)
# Stores whose objects appear when their stream closes, and whose directories are only prefixes of names.
_OBJECT_STORES = ("s3", "gcs", "abfs")


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return file system and path of a local path or URI (s3://, gs://, hdfs://, or any fsspec protocol).

    S3 file systems are cached per bucket, options and environment, to reuse their connections.

    Raises:
        RunError: The protocol is unknown, its driver is not installed, or its server does not answer.
    """
    if "://" not in uri:
        return _LOCAL, os.path.abspath(os.path.expanduser(uri))
    if uri.startswith("s3://"):
        bare, _, options = uri.partition("?")
        bucket, _, key = bare[len("s3://") :].partition("/")
        # With the settings and keys: a process that changes them must not get the connections of the earlier account.
        cache_key = (bucket, options, *(os.environ.get(name) for name in (*SETTINGS, *_SECRETS)))
        # Two threads may both open it; one entry stays.
        if cache_key not in _BUCKETS:
            _BUCKETS[cache_key] = _open_bucket(bucket, options)
        # In `s3://key:secret@bucket` the account is not part of the path.
        return _BUCKETS[cache_key], f"{bucket.rpartition('@')[2]}/{key}".rstrip("/")
    try:
        return pafs.FileSystem.from_uri(_with_limits(uri))  # type: ignore[no-any-return]  # pyarrow ships no types
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec  # imported only for protocols that pyarrow does not know

        try:
            fs, path = _call_within(_QUICK_CALL_S, "opening it", lambda: fsspec.core.url_to_fs(uri))
        except TimeoutError as error:
            raise storage_error(uri, error) from error
        except (ValueError, ImportError) as error:
            raise RunError(f"{uri}: cannot be opened ({error}); install the fsspec driver of its protocol") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(_Limited(fs))), path
    except OSError as error:
        raise storage_error(uri, error) from error


_LOCAL = pafs.LocalFileSystem()
# A plain dict, not lru_cache: the doctor pickles this module by value.
_BUCKETS: dict[tuple[str | None, ...], pafs.FileSystem] = {}


def _open_bucket(bucket: str, options: str) -> pafs.FileSystem:
    uri = f"s3://{bucket}" + (f"?{options}" if options else "")
    try:
        fs, _ = pafs.FileSystem.from_uri(uri)
    except OSError as error:  # from_uri asks the server for the bucket's region
        raise storage_error(f"s3://{bucket.rpartition('@')[2]}", error) from error
    # Workaround for pyarrow: from_uri accepts no retry strategy. Pickling exposes the settings that it has read from
    # options and environment; a second file system is built from them.
    _, (settings,) = fs.__reduce__()
    # Negative means that the URI has not set it.
    if settings["connect_timeout"] < 0:
        settings |= {"connect_timeout": _CONNECT_S, "request_timeout": _REQUEST_S}
    if not settings["proxy_options"]["host"]:
        settings["proxy_options"] = None
    return pafs.S3FileSystem(**settings, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS))


def _with_limits(uri: str) -> str:
    """Return a URI with timeouts among its options; options that the user has set stay."""
    bare, _, query = uri.partition("?")
    options = query.split("&") if query else []
    names = {option.partition("=")[0] for option in options}
    limits = _OPTIONS.get(uri.partition("://")[0], {})
    # from_uri takes limits from the URI alone.
    added = [f"{name}={value}" for name, value in limits.items() if name not in names]
    return f"{bare}?{'&'.join((*options, *added))}" if added else uri


class _Limited:
    """Wrapper of an fsspec file system or open file that limits the time of each call.

    Args:
        inner: Wrapped file system or file.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    # By default, unpickling asks for `__setstate__` before `_inner` is set: `__getattr__` would call itself endlessly.
    def __reduce__(self) -> tuple[object, ...]:
        return (_Limited, (self._inner,))

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            seconds = _QUICK_CALL_S if name in _QUICK_CALLS else _LONG_CALL_S
            answer = _call_within(seconds, name, lambda: attribute(*args, **kwargs))
            # A file is wrapped too: reading it and closing it send the requests.
            return _Limited(answer) if name == "open" else answer

        return call


def _call_within(seconds: float, what: str, call: Callable[[], Any]) -> Any:
    """Run a call in a thread and return its result. A blocked thread cannot be stopped, so a late one keeps running.

    Raises:
        TimeoutError: The call has not returned in time.
    """
    done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:  # noqa: BLE001  # raised again below, in the caller's thread
            done.put((None, error))

    # A daemon, as a call that never returns must not keep the process from exiting. A thread of a pool could not be
    # given up: the pool waits for it at exit.
    threading.Thread(target=run, name="storage", daemon=True).start()
    try:
        answer, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"{what}: no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return answer


def is_local(fs: pafs.FileSystem) -> bool:
    """Return True for a disk or mount of this machine."""
    return isinstance(fs, pafs.LocalFileSystem)


def is_object_store(fs: pafs.FileSystem) -> bool:
    """Return True if objects appear when their stream closes, and directories are only prefixes of names."""
    return fs.type_name in _OBJECT_STORES


def append_whole(path: Path, content: bytes) -> None:
    """Append to a local file, or leave it unchanged if the disk is full.

    Raises:
        OSError: Nothing was appended.
    """
    # Unbuffered: a buffer is written when the file closes, too late to restore the size. A process that is killed in
    # here leaves a part of a line, which `truncate_after` removes at the next start.
    with path.open("ab", buffering=0) as stream:
        # In append mode Python seeks to the end when it opens the file.
        size = stream.tell()
        remaining = memoryview(content)
        try:
            while remaining:  # an unbuffered write may be partial
                remaining = remaining[stream.write(remaining) or 0 :]
        except OSError:
            stream.truncate(size)
            raise


def split_options(uri: str) -> tuple[str, str]:
    """Split a URI from its options, `?` included (`?endpoint_override=...`). Every path below it needs them too."""
    # In a local path, `?` is part of the name.
    if "://" not in uri:
        return uri, ""
    bare, mark, options = uri.partition("?")
    return bare, mark + options


def redact_uri(uri: str) -> str:
    """Return a path or URI for messages: without account and options, which may hold keys."""
    scheme, mark, rest = split_options(uri)[0].rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2] if mark else host}{slash}{path}"


def join(uri: str, relative: str) -> str:
    """Return the path or URI of `relative` below another one; its options stay at the end."""
    bare, options = split_options(uri)
    return f"{bare.rstrip('/')}/{relative}{options}"


def parent(uri: str) -> str:
    """Return the directory that contains a path or URI."""
    bare, options = split_options(uri)
    return bare.rstrip("/").rpartition("/")[0] + options


_WORDS = {
    "NO_SUCH_BUCKET": "there is no such bucket",
    "ACCESS_DENIED": "access is denied",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong",
    "EXPIRED_TOKEN": "the token has expired",
}
_REMEDIES = {
    "NO_SUCH_BUCKET": "create it, or give another one",
    "NETWORK_CONNECTION": "check AWS_ENDPOINT_URL (or endpoint_override), the network, and that the server is running",
}
_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the permissions of the account"


def describe_os_error(error: OSError) -> str:
    """Return the reason of a storage error in a few words: `Permission denied`, `there is no such bucket`."""
    # Most errors of a remote storage have no errno: the reason is in their text.
    if error.errno:
        return os.strerror(error.errno)
    code = _aws_code(error)
    # One line without control characters: the text comes from a server and goes to a terminal.
    line = str(error).strip().split("\n")[0] or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in line)
    if code == "NETWORK_CONNECTION":
        details = re.search(r"(?:Details: |curlCode: \d+, )([^;]+)$", text)
        return f"no answer: {details.group(1) if details else 'the connection failed'}"[:200]
    return _WORDS.get(code, re.sub(r" \(Request ID: [^)]*\)$", "", text)[:200])


# Errors of a mount whose server or network is temporarily down.
_TRANSIENT_ERRNOS = frozenset(
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EPIPE, errno.ENOTCONN,
     errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
     errno.ENETUNREACH, errno.ESHUTDOWN, getattr(errno, "EREMOTEIO", errno.EIO))
)  # fmt: skip
# AWS error codes that a retry cannot fix, in addition to `_WORDS`.
_PERMANENT = frozenset(
    ("RESOURCE_NOT_FOUND", "NO_SUCH_KEY", "VALIDATION", "INVALID_PARAMETER_VALUE", "NOT_IMPLEMENTED")
)
_GCS_TRANSIENT = re.compile(
    r"google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RESOURCE_EXHAUSTED)"
)


def is_transient(error: OSError) -> bool:
    """Return True if a retry may succeed: the storage did not answer, or refused temporarily."""
    if error.errno:
        return error.errno in _TRANSIENT_ERRNOS
    code = _aws_code(error)
    # A code that is not known to be permanent counts as temporary: a retry costs seconds, giving up costs the run.
    return bool(code and code not in _WORDS and code not in _PERMANENT) or bool(_GCS_TRANSIENT.search(str(error)))


def storage_error(uri: str, error: OSError, remedy: str = "") -> RunError:
    """Return a storage error as one sentence: URI, reason, remedy.

    Args:
        uri: Path or URI that was used; masked in the text.
        error: Error of the storage.
        remedy: Advice for errors without a known one; "" gives general advice.
    """
    code = _aws_code(error)
    remedy = remedy or "check the storage and your permissions there"
    remedy = _REMEDIES.get(code) or (_KEYS if code in _WORDS else remedy)
    kind = StorageUnavailableError if is_transient(error) else RunError
    return kind(f"{redact_uri(uri)}: cannot be used ({describe_os_error(error)}); {remedy}")


def _aws_code(error: OSError) -> str:
    """Return the AWS error code in the text of an error; "" if there is none."""
    text = str(error)
    if re.search(r"Bucket '[^']*' not found", text):
        return "NO_SUCH_BUCKET"
    match = re.search(r"AWS Error ([A-Z_]+)", text)
    if match is None:
        return ""
    # The SDK reports codes that it does not know as UNKNOWN and puts the code into the text (ExpiredToken).
    return next((code for code in _WORDS if code.replace("_", "").lower() in text.lower()), match.group(1))


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Raise storage errors of the block as `RunError` with one sentence; a `FileNotFoundError` passes unchanged.

    Raises:
        RunError: The storage refuses a request, or does not answer.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error(uri, error) from error
