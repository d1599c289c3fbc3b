"""Compiled models train as others do; what they cost and bring is in `tests/benchmarks/README.md`."""

from pathlib import Path
from typing import Any

import pytest

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

pytestmark = pytest.mark.long  # inductor and its compiler take a minute or two


def _curves(jobs: list[PreparedJob]) -> list[Any]:
    return [train_here(job)["lines"] for job in jobs]


def test_the_curve_is_that_of_the_model_as_it_is(tiny_bert: Path, tmp_path: Path) -> None:
    """Without dropout, whose noise compiled code draws in its own way."""
    data = write_splits(tmp_path / "data", train=66, validation=20, row_group=37)
    plain = prepared_job(tiny_bert, data, tmp_path, train={"learning_rate": 5e-3}, parallel={"zero": 0})
    compiled = [
        with_job(plain, name=f"compiled-{zero}", train={"compile": True}, parallel={"zero": zero}) for zero in (0, 2)
    ]
    curves = run_group(2, _curves, [plain, *compiled])
    for curve in curves[1:]:
        assert len(curve) == 6
        for (_, loss), (_, expected) in zip(curve, curves[0], strict=True):
            assert abs(loss - expected) < 1e-4
