"""Options that trade memory for time, or compile the model, do not change the curve; lower precision still learns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_curve, with_job

_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation-checkpointing": {"parallel": {"activation_checkpointing": True}},
    "offload": {"parallel": {"zero": 3, "offload_optimizer": True, "offload_parameters": True}},
    "bf16": {"train": {"precision": "bf16"}},
    "deterministic": {"train": {"deterministic": True}},
}
_COMPILED: dict[str, dict[str, Any]] = {
    f"compiled-{zero}": {"train": {"compile": True}, "parallel": {"zero": zero}} for zero in (0, 2)
}


def _curves(prepared: PreparedJob, options: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    return {name: train_curve(with_job(prepared, name=name, **sections)) for name, sections in options.items()}


def _train(model: Path, folder: Path, rows: int, options: dict[str, dict[str, Any]], **sections: Any) -> dict[str, Any]:
    data = write_splits(folder / "data", train=rows)
    prepared = prepared_job(model, data, folder, train={"learning_rate": 5e-3, "epochs": 1}, **sections)
    return {name: np.array(curve) for name, curve in run_group(2, _curves, prepared, options).items()}


def test_memory_options_do_not_change_the_curve(tiny_bert: Path, tmp_path: Path) -> None:
    """Slow at first: offloading compiles DeepSpeed's CPU optimizer, about a minute."""
    curves = _train(tiny_bert, tmp_path, 220, _OPTIONS)
    plain = curves["plain"]
    assert np.abs(curves["activation-checkpointing"] - plain).max() < 1e-5
    assert np.abs(curves["deterministic"] - plain).max() == 0.0
    assert np.abs(curves["offload"] - plain).max() < 1e-5  # another kernel of the same AdamW
    assert np.abs(curves["bf16"][:3] - plain[:3]).max() < 0.02 and np.isfinite(curves["bf16"]).all()


@pytest.mark.long  # inductor and its compiler take a minute or two
def test_compiled_model_has_the_same_curve(tiny_bert: Path, tmp_path: Path) -> None:
    # Without dropout, whose noise differs in compiled code. Costs and gains: `tests/benchmarks/README.md`.
    plain, *compiled = _train(tiny_bert, tmp_path, 66, {"plain": {}} | _COMPILED, parallel={"zero": 0}).values()
    assert len(plain) == 6
    for curve in compiled:
        assert np.abs(curve - plain).max() < 1e-4
