"""An attempt that freezes at any moment of a save, and wakes up next to a newer attempt, damages nothing of it."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.errors import LauncherError
from launcher.rundir import directory
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import Lease
from launcher.rundir.records import FileEntry
from launcher.train.checkpoint import catalog, writer
from launcher.train.checkpoint.writer import CheckpointWriter, PartRecord, _PendingSave
from launcher.train.loop import INITIAL_STATE
from tests.support.jobs import make_job

_CALLS = ("list", "exists", "read_bytes", "write_bytes", "delete")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "sync", lambda _: None)
    monkeypatch.setattr(writer, "_VISIBLE_WITHIN_S", 0.0)


def _save(run: RunDir, lease: Lease, *steps: int, best: int | None = None) -> None:
    """Complete checkpoints as rank 0 of one worker does."""
    engine = cast(Any, SimpleNamespace(rank=0, world_size=1, zero=2))
    folder = Path(run.uri)
    for step in steps:
        saver = CheckpointWriter(run, make_job(folder, {"train": "train.parquet"}, folder), engine, lease)
        state = INITIAL_STATE.model_copy(update={"step": step, "best_step": best})
        files = saver._files_dir(state)
        run.write_bytes(f"{files}/state/shard", f"of {lease.token}".encode())
        entry = FileEntry(path="state/shard", size_bytes=4, sha256="0" * 64)
        run.write_record(f"{files}/parts/rank-00000.json", PartRecord(rank=0, files=(entry,)))
        pending = _PendingSave(state)
        pending.is_written_everywhere.set()
        saver._complete(pending)


def _freeze_at(monkeypatch: pytest.MonkeyPatch, number: int, meanwhile: Callable[[], None]) -> list[int]:
    """Run `meanwhile` before the call `number` of a run directory; return a counter of the calls."""
    count = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                meanwhile()
            return real(*args, **options)

        return call

    for name in _CALLS:
        monkeypatch.setattr(RunDir, name, wrap(getattr(RunDir, name)))
    return count


@pytest.mark.parametrize("later_steps", [(), (30,), (30, 40), (30, 40, 50)])
def test_newer_attempt_keeps_its_checkpoints_wherever_the_older_one_freezes(
    later_steps: tuple[int, ...], tmp_path: Path
) -> None:
    # The newer attempt has saved nothing yet, the same step, or later ones.
    number = 0
    while True:
        number += 1
        run = RunDir(str(tmp_path / f"run-{number}"))
        first = Lease.acquire(run, 0)
        _save(run, first, 10, 20, best=10)
        newer: list[Lease] = []

        def meanwhile(run: RunDir = run, newer: list[Lease] = newer) -> None:
            newer.append(Lease.acquire(run, catalog.latest_step(run)))
            _save(run, newer[0], *later_steps, best=10)

        with pytest.MonkeyPatch.context() as patch, suppress(LauncherError):
            count = _freeze_at(patch, number, meanwhile)
            _save(run, first, 30, best=10)
        if not newer:
            break
        steps = catalog.complete_steps(run)
        assert all(catalog.find_corruption(run, step) is None for step in steps), f"call {number}: {steps}"
        newest = max(steps) if not later_steps else max(later_steps)
        assert catalog.latest_step(run) == newest and 10 in steps, f"call {number}: {steps}"
        for step in later_steps[-2:]:
            assert catalog.newest_files_dir(run, step) == f"{catalog.checkpoint_dir(step)}/attempt-000002"
        _save(run, newer[0], 60, best=10)
        assert catalog.latest_step(run) == 60 and catalog.find_corruption(run, 60) is None
    assert number > 20 and count[0] < number


def test_checkpoint_completed_by_a_stale_attempt_does_not_count(tmp_path: Path) -> None:
    # It would resume from steps that the newer attempt has not logged.
    run = RunDir(str(tmp_path / "run"))
    first = Lease.acquire(run, 0)
    _save(run, first, 10, 20)
    Lease.acquire(run, 20)
    late = f"{catalog.checkpoint_dir(30)}/attempt-000001"
    run.write_record(f"{late}/state.json", INITIAL_STATE.model_copy(update={"step": 30}))
    run.write_record(f"{late}/manifest.json", catalog.read_manifest(run, 20).model_copy(update={"step": 30}))
    assert catalog.complete_steps(run) == [10, 20] and not catalog.is_complete(run, 30)
