"""Checkpoints of a run on the storage: which are complete, corrupt or obsolete. Runs in any process.

Nothing heavy is imported, as the client and the head use it too. Each attempt writes to its own directory inside the
checkpoint's directory, its manifest last, and removes only what older attempts wrote. So an attempt that was frozen and
wakes up later cannot damage a newer one. `writer.py` writes checkpoints, `reader.py` loads them.
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

_QUARANTINED = "manifest.damaged.json"
_ATTEMPT = "attempt-"


def checkpoint_dir(step: int) -> str:
    """Return the directory of a checkpoint, relative to the run."""
    return f"checkpoints/step-{step:08d}"


def files_dir(token: int) -> str:
    """Return the name of an attempt's directory inside a checkpoint's directory."""
    return f"{_ATTEMPT}{token:06d}"


def newest_files_dir(run: RunDir, step: int, fences: Fences | None = None) -> str | None:
    """Return the directory that holds the manifest, state and shards of a checkpoint, relative to the run.

    Args:
        run: Run directory.
        step: Step of the checkpoint.
        fences: Fences of the run; None reads them.

    Returns:
        Directory of the newest attempt that completed the checkpoint and is not fenced off; None without such an
        attempt.
    """
    home = checkpoint_dir(step)
    names = run.list(home)
    # Read once for all steps: on an object store each reading is a listing and some requests.
    fences = Fences(run) if fences is None else fences
    tokens = sorted((token for token in map(_token, names) if token is not None), reverse=True)
    for token in tokens:
        directory = f"{home}/{files_dir(token)}"
        if not fences.excludes(step, token) and run.exists(f"{directory}/manifest.json"):
            return directory
    # Early versions: all attempts shared the directory.
    return home if "manifest.json" in names else None


def _token(name: str) -> int | None:
    digits = name.removeprefix(_ATTEMPT)
    return int(digits) if name != digits and digits.isdigit() else None


def complete_steps(run: RunDir) -> list[int]:
    """Return the steps of all complete checkpoints (those with a manifest), ascending."""
    fences = Fences(run)
    steps = [int(name[5:]) for name in run.list("checkpoints") if name.startswith("step-") and name[5:].isdigit()]
    return [step for step in steps if newest_files_dir(run, step, fences) is not None]


def is_complete(run: RunDir, step: int) -> bool:
    """Return True if the checkpoint of a step is complete."""
    return newest_files_dir(run, step) is not None


def read_manifest(run: RunDir, step: int) -> ManifestRecord:
    """Read the manifest of a checkpoint.

    Raises:
        RunError: The checkpoint does not exist, or its manifest cannot be read.
    """
    directory = newest_files_dir(run, step)
    if directory is None:
        raise RunError(f"{run.path(checkpoint_dir(step))}: holds no complete checkpoint")
    return run.read_record(f"{directory}/manifest.json", ManifestRecord)


def latest_step(run: RunDir) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    return max(complete_steps(run), default=0)


def check_stage(manifest: ManifestRecord, zero: int) -> None:
    """Check that a ZeRO stage can load a checkpoint.

    Raises:
        RunError: Exactly one of the two is stage 3.
    """
    if (manifest.zero == 3) != (zero == 3):
        raise RunError(
            f"the checkpoint of step {manifest.step} was written with ZeRO stage {manifest.zero}, stage {zero} cannot "
            f"load it; set parallel.zero: {manifest.zero} to resume"
        )


def prune(run: RunDir, keep_last: int, best_step: int | None, token: int | None = None) -> None:
    """Remove checkpoints that are neither the best nor among the last intact ones.

    Corrupt checkpoints do not count towards `keep_last`, and nothing is removed before that many intact ones exist.

    Args:
        run: Run directory.
        keep_last: Number of intact checkpoints to keep.
        best_step: Step of the best checkpoint, which is kept too; None without one.
        token: Token of the attempt that prunes, as for `remove`.

    Raises:
        RunError: Some checkpoints cannot be removed. All others are.
    """
    steps = complete_steps(run)
    # By records and file sizes: this runs after each checkpoint, and hashes would read everything again. Counting a
    # corrupt one could leave the run without any that it can resume from.
    intact = [step for step in reversed(steps) if find_corruption(run, step) is None][:keep_last]
    if len(intact) == keep_last:
        obsolete = [step for step in steps if step < intact[-1] and step != best_step]
        _for_each(lambda step: remove(run, step, token), obsolete)


def _for_each(action: Callable[[int], None], steps: Iterable[int]) -> None:
    """Call the action for every step, even after a failure; then raise the first error."""
    errors: list[LauncherError | OSError] = []
    for step in steps:
        try:
            action(step)
        except (LauncherError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def remove_incomplete(run: RunDir, step: int, token: int | None = None) -> None:
    """Remove the incomplete checkpoints of earlier steps, which dead attempts have left; `token` as for `remove`."""
    complete = complete_steps(run)
    written = (int(name[5:]) for name in run.list("checkpoints") if name[5:].isdigit())
    incomplete = [other for other in written if other < step and other not in complete]
    _for_each(lambda other: remove(run, other, token), incomplete)


def quarantine(run: RunDir, step: int, reason: str) -> None:
    """Mark a corrupt checkpoint as unusable and keep its files until a newer checkpoint is complete."""
    directory = newest_files_dir(run, step)
    if directory is None:
        return
    run.write_bytes(f"{directory}/damaged.txt", f"{reason}\n".encode())
    # The copy comes first: if this stops halfway, the manifest still exists under one of its two names.
    run.write_bytes(f"{directory}/{_QUARANTINED}", run.read_bytes(f"{directory}/manifest.json"))
    run.delete(f"{directory}/manifest.json")
    record_event(run, "checkpoint-damaged", step, f"the checkpoint of step {step} is damaged and not used ({reason})")


def roll_back_to(run: RunDir, step: int) -> None:
    """Remove the checkpoint of `step` and all later ones; training writes them again."""
    for later in complete_steps(run):
        if later >= step:
            remove(run, later)


def find_corruption(run: RunDir, step: int) -> str | None:
    """Return what is wrong with a checkpoint, judged by its records and the sizes of local files; None if intact.

    Only a missing, truncated or malformed file counts as corruption. An error of the storage does not.

    Raises:
        StorageUnavailableError: The storage does not answer at the moment.
        RunError: The checkpoint cannot be read, or a newer version of the launcher wrote it.
    """
    directory = newest_files_dir(run, step)
    if directory is None:
        return f"{run.path(checkpoint_dir(step))}: its manifest is missing"
    if not run.exists(f"{directory}/state.json"):
        return f"{run.path(directory)}/state.json: missing"
    try:
        manifest = run.read_record(f"{directory}/manifest.json", ManifestRecord)
        run.read_record(f"{directory}/state.json", TrainerState)
    except CorruptRecordError as error:
        return error.message
    # Sizes only, and only of local files: hashes take as long as reading everything, and `reader.load` checks them.
    for entry in manifest.files if run.local is not None else ():
        path = Path(run.path(directory)) / manifest.folder / entry.path
        if file_bytes(path) != entry.size_bytes:
            return f"{path}: missing or truncated"
    return None


def file_bytes(path: Path) -> int | None:
    """Return the size of a file; None if it does not exist.

    Raises:
        RunError: The file system cannot answer; a `StorageUnavailableError` if that may be temporary.
    """
    try:
        status = path.stat()
    # Any other error says nothing about the file: counted as missing, it would quarantine an intact checkpoint.
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(str(path), error) from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def check_restart_from_zero(run: RunDir) -> None:
    """Check that a run without a usable checkpoint has no quarantined one, before it starts from step 0.

    Raises:
        RunError: All checkpoints of the run are quarantined.
    """
    quarantined = []
    for name in run.list("checkpoints"):
        attempts = (f"{attempt}/" for attempt in run.list(f"checkpoints/{name}") if _token(attempt) is not None)
        if any(run.exists(f"checkpoints/{name}/{place}{_QUARANTINED}") for place in ("", *attempts)):
            quarantined.append(name)
    if quarantined:
        steps = ", ".join(str(int(name[5:])) for name in quarantined)
        raise RunError(
            f"{run.path('checkpoints')}: all checkpoints are damaged (steps {steps}); restore one "
            f"({_QUARANTINED} is its manifest.json), or remove that directory to train again from step 0"
        )


def remove(run: RunDir, step: int, token: int | None = None) -> None:
    """Remove a checkpoint.

    Args:
        run: Run directory.
        step: Step of the checkpoint.
        token: Token of the attempt that removes it; files of newer attempts stay. None removes all files.
    """
    home = checkpoint_dir(step)
    names = run.list(home)
    # Names without a token are files of early versions, older than any attempt.
    old = [name for name in names if token is None or (_token(name) or 0) <= token]
    # All manifests first: if this stops halfway, the remaining files do not look like a complete checkpoint.
    for name in old:
        run.delete(f"{home}/manifest.json" if _token(name) is None else f"{home}/{name}/manifest.json")
    for name in old:
        run.delete(f"{home}/{name}")
    # Otherwise a newer attempt has files here, or is writing some.
    if len(old) == len(names):
        run.delete(home)


def remove_older(run: RunDir, step: int, token: int) -> None:
    """Remove the files that attempts before `token` have left in a checkpoint's directory."""
    home = checkpoint_dir(step)
    for name in run.list(home):
        if (_token(name) or 0) < token:
            run.delete(f"{home}/{name}")
