"""Checkpoints that trials hand to each other (pbt), below the sweep's own directory. Train workers.

A trial removes its own checkpoints as it goes on; a snapshot stays for those that may copy it, for a while.
"""

from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.train.checkpoint import catalog
from launcher.tune.trial_worker import CheckpointRef

# A trial is copied within moments of its snapshot; a few more wait for trials that find no room at once.
_KEPT = 4
_TRIES = 3


def keep_checkpoint(kept: RunDir, run: RunDir, step: int) -> None:
    """Keep a trial's checkpoint for others; of its older ones only a few stay."""
    if step not in catalog.complete_steps(kept):
        kept.copy_from(run, catalog.checkpoint_dir(step), immutable=True)
        catalog.prune(kept, _KEPT, None)


def take_checkpoint(other: RunDir, kept: RunDir, step: int) -> CheckpointRef:
    """Take a snapshot for oneself until it is loaded: its owner goes on, makes newer ones and drops this one.

    Args:
        other: where the owner keeps its snapshots.
        kept: where the taker does; holds nothing else.
        step: of the snapshot; when it has given way already, the newest one is taken.
    """
    for tries_left in reversed(range(_TRIES)):
        kept.delete("checkpoints")
        chosen = nearest_step(other, step)
        try:
            kept.copy_from(other, catalog.checkpoint_dir(chosen), immutable=True)
            break
        except (OSError, RunError):  # it has given way while it was copied; there is a newer one then
            if not tries_left:
                raise
    return CheckpointRef(kept.uri, chosen)


def nearest_step(run: RunDir, step: int) -> int:
    """The step itself where there is such a checkpoint, else that of the newest one."""
    steps = catalog.complete_steps(run)
    return step if step in steps else max(steps)
