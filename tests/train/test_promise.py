"""The promise: workers, micro-batches, ZeRO stages and interruptions do not change the loss curve."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

_STEPS = 30
_Cut = tuple[int, int | None]
_GRID = [(zero, micro) for zero in (0, 1, 2, 3) for micro in (1, 4, None)]
# Every stage, micro-batch and number of workers, and every stage with two of the micro-batches; `long` has all of them.
_COVERING: dict[int, list[_Cut]] = {
    1: [(0, None), (2, 1)],
    2: [(0, 4), (1, 1), (2, None), (3, 4)],
    3: [(0, 1), (1, 4), (2, 4), (3, None)],
}


def _curves(prepared: Any, world_size: int, folder: str, cuts: list[_Cut]) -> dict[str, list[float]]:
    found = {}
    for zero, micro in cuts:
        job = with_job(
            prepared,
            name=f"w{world_size}-z{zero}-m{micro}",
            parallel={"zero": zero, "micro_batch": micro},
            cluster={"workers": world_size},
            output={"storage": folder},
        )
        found[f"{zero}/{micro}"] = [loss for _, loss in train_here(job)["lines"]]
    return found


@pytest.mark.parametrize(
    "cuts", [_COVERING, pytest.param({1: _GRID, 2: _GRID, 3: _GRID}, marks=pytest.mark.long)], ids=["covering", "grid"]
)
def test_curve_is_a_function_of_the_job_file(tiny_bert: Path, tmp_path: Path, cuts: dict[int, list[_Cut]]) -> None:
    """331 rows, 30 steps of 11: neither divides by 2 or 3 workers, nor by micro-batches of 4."""
    data = write_splits(tmp_path / "data", train=331, row_group=37)
    prepared = prepared_job(tiny_bert, data, tmp_path, train={"max_steps": _STEPS, "learning_rate": 5e-3})
    curves = {world: run_group(world, _curves, prepared, world, str(tmp_path), cuts[world]) for world in cuts}
    reference = np.array(curves[1]["0/None"])
    assert len(reference) == _STEPS
    assert reference[-5:].mean() < reference[:5].mean() - 0.05  # it learns, so equality means something
    for world, by_cut in curves.items():
        for cut, curve in by_cut.items():
            assert np.abs(np.array(curve) - reference).max() < 1e-5, f"{world} workers, zero/micro {cut}"


_STAGES: dict[str, list[_Cut]] = {"bf16": [(0, 4), (1, 4), (2, 4)], "fp16": [(1, 4), (2, 4)]}  # fp16 needs ZeRO
_HALVES: dict[int, list[_Cut]] = {1: [(1, None)], 2: [(3, 1)], 3: [(2, 1)]}
_APART = {"bf16": 5e-3, "fp16": 1e-3}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32_on_any_cluster(tiny_bert: Path, tmp_path: Path, precision: str) -> None:
    """Gradients of a micro-batch are rounded to half precision, and summed, exchanged and stepped in fp32.

    With the same micro-batches and workers the stages agree as they do in fp32.
    """
    data = write_splits(tmp_path / "data", train=331, row_group=37)
    train = {"max_steps": _STEPS, "learning_rate": 5e-3}
    plain = prepared_job(tiny_bert, data, tmp_path, train=train)
    half = prepared_job(tiny_bert, data, tmp_path, train={**train, "precision": precision})
    reference = np.array(run_group(1, _curves, plain, 1, str(tmp_path / "fp32"), [(0, None)])["0/None"])
    stages = run_group(2, _curves, half, 2, str(tmp_path / "stages"), _STAGES[precision])
    curves = [np.array(curve) for curve in stages.values()]
    for curve in curves[1:]:
        assert np.abs(curve - curves[0]).max() < 1e-5
    for world, cuts in _HALVES.items():
        curves += map(np.array, run_group(world, _curves, half, world, str(tmp_path / "cuts"), cuts).values())
    for curve in curves:
        assert np.abs(curve - reference).max() < _APART[precision]


def _whole(prepared: Any) -> Any:
    return train_here(prepared)["lines"]


def _part(prepared: Any, stop_after: int) -> Any:
    return train_here(prepared, stop_after)["lines"]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 0)])
def test_half_precision_resumes_at_another_stage(tiny_bert: Path, tmp_path: Path, before: int, after: int) -> None:
    """With as many workers to the bit, with another number as near as two such runs are."""
    data = write_splits(tmp_path / "data", train=131, row_group=37)
    sections: dict[str, Any] = {
        "train": {"max_steps": 12, "learning_rate": 3e-3, "precision": "bf16"},
        "checkpoint": {"every_steps": 4, "every_minutes": None},
        "parallel": {"zero": before},
    }
    job = prepared_job(tiny_bert, data, tmp_path, **sections)
    reference = dict(map(tuple, run_group(2, _whole, with_job(job, name="whole"))))
    for world, near in ((2, 0.0), (3, 1e-3)):
        stopped = with_job(job, name=f"stopped-{world}")
        run_group(2, _part, stopped, 6)
        resumed = with_job(stopped, cluster={"workers": world}, parallel={"zero": after})
        lines = run_group(world, _whole, resumed)
        assert lines[0][0] == 9  # the checkpoint of step 8
        assert max(abs(loss - reference[step]) for step, loss in lines) <= near


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    """Stopped in the middle of the second epoch's windows; dropout is on, so the noise must resume as well."""
    data = write_splits(tmp_path / "data", train=131, row_group=37)
    common: dict[str, Any] = {
        "parallel": {"zero": zero},
        "train": {"epochs": 2},
        "model": {"dropout": None},
        "checkpoint": {"every_steps": 7, "every_minutes": None},
    }
    whole = prepared_job(tiny_bert, data, tmp_path / "whole", **common)
    reference = dict(map(tuple, run_group(2, _whole, whole)))
    stopped = prepared_job(tiny_bert, data, tmp_path / "stopped", **common)
    first = run_group(2, _part, stopped, 16)
    second = run_group(2, _whole, stopped)
    assert first[-1][0] == 16 and second[0][0] == 15  # checkpoint at 14: mid-window, mid-epoch
    assert len(reference) == 24
    assert [tuple(line) for line in second] == [(step, reference[step]) for step in range(15, 25)]


@pytest.mark.parametrize("zero", [0, 1, 2, 3, "auto"])
def test_a_run_goes_on_with_another_number_of_workers(tiny_bert: Path, tmp_path: Path, zero: int | str) -> None:
    """`auto` trains one worker without ZeRO and more with stage 2, so that its checkpoints change their shape."""
    data = write_splits(tmp_path / "data", train=131, row_group=37)
    common: dict[str, Any] = {
        "parallel": {"zero": zero},
        "train": {"epochs": 2},
        "checkpoint": {"every_steps": 7, "every_minutes": None},
    }
    whole = prepared_job(tiny_bert, data, tmp_path / "whole", **common)
    reference = dict(map(tuple, run_group(2, _whole, whole)))
    stopped = prepared_job(tiny_bert, data, tmp_path / "stopped", **common)
    run_group(2, _part, stopped, 10)
    for world_size in (1, 3):
        second = run_group(
            world_size, _part, with_job(stopped, cluster={"workers": world_size}), {1: 17, 3: 24}[world_size]
        )
        assert second[0][0] == {1: 8, 3: 15}[world_size]
        for step, loss in second:
            assert abs(loss - reference[step]) < 1e-5, f"step {step} with {world_size} workers"
