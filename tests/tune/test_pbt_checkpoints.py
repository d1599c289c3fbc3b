"""Snapshots that trials copy from each other stay whole, whatever their owner does."""

from pathlib import Path

import pytest

from launcher.rundir.directory import RunDir
from launcher.rundir.records import ManifestRecord
from launcher.train.checkpoint import catalog
from launcher.train.loop import INITIAL_STATE
from launcher.tune import pbt_checkpoints


def _run(path: Path, *steps: int) -> RunDir:
    run = RunDir(str(path))
    for step in steps:
        folder = catalog.checkpoint_dir(step)
        run.write_bytes(f"{folder}/state/shard", f"weights of {step}".encode())
        run.write_record(f"{folder}/state.json", INITIAL_STATE)
        run.write_record(
            f"{folder}/manifest.json", ManifestRecord(step=step, world_size=1, zero=0, spec_hash="", files=())
        )
    return run


def test_a_few_snapshots_stay(tmp_path: Path) -> None:
    kept = RunDir(str(tmp_path / "kept"))
    for step in range(2, 16, 2):
        pbt_checkpoints.keep_checkpoint(kept, _run(tmp_path / "trial", step), step)
    assert catalog.complete_steps(kept) == [8, 10, 12, 14]


def test_what_is_taken_outlives_its_owner(tmp_path: Path) -> None:
    owner, mine = _run(tmp_path / "owner", 2, 4), RunDir(str(tmp_path / "mine"))
    start = pbt_checkpoints.take_checkpoint(owner, mine, 4)
    for step in (2, 4):
        catalog.remove(owner, step)
    assert (start.uri, start.step) == (mine.uri, 4)
    assert catalog.complete_steps(mine) == [4]
    assert mine.read_bytes("checkpoints/step-00000004/state/shard") == b"weights of 4"


def test_the_newest_stands_in_for_one_that_has_given_way(tmp_path: Path) -> None:
    mine = RunDir(str(tmp_path / "mine"))
    pbt_checkpoints.take_checkpoint(_run(tmp_path / "one", 20), mine, 20)
    assert pbt_checkpoints.take_checkpoint(_run(tmp_path / "other", 6, 8), mine, 4).step == 8
    assert catalog.complete_steps(mine) == [8], "what was taken before is gone, be it of a later step"


def test_one_that_goes_while_it_is_copied_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, mine = _run(tmp_path / "owner", 2), RunDir(str(tmp_path / "mine"))
    copy = RunDir.copy_from

    def late(self: RunDir, other: RunDir, relative: str, immutable: bool = False) -> None:
        if relative.endswith("2"):
            catalog.remove(owner, 2)
            _run(tmp_path / "owner", 4)
        copy(self, other, relative, immutable)

    monkeypatch.setattr(RunDir, "copy_from", late)
    assert pbt_checkpoints.take_checkpoint(owner, mine, 2).step == 4
