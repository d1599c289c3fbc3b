"""Which checkpoints a run has, and which of them go. Any process, so nothing heavy is imported.

`checkpoint.py` writes and reads them.
"""

from launcher.errors import RunError
from launcher.records import ManifestRecord
from launcher.rundir import RunDir


def directory_of(step: int) -> str:
    """The checkpoint's directory in the run."""
    return f"checkpoints/step-{step:08d}"


def complete_steps(run: RunDir) -> list[int]:
    """Steps of the checkpoints that have a manifest, oldest first."""
    names = [name for name in run.list("checkpoints") if name.startswith("step-") and name[5:].isdigit()]
    return [int(name[5:]) for name in names if run.exists(f"checkpoints/{name}/manifest.json")]


def latest_step(run: RunDir) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    return max(complete_steps(run), default=0)


def refuse_stage(manifest: ManifestRecord, zero: int) -> None:
    """Refuse a ZeRO stage that cannot read a checkpoint.

    Raises:
        RunError: only one of the two is stage 3.
    """
    if (manifest.zero == 3) != (zero == 3):
        raise RunError(
            f"the checkpoint of step {manifest.step} was written with ZeRO stage {manifest.zero}, stage {zero} cannot "
            f"read it; set parallel.zero: {manifest.zero} to go on"
        )


def prune(run: RunDir, keep_last: int, best_step: int | None) -> None:
    """Remove checkpoints that are neither among the last nor the best."""
    steps = complete_steps(run)
    for step in steps[:-keep_last]:
        if step != best_step:
            remove(run, step)


def remove(run: RunDir, step: int) -> None:
    """Remove a checkpoint, its manifest first: what is left when this is interrupted counts as nothing."""
    run.delete(f"{directory_of(step)}/manifest.json")
    run.delete(directory_of(step))
