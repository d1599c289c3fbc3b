"""Checkpoints that are written while training goes on: the same bits, whatever the storage does meanwhile."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.prepare import PreparedJob
from launcher.errors import LauncherError
from launcher.rundir.events import read_events
from launcher.rundir.lease import Lease
from launcher.train.checkpoint import catalog, writer
from launcher.train.checkpoint.staging import StagingBuffers
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here


def _job(model: Path, folder: Path, **sections: Any) -> PreparedJob:
    if not (folder.parent / "data").exists():
        write_splits(folder.parent / "data", train=200, validation=20)
    data = {name: str(folder.parent / f"data/{name}.parquet") for name in ("train", "validation")}
    checkpoint = {"every_steps": 3, "every_minutes": None, **sections.pop("checkpoint", {})}
    return prepared_job(model, data, folder, checkpoint=checkpoint, evaluation={"every_steps": 8}, **sections)


def _train(prepared: PreparedJob, stop_after: int | None = None, fault: str = "") -> Any:
    """Train in this process, with a fault of the storage; LauncherErrors come back as text."""
    restore = _FAULTS[fault](prepared) if fault else lambda: None
    try:
        lease = Lease(prepared.run, 1)
        return train_here(prepared, stop_after, lease=lease)
    except LauncherError as error:
        return {"error": f"{type(error).__name__}: {error.message}"}
    finally:
        restore()


def _fails(when: Any) -> Any:
    """Writing a file of a checkpoint fails where `when(step, count)` says so."""

    def install(_: PreparedJob) -> Any:
        real, count = writer.write_state_files, [0]

        def write(run: Any, directory: str, name: str, tree: object) -> Any:
            count[0] += 1
            number = when(int(directory.split("/")[1][5:]), count[0])
            if number:
                raise OSError(number, os.strerror(number))
            return real(run, directory, name, tree)

        writer.write_state_files = write
        return lambda: setattr(writer, "write_state_files", real)

    return install


_FAULTS: dict[str, Any] = {
    "full at 6": _fails(lambda step, _: errno.ENOSPC if step == 6 else 0),
    "full from 6": _fails(lambda step, _: errno.ENOSPC if step >= 6 else 0),
    "every third": _fails(lambda _, count: errno.EIO if count % 3 == 0 else 0),
    "best fails": _fails(lambda step, _: errno.ENOSPC if step % 8 == 0 else 0),
}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_in_the_background_the_same_bits_are_written(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    found = {}
    for background in (True, False):
        prepared = _job(
            tiny_bert, tmp_path / str(background), parallel={"zero": zero}, checkpoint={"background": background}
        )
        lines = run_group(2, _train, prepared)["lines"]
        manifests = {step: catalog.read_manifest(prepared.run, step) for step in catalog.complete_steps(prepared.run)}
        assert max(manifests) == 19 and len(manifests) in (2, 3)
        tensors = {
            (step, entry.path): _tensors(
                prepared.run.path(f"{catalog.newest_files_dir(prepared.run, step)}/{entry.path}")
            )
            for step, manifest in manifests.items()
            for entry in manifest.files
        }
        found[background] = (lines, tensors)
        assert not list((tmp_path / str(background)).glob("test/checkpoints/*/*/parts"))
    assert found[True][0] == found[False][0]
    assert found[True][1].keys() == found[False][1].keys()
    for name, tensors in found[True][1].items():
        others = found[False][1][name]
        assert len(tensors) == len(others) > 0
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True)), name


def _tensors(path: str) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    queue = [torch.load(path, map_location="cpu", weights_only=False)]
    while queue:
        value = queue.pop(0)
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            queue += [value[key] for key in sorted(value, key=str)]
        elif isinstance(value, list | tuple):
            queue += value
    return found


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_run_goes_on_from_what_was_written_in_the_background(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    whole = run_group(2, _train, _job(tiny_bert, tmp_path / "whole", parallel={"zero": zero}))
    parts = _job(tiny_bert, tmp_path / "parts", parallel={"zero": zero})
    first = run_group(2, _train, parts, 11)  # the process ends with a window
    assert catalog.latest_step(parts.run) in (9, 12)
    second = run_group(2, _train, parts)
    curve = dict(map(tuple, first["lines"])) | dict(map(tuple, second["lines"]))
    assert curve == dict(map(tuple, whole["lines"]))


def test_a_full_disk_costs_one_checkpoint(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 9})
    found = run_group(2, _train, prepared, None, "full at 6")
    assert found["result"]["steps"] == 19
    assert 6 not in catalog.complete_steps(prepared.run) and {3, 9} <= set(catalog.complete_steps(prepared.run))
    (event,) = read_events(prepared.run)
    assert event.kind == "checkpoint-failed" and "step 6 was not saved" in event.text
    assert "No space left on device" in event.text and event.text.endswith("training continues")
    assert not list((tmp_path / "runs/test/checkpoints/step-00000006").glob("*/manifest.json"))


def test_the_last_good_checkpoint_stays(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 1})
    found = run_group(2, _train, prepared, None, "full from 6")
    assert found["result"]["steps"] == 19
    assert catalog.complete_steps(prepared.run) == [3]


def test_stop_when_told_to(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"on_failure": "stop"})
    found = run_group(2, _train, prepared, None, "full at 6")
    assert found["error"].startswith("TrainingError: the checkpoint of step 6 was not saved (")
    assert catalog.complete_steps(prepared.run) == [3]


def test_a_storage_that_fails_now_and_then_is_asked_again(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 9}, train={"max_steps": 6})
    found = run_group(2, _train, prepared, None, "every third")
    assert found["result"]["steps"] == 6
    assert catalog.complete_steps(prepared.run) == [3, 6] and not read_events(prepared.run)


def _without_room(prepared: PreparedJob) -> Any:
    import shutil

    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=1000)
    try:
        return _train(prepared)
    finally:
        shutil.disk_usage = real


def test_a_disk_without_room_is_told_before_anything_is_written(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", train={"max_steps": 4})
    assert run_group(2, _without_room, prepared)["result"]["steps"] == 4
    assert not catalog.complete_steps(prepared.run)
    assert "and 0 MiB are free" in read_events(prepared.run)[0].text


def test_a_stale_attempt_completes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs")
    for _ in range(2):
        Lease.acquire(prepared.run)  # the workers hold the first
    found = run_group(2, _train, prepared)
    assert found["error"].startswith("StaleAttemptError: ") and "has taken over from attempt 1" in found["error"]
    assert not catalog.complete_steps(prepared.run)
    assert not (tmp_path / "runs/test/metrics.jsonl").exists() or not list(prepared.run.read_metrics())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 9})
    whole = run_group(2, _train, prepared)["lines"]
    shard = sorted((tmp_path / "runs/test/checkpoints/step-00000019").glob("*/state/*rank_1*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    said = run_group(2, _train, prepared)["error"]
    assert said.startswith("CorruptCheckpointError: the checkpoint of step 19 is damaged (") and shard.name in said
    assert catalog.latest_step(prepared.run) == 18
    assert run_group(2, _train, prepared)["lines"] == whole[18:]
    assert catalog.latest_step(prepared.run) == 19, "made again"
    assert not list((tmp_path / "runs/test/checkpoints/step-00000019").glob("*/*damaged*"))


@pytest.mark.parametrize("harm", ["cut", "gone", "manifest", "state"])
def test_what_can_be_seen_without_reading_it_all(tiny_bert: Path, tmp_path: Path, harm: str) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", train={"max_steps": 3})
    run_group(2, _train, prepared)
    assert catalog.find_corruption(prepared.run, 3) is None
    folder = tmp_path / "runs/test/checkpoints/step-00000003"
    file = sorted(folder.glob("*/state/*"))[0]
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "gone":
        file.unlink()
    else:
        next(folder.glob(f"*/{harm}.json")).write_text(json.dumps({"step": 3})[:-3])
    damage = catalog.find_corruption(prepared.run, 3)
    assert damage is not None and (file.name if harm in ("cut", "gone") else harm) in damage


def test_a_copy_is_no_view() -> None:
    shared = torch.arange(4.0)
    states = {"a": {"x": shared, "again": shared, "list": [torch.ones(2), 3, ("y", None)], "empty": torch.ones(0)}}
    copier = StagingBuffers()
    first = copier.copy(states)
    assert first["a"]["x"] is first["a"]["again"] and first["a"]["list"][1:] == [3, ("y", None)]
    shared += 1
    assert first["a"]["x"].tolist() == [0, 1, 2, 3]
    second = copier.copy(states)
    assert second["a"]["x"].tolist() == [1, 2, 3, 4]
    assert second["a"]["x"].data_ptr() == first["a"]["x"].data_ptr(), "the same memory again"
