"""Optimizer states on a disk: the same curve as in memory, and checkpoints like those of any ZeRO-3 run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.tiny_models import make_tiny_bert
from tests.support.worker_group import run_group, train_here, weights_at, with_job

_STEPS, _HALF = 16, 8


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    """Return a job that is large enough to swap: DeepSpeed keeps groups below 1 MiB in memory."""
    folder = tmp_path_factory.mktemp("swapped")
    sections: dict[str, Any] = {
        "train": {"epochs": 1, "learning_rate": 3e-3},
        "parallel": {"zero": 3, "offload_optimizer": True},
        "checkpoint": {"every_minutes": None, "every_steps": _HALF, "keep_last": 9},
    }
    data = write_splits(folder / "data", train=11 * _STEPS, row_group=50)
    return prepared_job(make_tiny_bert(folder / "bert", hidden_size=256), data, folder, **sections)


def _train(prepared: PreparedJob, stop_after: int | None = None) -> Any:
    """Train, and return the losses of this attempt and the number of swap files."""
    from launcher.train.engine import Engine

    swap_files: list[int] = []
    disk = prepared.job.parallel.offload_path

    def count(engine: Engine) -> None:
        assert engine.saves_from_files == (disk is not None)
        swap_files.append(0 if disk is None else len(list(Path(disk).glob("launcher-swap-*/**/*.swp"))))

    return {"losses": train_here(prepared, stop_after, on_engine=count)["lines"], "files": max(swap_files)}


def _square_sums(prepared: PreparedJob, step: int) -> Any:
    """Load a checkpoint into an engine with other weights, and return the sum of squares of each weight."""
    state = weights_at(prepared, step)
    return None if state is None else {name: float(tensor.double().square().sum()) for name, tensor in state.items()}


@pytest.mark.long
def test_offloading_to_a_disk_does_not_change_the_curve(job: PreparedJob, tmp_path: Path) -> None:
    # Each half of a run with other workers: with a disk or without, two or three of them.
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("no libaio-dev here, which DeepSpeed compiles its kernel with")
    disk = {"offload_path": str(tmp_path)}
    whole = run_group(2, _train, with_job(job, name="memory"))["losses"]
    assert len(whole) == _STEPS
    kinds = {"disk": (2, disk), "memory": (2, {}), "torch": (2, {"offload_optimizer": False}), "three": (3, disk)}
    for first, then in [("disk", "disk"), ("disk", "torch"), ("memory", "disk"), ("disk", "three"), ("three", "disk")]:
        losses = []
        for (workers, parallel), stop in ((kinds[first], _HALF), (kinds[then], None)):
            half = with_job(job, name=f"{first}-{then}", parallel=parallel, cluster={"workers": workers})
            attempt = run_group(workers, _train, half, stop)
            assert bool(attempt["files"]) == ("offload_path" in parallel)
            losses += attempt["losses"]
        assert [step for step, _ in losses] == [step for step, _ in whole]
        difference = np.abs(np.array(losses) - np.array(whole)).max()
        assert difference == 0.0 if {first, then} <= {"disk", "memory"} else difference < 1e-5, f"{first}, then {then}"
    assert list(tmp_path.iterdir()) == []  # no directory outlives its engine
    jobs = [with_job(job, name="disk-disk", parallel=parallel) for parallel in (disk, {})]
    with_disk, in_memory = [run_group(2, _square_sums, job, _HALF) for job in jobs]
    assert with_disk == in_memory


def test_limit_on_locked_memory_is_an_error() -> None:
    """DeepSpeed would abort the process. No limit binds root, so the check runs as another user."""
    code = (
        "import os, resource\n"
        "from launcher.train.offload import nvme\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20)); os.setuid(65534)\n"
        "nvme._check_lockable(1 << 20)\n"
        "nvme._check_lockable(1 << 30)\n"
    )
    if os.geteuid() != 0:
        code = code.replace("; os.setuid(65534)", "")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    error = "lets a process lock 8192 KiB of memory, and the buffers of offloaded states take 1048576; raise the limit"
    assert error in process.stderr, process.stderr
