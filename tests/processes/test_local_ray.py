"""An environment in which a local Ray cannot start is refused before Ray starts, by the name of its variable."""

import errno
import os
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from launcher.errors import ClusterError
from launcher.processes.local_ray import check_environment


@pytest.fixture(autouse=True)
def clear_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_directory_too_long_for_sockets_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"/tmp/{'x' * 40}")
    with pytest.raises(ClusterError, match=rf"^{name}: /tmp/x+ is 45 bytes long, and above 39 bytes .*; set RAY_"):
        check_environment()


def test_length_limit_matches_ray() -> None:
    from ray._private.utils import validate_socket_filepath

    from launcher.processes import local_ray

    validate_socket_filepath("x" * local_ray._LONGEST + local_ray._SOCKET)
    with pytest.raises(OSError, match="AF_UNIX path length"):
        validate_socket_filepath("x" * (local_ray._LONGEST + 1) + local_ray._SOCKET)


def test_directory_that_cannot_be_created_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nothing")
    with pytest.raises(ClusterError, match=r"^RAY_TMPDIR: /proc/nothing/ray cannot be written \(No such file"):
        check_environment()


def test_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ClusterError, match=r"cannot be written \(No space left on device\), where Ray keeps"):
        check_environment()


def test_home_that_cannot_hold_the_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nothing")
    check_environment()  # no token is needed
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=r"^HOME: /proc/nothing/\.ray cannot be written .*; set HOME to a writable"):
        check_environment()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    check_environment()
