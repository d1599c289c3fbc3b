"""Records of a run for tests that need any."""

from typing import Any

from launcher.rundir.certificate import ShapeProof
from launcher.rundir.records import StepRecord


def step_record(step: int, loss: float = 1.0) -> StepRecord:
    """Return the line of one step."""
    return StepRecord(
        step=step, epoch=1, loss=loss, learning_rate=1e-3, grad_norm=None, samples=8, skipped_rows=0, samples_per_s=4.0,
        elapsed_s=float(step),
    )  # fmt: skip


def shape_proof(workers: int, zero: int, **changes: Any) -> ShapeProof:
    """Return the proof of a shape that trained the same bits, with changes."""
    proven = ShapeProof(
        run=f"test-prove-w{workers}-z{zero}", workers=workers, zero=zero, micro_batch=2, inexact=(),
        compared=("losses", "evaluations", "scores", "weights"), is_bit_equal=True, largest_difference=0.0, versions={},
        hardware="",
    )  # fmt: skip
    return proven.model_copy(update=changes)
