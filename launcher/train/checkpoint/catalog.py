"""Which checkpoints a run has, and which of them go. Any process, so nothing heavy is imported.

Each attempt writes to a directory of its own below the checkpoint's, its manifest last, and removes what older attempts
have left, never what a newer one has written: an attempt that stood still (a frozen machine, a mount that was cut off)
and goes on later harms nothing. `train/checkpoint/writer.py` writes checkpoints, `train/checkpoint/reader.py` reads
them.
"""

import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from launcher.errors import CorruptRecordError, LauncherError, RunError
from launcher.rundir.directory import RunDir
from launcher.rundir.events import record_event
from launcher.rundir.lease import Fences
from launcher.rundir.records import ManifestRecord, TrainerState
from launcher.rundir.uri import storage_error

_DAMAGED = "manifest.damaged.json"


def checkpoint_dir(step: int) -> str:
    """Return the checkpoint's directory in the run."""
    return f"checkpoints/step-{step:08d}"


def files_dir(token: int) -> str:
    """Return the name of an attempt's own directory below that of a checkpoint."""
    return f"attempt-{token:06d}"


def newest_files_dir(run: RunDir, step: int, fences: Fences | None = None) -> str | None:
    """Return the directory that holds the manifest of a checkpoint, its state and its shards.

    Args:
        run: The run.
        step: Of the checkpoint.
        fences: Of the run, where they are known already.

    Returns:
        That of the newest attempt that has completed the checkpoint and still counts; None where none has.
    """
    home = checkpoint_dir(step)
    names = run.list(home)
    fences = Fences(run) if fences is None else fences
    attempts = sorted((token for name in names if (token := _token(name)) is not None), reverse=True)
    for token in attempts:
        place = f"{home}/{files_dir(token)}"
        if not fences.excludes(step, token) and run.exists(f"{place}/manifest.json"):
            return place
    return home if "manifest.json" in names else None  # of older versions, whose attempts shared it


def _token(name: str) -> int | None:
    return int(name[8:]) if name.startswith("attempt-") and name[8:].isdigit() else None


def complete_steps(run: RunDir) -> list[int]:
    """Return the steps of the checkpoints that have a manifest, oldest first."""
    fences = Fences(run)
    names = (name for name in run.list("checkpoints") if name.startswith("step-") and name[5:].isdigit())
    return [step for step in map(int, (name[5:] for name in names)) if newest_files_dir(run, step, fences) is not None]


def is_complete(run: RunDir, step: int) -> bool:
    """Return whether there is a checkpoint of this step."""
    return newest_files_dir(run, step) is not None


def read_manifest(run: RunDir, step: int) -> ManifestRecord:
    """Return the manifest of a checkpoint.

    Raises:
        RunError: There is no such checkpoint, or its manifest cannot be read.
    """
    place = newest_files_dir(run, step)
    if place is None:
        raise RunError(f"{run.path(checkpoint_dir(step))}: holds no complete checkpoint")
    return run.read_record(f"{place}/manifest.json", ManifestRecord)


def latest_step(run: RunDir) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    return max(complete_steps(run), default=0)


def check_stage(manifest: ManifestRecord, zero: int) -> None:
    """Refuse a ZeRO stage that cannot read a checkpoint.

    Raises:
        RunError: only one of the two is stage 3.
    """
    if (manifest.zero == 3) != (zero == 3):
        raise RunError(
            f"the checkpoint of step {manifest.step} was written with ZeRO stage {manifest.zero}, stage {zero} cannot "
            f"read it; set parallel.zero: {manifest.zero} to go on"
        )


def prune(run: RunDir, keep_last: int, best_step: int | None, token: int | None = None) -> None:
    """Remove checkpoints that are neither among the last whole ones nor the best.

    Args:
        run: The run.
        keep_last: Number of those that stay.
        best_step: Stays as well.
        token: As for `remove`.

    Raises:
        RunError: Some of them cannot be removed; all others are.
    """
    steps = complete_steps(run)
    whole = [step for step in reversed(steps) if find_corruption(run, step) is None][:keep_last]
    if len(whole) == keep_last:
        gone = [step for step in steps if step < whole[-1] and step != best_step]
        _each(lambda step: remove(run, step, token), gone)


def _each(act: Callable[[int], None], steps: Iterable[int]) -> None:
    """Call for every step, also behind one that fails; then raise what the first raised."""
    refused: list[LauncherError | OSError] = []
    for step in steps:
        try:
            act(step)
        except (LauncherError, OSError) as error:
            refused.append(error)
    if refused:
        raise refused[0]


