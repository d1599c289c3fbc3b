"""Records of a run for tests that need any."""

from launcher.rundir.records import StepRecord


def step_record(step: int, loss: float = 1.0) -> StepRecord:
    """Return the line of one step."""
    return StepRecord(
        step=step, epoch=1, loss=loss, learning_rate=1e-3, grad_norm=None, samples=8, skipped_rows=0, samples_per_s=4.0,
        elapsed_s=float(step),
    )  # fmt: skip
