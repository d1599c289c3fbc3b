"""Optimizer states on a disk: the same curve, and checkpoints that are like any others of ZeRO-3."""

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
    """Large enough for DeepSpeed to swap, which leaves what is below a MiB in memory; saved at `_HALF`."""
    folder = tmp_path_factory.mktemp("swapped")
    sections: dict[str, Any] = {
        "train": {"epochs": 1, "learning_rate": 3e-3},
        "parallel": {"zero": 3, "offload_optimizer": True},
        "checkpoint": {"every_minutes": None, "every_steps": _HALF, "keep_last": 9},
    }
    data = write_splits(folder / "data", train=11 * _STEPS, row_group=50)
    return prepared_job(make_tiny_bert(folder / "bert", hidden_size=256), data, folder, **sections)


def _run(prepared: PreparedJob, stop_after: int | None = None) -> Any:
    """The losses of this attempt, and the most files there were."""
    from launcher.train.engine import Engine

    seen: list[int] = []
    disk = prepared.job.parallel.offload_path

    def count(engine: Engine) -> None:
        assert engine.saves_from_files == (disk is not None)
        seen.append(0 if disk is None else len(list(Path(disk).glob("launcher-swap-*/**/*.swp"))))

    return {"losses": train_here(prepared, stop_after, on_engine=count)["lines"], "files": max(seen)}


def _weights(prepared: PreparedJob, step: int) -> Any:
    """Of a checkpoint, read into an engine that has other ones."""
    state = weights_at(prepared, step)
    return None if state is None else {name: float(tensor.double().square().sum()) for name, tensor in state.items()}


@pytest.mark.long
def test_a_disk_changes_nothing(job: PreparedJob, tmp_path: Path) -> None:
    """Half by one kind of workers, half by another: with a disk, without one, by two and by three of them."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("no libaio-dev here, which DeepSpeed compiles its kernel with")
    disk = {"offload_path": str(tmp_path)}
    whole = run_group(2, _run, with_job(job, name="memory"))["losses"]
    assert len(whole) == _STEPS
    kinds = {"disk": (2, disk), "memory": (2, {}), "torch": (2, {"offload_optimizer": False}), "three": (3, disk)}
    for first, then in [("disk", "disk"), ("disk", "torch"), ("memory", "disk"), ("disk", "three"), ("three", "disk")]:
        found = []
        for (workers, parallel), stop in ((kinds[first], _HALF), (kinds[then], None)):
            it = with_job(job, name=f"{first}-{then}", parallel=parallel, cluster={"workers": workers})
            answer = run_group(workers, _run, it, stop)
            assert bool(answer["files"]) == ("offload_path" in parallel)
            found += answer["losses"]
        assert [step for step, _ in found] == [step for step, _ in whole]
        far = np.abs(np.array([loss for _, loss in found]) - np.array([loss for _, loss in whole])).max()
        assert far == 0.0 if {first, then} <= {"disk", "memory"} else far < 1e-5, f"{first}, then {then}"
    assert list(tmp_path.iterdir()) == []  # no directory outlives its engine
    sums = [run_group(2, _weights, with_job(job, name="disk-disk", parallel=it), _HALF) for it in (disk, {})]
    assert sums[0] == sums[1]


def test_a_node_that_lets_no_memory_be_locked_is_told_of() -> None:
    """As another user than root, whom no limit binds; DeepSpeed would abort."""
    code = (
        "import os, resource\n"
        "from launcher.train.offload import nvme\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20)); os.setuid(65534)\n"
        "nvme._check_lockable(1 << 20)\n"
        "nvme._check_lockable(1 << 30)\n"
    )
    if os.geteuid() != 0:
        code = code.replace("; os.setuid(65534)", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    said = "lets a process lock 8192 KiB of memory, and the buffers of offloaded states take 1048576; raise the limit"
    assert said in done.stderr, done.stderr
