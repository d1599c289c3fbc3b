"""The command line in this process."""

import pytest

from tests.support.command_line import CommandLine


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)
