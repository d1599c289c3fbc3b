"""Learning rate as a pure function of the step. Runs in train workers; `loop.py` calls it before every step."""

import math

from launcher.spec.train import TrainSpec


def learning_rate(train: TrainSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        train: Peak learning rate and schedule.
        step: Number of steps completed before this one.
        total_steps: Number of steps of the whole run.
    """
    schedule = train.schedule
    warmup = math.ceil(schedule.warmup_fraction * total_steps)
    if step < warmup:
        # From `step + 1`: a rate of zero would waste the first batch.
        return train.learning_rate * (step + 1) / warmup
    # Zero steps remain after a warm-up over the whole run.
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule.type == "linear":
        return train.learning_rate * max(0.0, 1.0 - progress)
    if schedule.type == "cosine":
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return train.learning_rate
