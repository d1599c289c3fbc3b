"""Loading a checkpoint that somebody else could write to runs no code; weights of an earlier one come back."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.prepare import PreparedJob
from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.train.checkpoint import catalog
from launcher.train.checkpoint.reader import check_pickled_classes, weights_only_loads
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import error_of, run_group, train_losses, weights_at, with_job

_SHARDS = [(0, "model_states.pt"), (2, "optim_states.pt"), (3, "optim_states.pt")]
_BEST, _STEPS = 2, 6


class _Malicious:
    """Object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mknod, (str(self.file),))


def _poisoned_job(model: Path, folder: Path, zero: int, name: str, is_listed: bool) -> tuple[PreparedJob, Path]:
    """Return a job with a checkpoint, and the file of it that creates `folder/touched` when it is unpickled.

    The manifest is forged to match the file, or does not list it.
    """
    data = write_splits(folder / "data", train=66)
    sections: dict[str, Any] = {"parallel": {"zero": zero}, "checkpoint": {"every_steps": 3}}
    job = prepared_job(model, data, folder, cluster={"workers": 1}, **sections)
    run_group(1, train_losses, job, 3)
    directory = Path(job.run.uri) / str(catalog.newest_files_dir(job.run, catalog.latest_step(job.run)))
    manifest = json.loads((directory / "manifest.json").read_text())
    (file,) = (directory / manifest["folder"]).rglob(f"*{name}")
    torch.save({**torch.load(file, weights_only=False), "more": _Malicious(folder / "touched")}, file)
    sums = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size}
    others = [entry for entry in manifest["files"] if not entry["path"].endswith(file.name)]
    forged = [entry | sums for entry in manifest["files"] if entry["path"].endswith(file.name)]
    manifest["files"] = others + (forged if is_listed else [])
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return job, file


def _load(prepared: PreparedJob, weights_only: bool) -> str:
    if weights_only:
        return error_of(weights_at, prepared, catalog.latest_step(prepared.run))
    return error_of(train_losses, prepared)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(("zero", "name"), _SHARDS)
def test_malicious_checkpoint_is_rejected_by_name(
    tiny_bert: Path, tmp_path: Path, zero: int, name: str, weights_only: bool
) -> None:
    job, file = _poisoned_job(tiny_bert, tmp_path, zero, name, is_listed=True)
    error = run_group(1, _load, job, weights_only)
    assert error.startswith(f"RunError: {file}: holds posix.mknod, which no training saves and could run code when it ")
    assert not (tmp_path / "touched").exists()
    assert catalog.latest_step(job.run) > 0  # not quarantined as corrupt, which would resume from an older one


@pytest.mark.parametrize(("zero", "name"), _SHARDS)
def test_file_outside_the_manifest_runs_no_code(tiny_bert: Path, tmp_path: Path, zero: int, name: str) -> None:
    job, file = _poisoned_job(tiny_bert, tmp_path, zero, name, is_listed=False)
    error = run_group(1, _load, job, False)
    expected = f"RunError: {file.parent.parent}: a file of it holds what no training saves (posix.mknod); "
    assert error.startswith(expected)
    assert not (tmp_path / "touched").exists()


def test_file_that_torch_has_not_saved_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps(_Malicious(tmp_path / "touched")))
    with pytest.raises(RunError, match=r"s3://x/a\.pt: is not a file that torch has saved"):
        check_pickled_classes(tmp_path / "a.pt", "s3://x/a.pt")
    with pytest.raises(RunError, match="s3://x: a file of it holds"), weights_only_loads("s3://x"):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert not (tmp_path / "touched").exists()


def test_environment_is_restored_after_loading() -> None:
    with weights_only_loads("s3://x"):
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def _read_best(prepared: PreparedJob) -> Any:
    """Load the best weights into an engine that holds later ones, as at the end of a run."""
    state = weights_at(prepared, _BEST, after=_STEPS)
    return None if state is None else {name: tensor.tolist() for name, tensor in state.items()}


def _saved_module(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    file = run.path(f"{catalog.newest_files_dir(run, step)}/state/mp_rank_00_model_states.pt")
    module: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["module"]
    return module


@pytest.mark.parametrize("workers", [2, 3])
def test_weights_of_an_earlier_checkpoint_are_restored(tiny_bert: Path, tmp_path: Path, workers: int) -> None:
    # Two workers save; three load through the universal format.
    data = write_splits(tmp_path / "data", train=11 * _STEPS)
    checkpoints = {"every_minutes": None, "every_steps": _BEST, "keep_last": _STEPS}
    base = prepared_job(tiny_bert, data, tmp_path, checkpoint=checkpoints)
    jobs = [with_job(base, name=f"zero-{zero}", parallel={"zero": zero}) for zero in (0, 1, 2, 3)]
    restored = []
    for job in jobs:
        run_group(2, train_losses, job)
        restored.append(run_group(workers, _read_best, with_job(job, cluster={"workers": workers})))
    best, last = _saved_module(jobs[0].run, _BEST), _saved_module(jobs[0].run, _STEPS)
    assert max(float((best[name] - last[name]).abs().max()) for name in best) > 1e-4  # training changed the weights
    for job, state in zip(jobs, restored, strict=True):
        assert state.keys() == best.keys()
        difference = max(float((torch.tensor(value) - best[name]).abs().max()) for name, value in state.items())
        assert difference < 1e-5, job.job.name
