"""Checkpoints written during training: the same bits as without, and storage errors cost at most one checkpoint."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

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


# Fault -> errno for writing a file of the checkpoint of a step; `count` numbers the files.
_FAULTS: dict[str, Callable[[int, int], int]] = {
    "none": lambda step, count: 0,
    "full at 6": lambda step, count: errno.ENOSPC if step == 6 else 0,
    "full from 6": lambda step, count: errno.ENOSPC if step >= 6 else 0,
    "every third": lambda step, count: errno.EIO if count % 3 == 0 else 0,
}


def _train(prepared: PreparedJob, stop_after: int | None = None, fault: str = "none", free: int | None = None) -> Any:
    """Train in this process's group with a fault of the storage, or `free` bytes of disk; return errors as text."""
    write_files, disk_usage = writer.write_state_files, shutil.disk_usage
    count = [0]

    def write(run: Any, directory: str, name: str, tree: object) -> Any:
        count[0] += 1
        number = _FAULTS[fault](int(directory.split("/")[1][5:]), count[0])
        if number:
            raise OSError(number, os.strerror(number))
        return write_files(run, directory, name, tree)

    def usage(path: Any) -> Any:
        return disk_usage(path) if free is None else disk_usage(path)._replace(free=free)

    with mock.patch.object(writer, "write_state_files", write), mock.patch.object(shutil, "disk_usage", usage):
        try:
            return train_here(prepared, stop_after, lease=Lease(prepared.run, 1))
        except LauncherError as error:
            return {"error": f"{type(error).__name__}: {error.message}"}


@pytest.mark.parametrize(
    "zero", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3]
)
def test_background_writing_saves_the_same_bits(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    lines, files = {}, {}
    for background in (True, False):
        sections = {"parallel": {"zero": zero}, "checkpoint": {"background": background}}
        prepared = _job(tiny_bert, tmp_path / str(background), **sections)
        run = prepared.run
        lines[background] = run_group(2, _train, prepared)["lines"]
        manifests = {step: catalog.read_manifest(run, step) for step in catalog.complete_steps(run)}
        assert max(manifests) == 19 and len(manifests) in (2, 3)
        files[background] = {
            (step, entry.path): _tensors(run.path(f"{catalog.newest_files_dir(run, step)}/{entry.path}"))
            for step, manifest in manifests.items()
            for entry in manifest.files
        }
        assert not list((tmp_path / str(background)).glob("test/checkpoints/*/*/parts"))
    assert lines[True] == lines[False]
    assert files[True].keys() == files[False].keys()
    for name, tensors in files[True].items():
        others = files[False][name]
        assert len(tensors) == len(others) > 0
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True)), name


def _tensors(path: str) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    queue = [torch.load(path, map_location="cpu", weights_only=False)]
    while queue:
        value = queue.pop(0)
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            queue += [value[key] for key in sorted(value, key=str)]
        elif isinstance(value, list | tuple):
            queue += value
    return tensors


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.long), 3])
def test_resume_from_a_background_checkpoint_matches_uninterrupted_run(
    tiny_bert: Path, tmp_path: Path, zero: int
) -> None:
    whole = run_group(2, _train, _job(tiny_bert, tmp_path / "whole", parallel={"zero": zero}))
    parts = _job(tiny_bert, tmp_path / "parts", parallel={"zero": zero})
    first = run_group(2, _train, parts, 11)  # the process ends with a window
    assert catalog.latest_step(parts.run) in (9, 12)
    second = run_group(2, _train, parts)
    assert dict(first["lines"]) | dict(second["lines"]) == dict(whole["lines"])


def test_full_disk_costs_one_checkpoint(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 9})
    assert run_group(2, _train, prepared, None, "full at 6")["result"]["steps"] == 19
    assert 6 not in catalog.complete_steps(prepared.run) and {3, 9} <= set(catalog.complete_steps(prepared.run))
    (event,) = read_events(prepared.run)
    assert event.kind == "checkpoint-failed" and "step 6 was not saved" in event.text
    assert "No space left on device" in event.text and event.text.endswith("training continues")
    assert not list((tmp_path / "runs/test/checkpoints/step-00000006").glob("*/manifest.json"))


def test_last_intact_checkpoint_is_kept_while_writes_fail(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 1})
    assert run_group(2, _train, prepared, None, "full from 6")["result"]["steps"] == 19
    assert catalog.complete_steps(prepared.run) == [3]


def test_failed_checkpoint_stops_the_run_if_the_job_says_so(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"on_failure": "stop"})
    error = run_group(2, _train, prepared, None, "full at 6")["error"]
    assert error.startswith("TrainingError: the checkpoint of step 6 was not saved (")
    assert catalog.complete_steps(prepared.run) == [3]


def test_temporary_storage_error_is_retried(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 9}, train={"max_steps": 6})
    assert run_group(2, _train, prepared, None, "every third")["result"]["steps"] == 6
    assert catalog.complete_steps(prepared.run) == [3, 6] and not read_events(prepared.run)


def test_missing_disk_space_is_reported_before_writing(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", train={"max_steps": 4})
    assert run_group(2, _train, prepared, None, "none", 1000)["result"]["steps"] == 4
    assert not catalog.complete_steps(prepared.run)
    assert "and 0 MiB are free" in read_events(prepared.run)[0].text


def test_stale_attempt_completes_no_checkpoint(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs")
    for _ in range(2):
        Lease.acquire(prepared.run)  # the workers hold the first
    error = run_group(2, _train, prepared)["error"]
    assert error.startswith("StaleAttemptError: ") and "has taken over from attempt 1" in error
    assert not catalog.complete_steps(prepared.run)
    assert not (tmp_path / "runs/test/metrics.jsonl").exists() or not list(prepared.run.read_metrics())


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = _job(tiny_bert, tmp_path / "runs", checkpoint={"keep_last": 9})
    whole = run_group(2, _train, prepared)["lines"]
    shard = sorted((tmp_path / "runs/test/checkpoints/step-00000019").glob("*/state/*rank_1*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    error = run_group(2, _train, prepared)["error"]
    assert error.startswith("CorruptCheckpointError: the checkpoint of step 19 is damaged (") and shard.name in error
    assert catalog.latest_step(prepared.run) == 18
    assert run_group(2, _train, prepared)["lines"] == whole[18:]
    assert catalog.latest_step(prepared.run) == 19, "written again"
    assert not list((tmp_path / "runs/test/checkpoints/step-00000019").glob("*/*damaged*"))


@pytest.mark.parametrize("harm", ["cut", "gone", "manifest", "state"])
def test_obvious_corruption_is_found_without_hashing(tiny_bert: Path, tmp_path: Path, harm: str) -> None:
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
    corruption = catalog.find_corruption(prepared.run, 3)
    assert corruption is not None and (file.name if harm in ("cut", "gone") else harm) in corruption


def test_staged_copy_is_no_view_and_reuses_memory() -> None:
    shared = torch.arange(4.0)
    states = {"a": {"x": shared, "again": shared, "list": [torch.ones(2), 3, ("y", None)], "empty": torch.ones(0)}}
    buffers = StagingBuffers()
    first = buffers.copy(states)
    assert first["a"]["x"] is first["a"]["again"] and first["a"]["list"][1:] == [3, ("y", None)]
    shared += 1
    assert first["a"]["x"].tolist() == [0, 1, 2, 3]
    second = buffers.copy(states)
    assert second["a"]["x"].tolist() == [1, 2, 3, 4]
    assert second["a"]["x"].data_ptr() == first["a"]["x"].data_ptr()
