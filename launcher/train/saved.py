"""Which checkpoints a run has, and which of them go. Any process, so nothing heavy is imported.

`saver.py` writes them, `checkpoint.py` reads them.
"""

from pathlib import Path

from launcher.errors import RunError
from launcher.events import note
from launcher.records import ManifestRecord, RunStateRecord
from launcher.rundir import RunDir


def directory_of(step: int) -> str:
    """The checkpoint's directory in the run."""
    return f"checkpoints/step-{step:08d}"


def complete_steps(run: RunDir) -> list[int]:
    """Steps of the checkpoints that have a manifest, oldest first."""
    names = [name for name in run.list("checkpoints") if name.startswith("step-") and name[5:].isdigit()]
    return [int(name[5:]) for name in names if run.exists(f"checkpoints/{name}/manifest.json")]


def is_complete(run: RunDir, step: int) -> bool:
    """Whether there is a checkpoint of this step."""
    return run.exists(f"{directory_of(step)}/manifest.json")


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


def sweep(run: RunDir, step: int) -> None:
    """Remove what attempts that died left of checkpoints of earlier steps."""
    complete = complete_steps(run)
    for name in run.list("checkpoints"):
        if name[5:].isdigit() and int(name[5:]) < step and int(name[5:]) not in complete:
            run.delete(f"checkpoints/{name}")


def put_aside(run: RunDir, step: int, why: str) -> None:
    """Let a damaged checkpoint count no more; its files stay for whoever wants to look, until a later one is made."""
    folder = directory_of(step)
    run.write_bytes(f"{folder}/damaged.txt", f"{why}\n".encode())
    run.delete(f"{folder}/manifest.json")
    note(run, "checkpoint-damaged", step, f"the checkpoint of step {step} is damaged and not used ({why})")


def go_back(run: RunDir, step: int) -> None:
    """Remove all checkpoints from `step` on: what they lack is made again."""
    for later in complete_steps(run):
        if later >= step:
            remove(run, later)


def damage_of(run: RunDir, step: int) -> str | None:
    """What is wrong with a checkpoint, as far as its records and the sizes of local files tell; None for nothing."""
    folder = directory_of(step)
    try:
        manifest = run.read_record(f"{folder}/manifest.json", ManifestRecord)
        run.read_record(f"{folder}/state.json", RunStateRecord)
    except RunError as error:
        return error.message
    for entry in manifest.files if run.local is not None else ():
        path = Path(run.path(folder)) / manifest.folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            return f"{path}: missing or cut short"
    return None


def remove(run: RunDir, step: int) -> None:
    """Remove a checkpoint, its manifest first: what is left when this is interrupted counts as nothing."""
    run.delete(f"{directory_of(step)}/manifest.json")
    run.delete(directory_of(step))
