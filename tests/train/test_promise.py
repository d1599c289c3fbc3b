"""The promise: workers, micro-batches, ZeRO stages and interruptions do not change the loss curve."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_curve, train_losses, with_job

_STEPS = 30
_HALF_STEPS = 12
_Cut = tuple[int, int | None]
_GRID = [(zero, micro) for zero in (0, 1, 2, 3) for micro in (1, 4, None)]
# Every stage, micro-batch and number of workers, and every stage with two of the micro-batches; `long` has all of them.
_COVERING: dict[int, list[_Cut]] = {
    1: [(0, None), (2, 1)],
    2: [(0, 4), (1, 1), (2, None), (3, 4)],
    3: [(0, 1), (1, 4), (2, 4), (3, None)],
}


def _curves(prepared: PreparedJob, workers: int, folder: str, cuts: list[_Cut]) -> dict[str, list[float]]:
    jobs = {
        f"{zero}/{micro}": with_job(
            prepared,
            name=f"w{workers}-z{zero}-m{micro}",
            parallel={"zero": zero, "micro_batch": micro},
            cluster={"workers": workers},
            output={"storage": folder},
        )
        for zero, micro in cuts
    }
    return {name: train_curve(job) for name, job in jobs.items()}


@pytest.mark.parametrize(
    "cuts", [_COVERING, pytest.param({1: _GRID, 2: _GRID, 3: _GRID}, marks=pytest.mark.long)], ids=["covering", "grid"]
)
def test_curve_is_a_function_of_the_job_file(tiny_bert: Path, tmp_path: Path, cuts: dict[int, list[_Cut]]) -> None:
    # 331 rows, 30 steps of 11: neither is divisible by 2 or 3 workers, nor by micro-batches of 4.
    data = write_splits(tmp_path / "data", train=331, row_group=37)
    prepared = prepared_job(tiny_bert, data, tmp_path, train={"max_steps": _STEPS, "learning_rate": 5e-3})
    curves = {workers: run_group(workers, _curves, prepared, workers, str(tmp_path), cuts[workers]) for workers in cuts}
    reference = np.array(curves[1]["0/None"])
    assert len(reference) == _STEPS
    assert reference[-5:].mean() < reference[:5].mean() - 0.05  # it learns, so equality means something
    for workers, by_cut in curves.items():
        for cut, curve in by_cut.items():
            assert np.abs(np.array(curve) - reference).max() < 1e-5, f"{workers} workers, zero/micro {cut}"


_STAGES: dict[str, list[_Cut]] = {"bf16": [(0, 4), (1, 4), (2, 4)], "fp16": [(1, 4), (2, 4)]}  # fp16 needs ZeRO
_HALVES: dict[int, list[_Cut]] = {1: [(1, None)], 2: [(3, 1)], 3: [(2, 1)]}
_TOLERANCES = {"bf16": 5e-3, "fp16": 1e-3}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32_on_any_cluster(tiny_bert: Path, tmp_path: Path, precision: str) -> None:
    # Gradients of a micro-batch are rounded to half precision, and accumulated, exchanged and stepped in fp32.
    # With the same micro-batches and workers the stages agree as they do in fp32.
    if precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("the processor has no fp16")
    data = write_splits(tmp_path / "data", train=331, row_group=37)
    train = {"max_steps": _HALF_STEPS, "learning_rate": 5e-3}
    plain = prepared_job(tiny_bert, data, tmp_path, train=train)
    half = prepared_job(tiny_bert, data, tmp_path, train={**train, "precision": precision})
    reference = np.array(run_group(1, _curves, plain, 1, str(tmp_path / "fp32"), [(0, None)])["0/None"])
    stages = run_group(2, _curves, half, 2, str(tmp_path / "stages"), _STAGES[precision])
    curves = [np.array(curve) for curve in stages.values()]
    for curve in curves[1:]:
        assert np.abs(curve - curves[0]).max() < 1e-5
    for workers, cuts in _HALVES.items():
        curves += map(np.array, run_group(workers, _curves, half, workers, str(tmp_path / "cuts"), cuts).values())
    for curve in curves:
        assert np.abs(curve - reference).max() < _TOLERANCES[precision]


def _job(model: Path, folder: Path, zero: int | str, every_steps: int, /, **sections: Any) -> PreparedJob:
    """Return a job of two epochs with 12 steps each."""
    data = write_splits(folder / "data", train=131, row_group=37)
    checkpoint = {"every_steps": every_steps, "every_minutes": None}
    return prepared_job(
        model, data, folder, parallel={"zero": zero}, checkpoint=checkpoint, **{"train": {"epochs": 2}, **sections}
    )


@pytest.mark.parametrize(("before", "after", "near"), [(0, 2, 1e-5), (1, 0, 0.0)])
def test_half_precision_resumes_at_another_stage(
    tiny_bert: Path, tmp_path: Path, before: int, after: int, near: float
) -> None:
    # With three workers as near as two such runs are; ZeRO 2 adds gradients in another order.
    train = {"max_steps": 12, "learning_rate": 3e-3, "precision": "bf16"}
    job = _job(tiny_bert, tmp_path, before, 4, train=train)
    reference = dict(run_group(2, train_losses, with_job(job, name="whole")))
    for workers, tolerance in ((2, near), (3, 1e-3)):
        stopped = with_job(job, name=f"stopped-{workers}")
        run_group(2, train_losses, stopped, 6)
        resumed = with_job(stopped, cluster={"workers": workers}, parallel={"zero": after})
        lines = run_group(workers, train_losses, resumed)
        assert lines[0][0] == 9  # the checkpoint of step 8
        assert max(abs(loss - reference[step]) for step, loss in lines) <= tolerance


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_gradients_are_clipped_as_before_at_another_stage(
    tiny_bert: Path, tmp_path: Path, before: int, after: int
) -> None:
    """A checkpoint says how DeepSpeed clips: not at all with ZeRO 1, as the launcher does."""
    train = {"max_steps": 10, "learning_rate": 3e-3, "max_grad_norm": 0.05}
    job = _job(tiny_bert, tmp_path, before, 4, train=train)
    reference = dict(run_group(2, train_losses, with_job(job, name="whole")))
    run_group(2, train_losses, job, 4)
    resumed = run_group(2, train_losses, with_job(job, parallel={"zero": after}))
    assert [step for step, _ in resumed] == list(range(5, 11))
    assert max(abs(loss - reference[step]) for step, loss in resumed) < 1e-6


@pytest.mark.parametrize("zero", [2, 3])  # the others: test_bits.py
def test_resume_matches_uninterrupted_run(tiny_bert: Path, tmp_path: Path, zero: int) -> None:
    """Stopped within a window of the second epoch; dropout is on, so its noise must resume as well."""
    job = _job(tiny_bert, tmp_path, zero, 7, model={"dropout": None})
    reference = dict(run_group(2, train_losses, with_job(job, name="whole")))
    stopped = with_job(job, name="stopped")
    first = run_group(2, train_losses, stopped, 16)
    second = run_group(2, train_losses, stopped)
    assert first[-1][0] == 16 and second[0][0] == 15  # the checkpoint of step 14: mid-window, mid-epoch
    assert len(reference) == 24
    assert second == [[step, reference[step]] for step in range(15, 25)]


@pytest.mark.parametrize(
    "zero", [*(pytest.param(zero, marks=pytest.mark.long) for zero in (0, 1, 2)), 3, "auto"]
)  # 0 and 1: test_bits.py
def test_resume_with_another_number_of_workers_matches_uninterrupted_run(
    tiny_bert: Path, tmp_path: Path, zero: int | str
) -> None:
    # `auto` trains one worker without ZeRO and more with stage 2, so that checkpoints change their shape and stage.
    job = _job(tiny_bert, tmp_path, zero, 7)
    reference = dict(run_group(2, train_losses, with_job(job, name="whole")))
    stopped = with_job(job, name="stopped")
    run_group(2, train_losses, stopped, 10)
    for workers, first_step, stop_after in ((1, 8, 17), (3, 15, 24)):
        second = run_group(workers, train_losses, with_job(stopped, cluster={"workers": workers}), stop_after)
        assert second[0][0] == first_step
        for step, loss in second:
            assert abs(loss - reference[step]) < 1e-5, f"step {step} with {workers} workers"
