"""Checkpoints that trials copy from each other under population based training (PBT). Train workers (rank 0).

A trial prunes its own checkpoints while it trains. Other trials may still need them, so copies stay in
`sweep/snapshots` for a while. A copy is one directory per checkpoint: hard links locally, objects on an object store.
"""

from launcher.errors import RunError
from launcher.rundir.directory import RunDir
from launcher.train.checkpoint import catalog
from launcher.tune.trial_worker import CheckpointRef

# Trials copy a snapshot within moments of its creation; a few more are for trials that wait for free resources.
_MAX_SNAPSHOTS = 4
_ATTEMPTS = 3


def store_snapshot(snapshots: RunDir, run: RunDir, step: int) -> None:
    """Copy a trial's checkpoint to its snapshots and prune the oldest of them."""
    # A complete snapshot is never copied again: that would replace the directory under the trials that read it.
    if step not in catalog.complete_steps(snapshots):
        snapshots.copy_from(run, catalog.checkpoint_dir(step), immutable=True)
        catalog.prune(snapshots, _MAX_SNAPSHOTS, None)


def fetch_snapshot(snapshots: RunDir, target: RunDir, step: int) -> CheckpointRef:
    """Copy a snapshot of another trial, whose owner may prune it at any time.

    Args:
        snapshots: Snapshots of the other trial.
        target: Directory for the copy, used for nothing else. Earlier copies in it are deleted.
        step: Step of the snapshot. If it is pruned already, the newest one is copied.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        # On an object store an interrupted copy may already have its manifest, and would look complete.
        target.delete("checkpoints")
        available = nearest_step(snapshots, step)
        try:
            target.copy_from(snapshots, catalog.checkpoint_dir(available), immutable=True)
            break
        # Pruned during the copy, so there is a newer one. Nothing locks a snapshot: its owner never waits for other
        # trials.
        except (OSError, RunError):
            if not attempts_left:
                raise
    return CheckpointRef(target.uri, available)


def nearest_step(run: RunDir, step: int) -> int:
    """Return the step if it has a complete checkpoint, else the newest step that has one."""
    steps = catalog.complete_steps(run)
    return step if step in steps else max(steps)
