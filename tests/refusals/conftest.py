"""A new desk for each test, on which Ray must not start."""

from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.desk import Desk, lay_out


@pytest.fixture
def desk(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Desk:
    import ray

    def fail(*_: object, **__: object) -> NoReturn:
        raise AssertionError("Ray was started before the job was refused")

    folder = tmp_path / "desk"
    folder.mkdir()
    lay_out(folder, tiny_models["text-classification"])
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # hide the test session's cluster
    return Desk(folder, capsys, monkeypatch, tiny_models)