def remove_incomplete(run: RunDir, step: int, token: int | None = None) -> None:
    """Remove what attempts that died left of checkpoints of earlier steps; `token` as for `remove`."""
    complete = complete_steps(run)
    found = (int(name[5:]) for name in run.list("checkpoints") if name[5:].isdigit())
    left = [other for other in found if other < step and other not in complete]
    _each(lambda other: remove(run, other, token), left)


def quarantine(run: RunDir, step: int, why: str) -> None:
    """Let a damaged checkpoint count no more; its files stay for whoever wants to look, until a later one is made."""
    place = newest_files_dir(run, step)
    if place is None:
        return
    run.write_bytes(f"{place}/damaged.txt", f"{why}\n".encode())
    run.write_bytes(f"{place}/{_DAMAGED}", run.read_bytes(f"{place}/manifest.json"))
    run.delete(f"{place}/manifest.json")
    record_event(run, "checkpoint-damaged", step, f"the checkpoint of step {step} is damaged and not used ({why})")


def roll_back_to(run: RunDir, step: int) -> None:
    """Remove all checkpoints from `step` on: what they lack is made again."""
    for later in complete_steps(run):
        if later >= step:
            remove(run, later)


def find_corruption(run: RunDir, step: int) -> str | None:
    """Return what is wrong with a checkpoint, as far as its records and the sizes of local files tell.

    Returns:
        None where nothing is wrong. Damage is what is seen to be absent, cut short, or no record.

    Raises:
        StorageUnavailableError: The storage does not tell, for now.
        RunError: It cannot be read, or a newer version of the launcher wrote it: nothing is known of its state.
    """
    folder = newest_files_dir(run, step)
    if folder is None:
        return f"{run.path(checkpoint_dir(step))}: its manifest is missing"
    if not run.exists(f"{folder}/state.json"):
        return f"{run.path(folder)}/state.json: missing"
    try:
        manifest = run.read_record(f"{folder}/manifest.json", ManifestRecord)
        run.read_record(f"{folder}/state.json", TrainerState)
    except CorruptRecordError as error:
        return error.message
    for entry in manifest.files if run.local is not None else ():
        path = Path(run.path(folder)) / manifest.folder / entry.path
        if checkpoint_bytes(path) != entry.size_bytes:
            return f"{path}: missing or cut short"
    return None


def checkpoint_bytes(path: Path) -> int | None:
    """Return the bytes of a file, None where there is no such file.

    Raises:
        RunError: The file system does not tell; a `StorageUnavailableError` where that may pass.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(str(path), error) from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def check_restart_from_zero(run: RunDir) -> None:
    """Refuse to begin anew where a run has checkpoints, of which none can be used.

    Raises:
        RunError: It has.
    """
    damaged = []
    for name in run.list("checkpoints"):
        places = ("", *(f"{attempt}/" for attempt in run.list(f"checkpoints/{name}") if _token(attempt) is not None))
        if any(run.exists(f"checkpoints/{name}/{place}{_DAMAGED}") for place in places):
            damaged.append(name)
    if damaged:
        steps = ", ".join(str(int(name[5:])) for name in damaged)
        raise RunError(
            f"{run.path('checkpoints')}: all checkpoints are damaged (steps {steps}); restore one "
            f"({_DAMAGED} is its manifest.json), or remove that directory to train again from step 0"
        )


def remove(run: RunDir, step: int, token: int | None = None) -> None:
    """Remove a checkpoint, its manifest first: what is left when this is interrupted counts as nothing.

    Args:
        run: The run.
        step: Of the checkpoint.
        token: Of the attempt that removes it, which leaves alone what newer ones have written; None removes all.
    """
    home = checkpoint_dir(step)
    names = run.list(home)
    old = [name for name in names if token is None or (_token(name) or 0) <= token]
    for name in old:
        run.delete(f"{home}/manifest.json" if _token(name) is None else f"{home}/{name}/manifest.json")
    for name in old:
        run.delete(f"{home}/{name}")
    if len(old) == len(names):
        run.delete(home)


def remove_older(run: RunDir, step: int, token: int) -> None:
    """Remove what attempts before `token` have left of a checkpoint."""
    home = checkpoint_dir(step)
    for name in run.list(home):
        if (_token(name) or 0) < token:
            run.delete(f"{home}/{name}")
