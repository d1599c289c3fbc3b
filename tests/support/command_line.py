"""The `launcher` command in this process, which takes less time than a process of its own."""

import sys
from typing import NamedTuple

import pytest

import launcher.cli.main as cli


class Ended(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class CommandLine(NamedTuple):
    """Runner of commands. Logging and signal handlers of the test process stay as they are."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Ended:
        self.monkeypatch.setattr(cli, "_quiet", lambda: None)
        self.monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        self.monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = self.capsys.readouterr()
        return Ended(int(ended.value.code or 0), printed.out, printed.err)
