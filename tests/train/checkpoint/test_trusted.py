"""A checkpoint that somebody else could write to runs no code when it is loaded."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.prepare import PreparedJob
from launcher.errors import LauncherError, RunError
from launcher.rundir.directory import RunDir
from launcher.train.checkpoint import catalog
from launcher.train.checkpoint.reader import check_pickled_classes, weights_only_loads
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here


class _Evil:
    """What touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mknod, (str(self.file),))


def _begin(prepared: Any) -> str:
    train_here(prepared, stop_after=3)
    return ""


def _resume(prepared: Any, weights_only: bool) -> str:
    from launcher.tasks import build_task
    from launcher.train.checkpoint import reader
    from launcher.train.engine import Engine

    try:
        if not weights_only:
            train_here(prepared)
            return "fine"
        engine = Engine(prepared.job, build_task(prepared.job), prepared.plan.micro_batch)
        reader.load(prepared.run, engine, catalog.latest_step(prepared.run), weights_only=True)
    except LauncherError as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def _poison(run: RunDir, name: str, touched: Path, listed: bool) -> Path:
    """Put a pickle that touches a file into the newest checkpoint, with the sums of its manifest put right."""
    place = Path(run.uri) / str(catalog.newest_files_dir(run, catalog.latest_step(run)))
    manifest = json.loads((place / "manifest.json").read_text())
    (file,) = (place / manifest["folder"]).rglob(f"*{name}")
    states = torch.load(file, weights_only=False)
    torch.save({**states, "more": _Evil(touched)}, file)
    sums = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size}
    others = [entry for entry in manifest["files"] if not entry["path"].endswith(file.name)]
    mine = [entry | sums for entry in manifest["files"] if entry["path"].endswith(file.name)]
    manifest["files"] = others + (mine if listed else [])
    (place / "manifest.json").write_text(json.dumps(manifest))
    return file


def _begun(model: Path, folder: Path, zero: int) -> PreparedJob:
    """Return a job of which a checkpoint was saved."""
    data = write_splits(folder / "data", train=66)
    job = prepared_job(
        model, data, folder, parallel={"zero": zero}, cluster={"workers": 1}, checkpoint={"every_steps": 3}
    )
    run_group(1, _begin, job)
    return job


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("zero, name", [(0, "model_states.pt"), (2, "optim_states.pt"), (3, "optim_states.pt")])
def test_an_evil_checkpoint_is_refused_by_name(
    tiny_bert: Path, tmp_path: Path, zero: int, name: str, weights_only: bool
) -> None:
    job = _begun(tiny_bert, tmp_path, zero)
    evil = _poison(job.run, name, tmp_path / "touched", listed=True)
    said = run_group(1, _resume, job, weights_only)
    assert said.startswith(f"RunError: {evil}: holds posix.mknod, which no training saves and could run code when it ")
    assert not (tmp_path / "touched").exists()
    assert catalog.latest_step(job.run) > 0  # it is not taken for damage, which would train on from an older one


@pytest.mark.parametrize("zero, name", [(0, "model_states.pt"), (2, "optim_states.pt"), (3, "optim_states.pt")])
def test_a_file_that_the_manifest_does_not_name_runs_no_code_either(
    tiny_bert: Path, tmp_path: Path, zero: int, name: str
) -> None:
    job = _begun(tiny_bert, tmp_path, zero)
    evil = _poison(job.run, name, tmp_path / "touched", listed=False)
    said = run_group(1, _resume, job, False)
    assert said.startswith(f"RunError: {evil.parent.parent}: a file of it holds what no training saves (posix.mknod); ")
    assert not (tmp_path / "touched").exists()


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "a.pt").write_bytes(pickle.dumps(_Evil(tmp_path / "touched")))
    with pytest.raises(RunError, match=r"s3://x/a\.pt: is not a file that torch has saved"):
        check_pickled_classes(tmp_path / "a.pt", "s3://x/a.pt")
    with pytest.raises(RunError, match="s3://x: a file of it holds"), weights_only_loads("s3://x"):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert not (tmp_path / "touched").exists()


def test_what_the_caller_had_set_stands_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with weights_only_loads("s3://x"):
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
