"""What the machine refuses is one sentence with exit code 2; only our own defects are to be reported."""

import errno
import os
import sys
from pathlib import Path

import pytest

import launcher.cli.main as cli
from launcher.cli.environment import refused_by_machine


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "name a place that can be written"),
        (errno.EACCES, "give yourself the rights there"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.ESTALE, "look at the disk or the mount"),
    ],
)
def test_what_the_system_refuses_names_the_place_and_the_remedy(number: int, remedy: str) -> None:
    said = refused_by_machine(OSError(number, os.strerror(number), "/scratch/x"))
    assert said is not None and said.startswith(f"/scratch/x: {os.strerror(number)}; ") and remedy in said
    wrapped = RuntimeError("odd")
    wrapped.__cause__ = OSError(number, os.strerror(number), "/scratch/x")
    assert refused_by_machine(wrapped) == said


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError("Error writing bytes. Detail: [errno 28] No space left on device"), "this machine: No space left on"),
        (Exception("Error while serializing: No space left on device (os error 28)"), "this machine: No space left on"),
        (MemoryError(), "this machine: Cannot allocate memory; close other programs"),
        (
            RuntimeError("can't start new thread"),
            "this machine: no more threads can be started; raise the limit",
        ),
    ],
)
def test_libraries_tell_it_in_their_own_ways(error: Exception, said: str) -> None:
    assert str(refused_by_machine(error)).startswith(said)


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "no", "x"), RuntimeError("odd")])
def test_a_defect_is_none_of_it(error: Exception) -> None:
    assert refused_by_machine(error) is None


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory does not exist any more" in str(refused_by_machine(FileNotFoundError()))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (OSError(errno.ENOSPC, "full", "/x"), 2, "/x: No space left on device; make room there, or name another place"),
        (KeyError("x"), 1, "the launcher failed (KeyError: 'x'); "),
    ],
)
def test_the_exit_code_tells_them_apart(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err
    assert ended.value.code == code and shown.startswith(said) and ("report it" in shown) == (code == 1)
