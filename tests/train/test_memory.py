"""Knobs that trade memory for time leave the curve alone; lower precision still learns."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

_TRAIN = {"learning_rate": 5e-3, "epochs": 1}
_KNOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation-checkpointing": {"parallel": {"activation_checkpointing": True}},
    "offload": {"parallel": {"zero": 3, "offload_optimizer": True, "offload_parameters": True}},
    "bf16": {"train": {"precision": "bf16"}},
    "deterministic": {"train": {"deterministic": True}},
}


def _curves(prepared: Any) -> dict[str, list[float]]:
    jobs = {name: with_job(prepared, name=name, **sections) for name, sections in _KNOBS.items()}
    return {name: [loss for _, loss in train_here(job)["lines"]] for name, job in jobs.items()}


def test_memory_knobs_leave_the_curve_alone(tiny_bert: Path, tmp_path: Path) -> None:
    """The first use of offloading compiles DeepSpeed's CPU optimizer, about a minute."""
    data = write_splits(tmp_path / "data", train=220)
    curves = {
        k: np.array(v) for k, v in run_group(2, _curves, prepared_job(tiny_bert, data, tmp_path, train=_TRAIN)).items()
    }
    plain = curves["plain"]
    assert np.abs(curves["activation-checkpointing"] - plain).max() < 1e-5
    assert np.abs(curves["deterministic"] - plain).max() == 0.0
    assert np.abs(curves["offload"] - plain).max() < 1e-5  # another kernel of the same AdamW
    assert np.abs(curves["bf16"][:3] - plain[:3]).max() < 0.02 and np.isfinite(curves["bf16"]).all()
