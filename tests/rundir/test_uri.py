"""Timeouts of storages that do not answer, and options of URIs."""

import time
from collections.abc import Iterator
from threading import Event
from typing import Any

import fsspec
import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launcher.errors import StorageUnavailableError
from launcher.rundir import uri as storage
from launcher.rundir.directory import RunDir
from launcher.rundir.uri import open_uri

_OVER = Event()


class _SilentFileSystem(MemoryFileSystem):
    """Storage whose server accepts every request and answers none."""

    protocol = "silent"
    store: dict[str, Any] = {}  # noqa: RUF012  # as fsspec declares it
    pseudo_dirs = [""]  # noqa: RUF012

    def info(self, path: str, **_: Any) -> Any:
        _OVER.wait(60)

    def isfile(self, path: str) -> bool:
        return bool(_OVER.wait(60))

    def _open(self, path: str, *_: Any, **__: Any) -> Any:
        _OVER.wait(60)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    fsspec.register_implementation("silent", _SilentFileSystem, clobber=True)
    monkeypatch.setattr(storage, "_QUICK_CALL_S", 0.2)
    monkeypatch.setattr(storage, "_LONG_CALL_S", 0.3)
    _OVER.clear()
    yield "silent://runs/first"
    _OVER.set()


@pytest.mark.parametrize("ask", ["exists", "read_bytes"])
def test_silent_fsspec_storage_is_a_transient_error(silent: str, ask: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        StorageUnavailableError, match=r"silent://runs/first.*: cannot be used \(Connection timed out\)"
    ):
        getattr(RunDir(silent), ask)("job.yaml")
    assert time.monotonic() - began < 30


def test_fsspec_storage_reads_writes_and_pickles() -> None:
    import pickle

    run = RunDir("memory://runs/first")
    run.write_bytes("a/b.txt", b"content")
    assert (run.exists("a/b.txt"), run.list("a"), run.read_bytes("a/b.txt")) == (True, ["b.txt"], b"content")
    fs, path = open_uri("memory://runs/first/a/b.txt")
    assert pickle.loads(pickle.dumps(fs)).open_input_file(path).read(3) == b"con"
    run.delete("a")
    assert not run.exists("a")


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_google_storage_retries_for_less_than_a_minute(scheme: str) -> None:
    fs, path = open_uri(f"{scheme}://bucket/x.png")
    assert isinstance(fs, pafs.GcsFileSystem) and path == "bucket/x.png"
    assert fs.__reduce__()[1][0]["retry_time_limit"].total_seconds() == 40


@pytest.mark.parametrize(
    "uri, limited",
    [
        ("gs://b/x", "gs://b/x?retry_limit_seconds=40"),
        ("gs://b/x?anonymous=true", "gs://b/x?anonymous=true&retry_limit_seconds=40"),
        ("gs://b/x?retry_limit_seconds=9", "gs://b/x?retry_limit_seconds=9"),
        ("abfs://c@a/x", "abfs://c@a/x"),
        ("file:///x", "file:///x"),
    ],
)
def test_timeouts_are_added_to_the_options_of_a_uri(uri: str, limited: str) -> None:
    assert storage._with_limits(uri) == limited
