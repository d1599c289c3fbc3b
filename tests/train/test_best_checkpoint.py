"""The best model of a run is an earlier checkpoint: its weights come back, under whatever stage they were saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, weights_at, with_job

_BEST, _STEPS = 2, 6


def _train(prepared: PreparedJob) -> None:
    train_here(prepared)


def _read_back(prepared: PreparedJob, step: int) -> Any:
    """By an engine that has trained past it, as at a run's end; lists, as the group's answers are plain."""
    state = weights_at(prepared, step, after=_STEPS)
    return None if state is None else {name: tensor.tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("workers", [2, 3])
def test_an_earlier_checkpoints_weights_come_back(tiny_bert: Path, tmp_path: Path, workers: int) -> None:
    """Saved by two workers; three read it through the universal format."""
    data = write_splits(tmp_path / "data", train=11 * _STEPS)
    checkpoints = {"every_minutes": None, "every_steps": _BEST, "keep_last": _STEPS}
    found = {}
    for zero in (0, 1, 2, 3):
        prepared = prepared_job(
            tiny_bert, data, tmp_path / f"zero-{zero}", parallel={"zero": zero}, checkpoint=checkpoints
        )
        run_group(2, _train, prepared)
        found[zero] = run_group(workers, _read_back, with_job(prepared, cluster={"workers": workers}), _BEST)
    files = tmp_path / "zero-0/test/checkpoints"
    saved = {step: _module(files / f"step-{step:08d}") for step in (_BEST, _STEPS)}
    assert max(float((saved[_BEST][n] - saved[_STEPS][n]).abs().max()) for n in saved[_BEST]) > 1e-4  # it went on
    for zero, state in found.items():
        assert state.keys() == saved[_BEST].keys()
        far = max(float((torch.tensor(value) - saved[_BEST][name]).abs().max()) for name, value in state.items())
        assert far < 1e-5, f"stage {zero}"


def _module(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "attempt-000000/state/mp_rank_00_model_states.pt"
    module: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["module"]
    return module
