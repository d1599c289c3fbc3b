"""cluster/kuberay/: each file names the command that made it, and is what that command makes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli.main import app

_ROOT = Path(__file__).resolve().parents[3]
_FILES = sorted((_ROOT / "cluster" / "kuberay").glob("*.yaml"))


def test_there_are_files() -> None:
    assert {path.stem for path in _FILES} >= {"bert-text-classification-multinode", "gpt-from-scratch"}


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_a_file_is_what_its_command_makes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_ROOT)
    text = path.read_text(encoding="utf-8")
    (command,) = re.findall(r"^#   launcher (kube render .+)$", text, re.MULTILINE)
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == 0, done.output

    def body(stream: str) -> str:
        return stream[stream.index("apiVersion:") :]

    assert body(text) == body(done.stdout)
