"""Trials copy whole checkpoints from each other, even while the owner prunes them (PBT)."""

from pathlib import Path

import pytest

from launcher.rundir.directory import RunDir
from launcher.rundir.records import ManifestRecord
from launcher.train.checkpoint import catalog
from launcher.train.loop import INITIAL_STATE
from launcher.tune.pbt_checkpoints import fetch_snapshot, store_snapshot


def _run(path: Path, *steps: int) -> RunDir:
    run = RunDir(str(path))
    for step in steps:
        folder = catalog.checkpoint_dir(step)
        run.write_bytes(f"{folder}/state/shard", f"weights of {step}".encode())
        run.write_record(f"{folder}/state.json", INITIAL_STATE)
        manifest = ManifestRecord(step=step, world_size=1, zero=0, spec_hash="", files=())
        run.write_record(f"{folder}/manifest.json", manifest)
    return run


def test_only_a_few_snapshots_are_kept(tmp_path: Path) -> None:
    snapshots = RunDir(str(tmp_path / "snapshots"))
    for step in range(2, 16, 2):
        store_snapshot(snapshots, _run(tmp_path / "trial", step), step)
    assert catalog.complete_steps(snapshots) == [8, 10, 12, 14]


def test_a_copied_checkpoint_outlives_its_owners(tmp_path: Path) -> None:
    owner, copy = _run(tmp_path / "owner", 2, 4), RunDir(str(tmp_path / "copy"))
    start = fetch_snapshot(owner, copy, 4)
    for step in (2, 4):
        catalog.remove(owner, step)
    assert (start.uri, start.step) == (copy.uri, 4)
    assert catalog.complete_steps(copy) == [4]
    assert copy.read_bytes("checkpoints/step-00000004/state/shard") == b"weights of 4"


def test_the_newest_snapshot_replaces_a_pruned_one(tmp_path: Path) -> None:
    copy = RunDir(str(tmp_path / "copy"))
    fetch_snapshot(_run(tmp_path / "first", 20), copy, 20)
    assert fetch_snapshot(_run(tmp_path / "second", 6, 8), copy, 4).step == 8
    assert catalog.complete_steps(copy) == [8], "the earlier copy is deleted, although its step is later"


def test_a_snapshot_pruned_during_the_copy_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, copy = _run(tmp_path / "owner", 2), RunDir(str(tmp_path / "copy"))
    copy_from = RunDir.copy_from

    def copy_late(self: RunDir, other: RunDir, relative: str, immutable: bool = False) -> None:
        if relative.endswith("2"):
            catalog.remove(owner, 2)
            _run(tmp_path / "owner", 4)
        copy_from(self, other, relative, immutable)

    monkeypatch.setattr(RunDir, "copy_from", copy_late)
    assert fetch_snapshot(owner, copy, 2).step == 4
