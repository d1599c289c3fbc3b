"""The desk, laid out anew for each test; Ray must not start."""

from pathlib import Path
from typing import NoReturn

import pytest

import launcher.cli.main as cli
from tests.support.desk import Desk, lay_out


@pytest.fixture
def desk(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Desk:
    import ray

    def started(*_: object, **__: object) -> NoReturn:
        raise AssertionError("Ray was started before the job was refused")

    capsys.readouterr()  # what making the models said
    folder = tmp_path / "desk"
    folder.mkdir()
    lay_out(folder, tiny_models["text-classification"])
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the session's cluster is none of the user's
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    return Desk(folder, capsys, monkeypatch, tiny_models)
