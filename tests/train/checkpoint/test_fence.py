"""An attempt that stood still at any moment, and goes on beside a newer one, harms nothing of the newer one's."""

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
from launcher.spec.job import JobSpec
from launcher.train.checkpoint import catalog, writer
from launcher.train.checkpoint.writer import CheckpointWriter, PartRecord, _PendingSave
from launcher.train.loop import INITIAL_STATE
from tests.support.jobs import make_job

_CALLS = ("list", "exists", "read_bytes", "write_bytes", "delete")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "sync", lambda _: None)
    monkeypatch.setattr(writer, "_VISIBLE_WITHIN_S", 0.0)


def _job(folder: Path) -> JobSpec:
    return make_job(folder, {"train": "train.parquet"}, folder)


def _save(run: RunDir, lease: Lease, *steps: int, best: int | None = None) -> None:
    """What rank 0 of one worker does to complete checkpoints."""
    engine = cast(Any, SimpleNamespace(rank=0, world_size=1, zero=2))
    for step in steps:
        mine = CheckpointWriter(run, _job(Path(run.uri)), engine, lease)
        state = INITIAL_STATE.model_copy(update={"step": step, "best_step": best})
        place = mine._files_dir(state)
        run.write_bytes(f"{place}/state/shard", f"of {lease.token}".encode())
        entry = FileEntry(path="state/shard", size_bytes=4, sha256="0" * 64)
        run.write_record(f"{place}/parts/rank-00000.json", PartRecord(rank=0, files=(entry,)))
        writing = _PendingSave(state)
        writing.is_written_everywhere.set()
        mine._complete(writing)


def _stand_still(monkeypatch: pytest.MonkeyPatch, number: int, meanwhile: Callable[[], None]) -> list[int]:
    """Before call `number` of a run directory something else happens; counts the calls."""
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


@pytest.mark.parametrize("further", [(), (30,), (30, 40), (30, 40, 50)])
def test_whatever_moment_it_was(further: tuple[int, ...], tmp_path: Path) -> None:
    """The newer attempt has saved nothing yet, the same step, or later ones."""
    number = 0
    while True:
        number += 1
        run = RunDir(str(tmp_path / f"run-{number}"))
        first = Lease.acquire(run, 0)
        _save(run, first, 10, 20, best=10)
        newer: list[Lease] = []

        def meanwhile(run: RunDir = run, newer: list[Lease] = newer) -> None:
            newer.append(Lease.acquire(run, catalog.latest_step(run)))
            _save(run, newer[0], *further, best=10)

        with pytest.MonkeyPatch.context() as patch, suppress(LauncherError):
            count = _stand_still(patch, number, meanwhile)
            _save(run, first, 30, best=10)
        if not newer:
            break
        steps = catalog.complete_steps(run)
        assert all(catalog.find_corruption(run, step) is None for step in steps), f"call {number}: {steps}"
        begun = max(steps) if not further else max(further)
        assert catalog.latest_step(run) == begun and 10 in steps, f"call {number}: {steps}"
        for step in further[-2:]:
            assert catalog.newest_files_dir(run, step) == f"{catalog.checkpoint_dir(step)}/attempt-000002"
        _save(run, newer[0], 60, best=10)  # and it goes on
        assert catalog.latest_step(run) == 60 and catalog.find_corruption(run, 60) is None
    assert number > 20 and count[0] < number


def test_what_an_older_attempt_completes_later_does_not_count(tmp_path: Path) -> None:
    """It would go on from steps that the newer attempt has not logged."""
    run = RunDir(str(tmp_path / "run"))
    first = Lease.acquire(run, 0)
    _save(run, first, 10, 20)
    state = INITIAL_STATE.model_copy(update={"step": 30})
    Lease.acquire(run, 20)
    late = f"{catalog.checkpoint_dir(30)}/attempt-000001"
    run.write_record(f"{late}/state.json", state)
    run.write_record(f"{late}/manifest.json", catalog.read_manifest(run, 20).model_copy(update={"step": 30}))
    assert catalog.complete_steps(run) == [10, 20] and not catalog.is_complete(run, 30)
