"""Loading checkpoints: verified, free of code, converted to the current number of workers. Runs in train workers.

`checkpoints/step-00000120/attempt-000003/` holds DeepSpeed's shards under `state/`, the trainer state in `state.json`
and, written last, `manifest.json` with size and sha256 of each file. A checkpoint of another number of workers is
converted to DeepSpeed's universal format first (`universal.py`). A damaged one is quarantined. `writer.py` writes them.

A run directory may belong to another person or be writable by others, and unpickling can run code. So files are read by
torch's restricted unpickler, which knows tensors, plain values and the classes in `_safe_classes`.
"""

import hashlib
import os
import pickle
import re
import socket
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from launcher.errors import CorruptCheckpointError, RunError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ManifestRecord, TrainerState
from launcher.rundir.uri import join, storage_error
from launcher.train.checkpoint import catalog, universal

if TYPE_CHECKING:
    from launcher.train.engine import Engine

T = TypeVar("T")
_REMEDY = "delete this checkpoint and those after it, or restore the run from a copy that nobody else could write to"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_HASH_BLOCK_BYTES = 1 << 22


def load(run: RunDir, engine: "Engine", step: int, weights_only: bool = False, read_only: bool = False) -> TrainerState:
    """Load a checkpoint into the engine, written by any number of workers. Collective.

    Args:
        run: Run directory.
        engine: Engine of this rank; its weights and optimizer states are replaced.
        step: Step of the checkpoint.
        weights_only: True to load weights (and their average) without optimizer states.
        read_only: True to leave a damaged checkpoint as it is, for commands that write nothing into the run.

    Returns:
        Trainer state that was saved with the checkpoint.

    Raises:
        CorruptCheckpointError: A file is missing or damaged. Nothing has been loaded. The checkpoint is quarantined,
            unless `read_only`; the workers must restart.
        RunError: The ZeRO stage or the number of workers cannot load it, or a file cannot be read.
    """
    # Rank 0 decides: on a network file system other ranks may still see an older listing.
    answers = [catalog.newest_files_dir(run, step)]
    dist.broadcast_object_list(answers)
    source = answers[0]
    if source is None:
        raise CorruptCheckpointError(f"the checkpoint of step {step} does not exist any more")
    # On every rank, although only each host's leader uses its own: who leads is known only after a collective.
    with tempfile.TemporaryDirectory() as scratch:
        host = _Host.find(engine, Path(scratch))
        manifest = run.read_record(f"{source}/manifest.json", ManifestRecord)
        directory = _fetch(run, source, host)
        # All hashes before the first `torch.load`. The ranks share the files, so together they read each one once.
        corruption = _verify(run.path(source), directory, manifest, _files_to_verify(run, host, engine))
        if corruption is not None:
            if engine.rank == 0 and not read_only:
                catalog.quarantine(run, step, corruption)
            # No rank raises, and so ends the group, before rank 0 has written the quarantine.
            dist.barrier()
            raise CorruptCheckpointError(f"the checkpoint of step {step} is damaged ({corruption})")
        directory = directory / manifest.folder
        with weights_only_loads(run.path(source)):
            if _loads_directly(manifest, engine, weights_only):
                engine.load(directory, weights_only)
            else:
                engine.load(_convert(directory, host, engine, manifest.zero), weights_only, universal=True)
            if engine.ema is not None:
                engine.ema.load(directory)
        # Other ranks of this host still read the downloaded or converted files, which the leader removes next.
        dist.barrier()
    return run.read_record(f"{source}/state.json", TrainerState)


def _loads_directly(manifest: ManifestRecord, engine: "Engine", weights_only: bool) -> bool:
    """Return True if the engine loads the checkpoint without conversion to the universal format.

    Raises:
        RunError: The engine cannot load it in either way.
    """
    catalog.check_stage(manifest, engine.zero)
    if engine.zero == 0:
        # Without ZeRO all ranks read the same file. Weights are stored whole by stages 1 and 2, too.
        is_direct = manifest.zero == 0 or weights_only
    else:
        is_direct = manifest.zero > 0 and manifest.world_size == engine.world_size
    if not is_direct and engine.moments is None:
        raise RunError(
            f"the checkpoint of step {manifest.step} was written by {manifest.world_size} workers, and 8-bit optimizer "
            f"states cannot be split differently; set cluster.workers: {manifest.world_size} to resume"
        )
    return is_direct


@dataclass(frozen=True)
class _Host:
    """Ranks that share this rank's file system; the first one, the leader, downloads and converts for all."""

    scratch: Path
    """Temporary directory of the leader."""
    ranks: tuple[int, ...]
    rank: int

    @property
    def is_leader(self) -> bool:
        return self.rank == self.ranks[0]

    @staticmethod
    def find(engine: "Engine", scratch: Path) -> "_Host":
        """Group the ranks that see the same files. Collective."""
        hosts = _gather((_file_system_id(), scratch))
        ranks = tuple(rank for rank, (name, _) in enumerate(hosts) if name == hosts[engine.rank][0])
        return _Host(hosts[ranks[0]][1], ranks, engine.rank)


def _file_system_id() -> str:
    """Return an id of the file system that this process sees; pods may share a host name and no files."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # Two containers of a machine have the same boot id; the mount namespace tells them apart.
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _gather(value: T) -> list[T]:
    """Return the value of every rank, by rank. Collective."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _first(value: T | None) -> T | None:
    """Return the first value of all ranks that is not None, the same on every rank. Collective."""
    return next((other for other in _gather(value) if other is not None), None)


def _raise_first(error: Exception | None) -> None:
    """Raise the first error of all ranks on every rank. Collective: a rank that raised alone would block the others."""
    first = _first(error)
    if first is not None:
        raise first


def _fetch(run: RunDir, source: str, host: _Host) -> Path:
    """Return the checkpoint's local directory; the leader of each host downloads a remote one. Collective."""
    if run.local is not None:
        return run.local / source
    error: RunError | None = None
    if host.is_leader:
        try:
            run.download(source, host.scratch / "checkpoint")
        except RunError as refusal:
            error = refusal
        except OSError as refusal:
            error = storage_error(run.path(source), refusal)
    _raise_first(error)
    return host.scratch / "checkpoint"


def _files_to_verify(run: RunDir, host: _Host, engine: "Engine") -> slice:
    """Return the files that this rank hashes: a part of the shared directory, or of its host's download."""
    if run.local is not None:
        return slice(engine.rank, None, engine.world_size)
    return slice(host.ranks.index(engine.rank), None, len(host.ranks))


def _verify(shown: str, directory: Path, manifest: ManifestRecord, files: slice) -> str | None:
    """Return what is damaged, or None; each rank checks some files and all get the same answer. Collective.

    Args:
        shown: Path or URI of the checkpoint for messages.
        directory: Local directory of the checkpoint.
        manifest: Manifest of the checkpoint.
        files: Files of the manifest that this rank checks.

    Raises:
        RunError: A file cannot be read, which says nothing about its content (`StorageUnavailableError` if that may be
            temporary), or it contains what no training saves.
    """
    corruption: str | None = None
    error: RunError | None = None
    # Nothing is raised inside the loop: the ranks exchange what they have found at its end, and a rank that raised
    # alone would leave the others in that collective.
    for entry in manifest.files[files]:
        path = directory / manifest.folder / entry.path
        name = join(shown, path.relative_to(directory).as_posix())
        try:
            if catalog.file_bytes(path) != entry.size_bytes:
                corruption = f"{name}: missing or truncated"
            elif _sha256(path) != entry.sha256:
                corruption = f"{name}: its sha256 differs"
            elif path.suffix == ".pt":
                check_pickled_classes(path, name)
        except RunError as refusal:
            error = refusal
        except OSError as refusal:
            error = storage_error(name, refusal)
    _raise_first(error)
    return _first(corruption)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _convert(directory: Path, host: _Host, engine: "Engine", zero: int) -> Path:
    """Convert the checkpoint to the universal format, once per host, and return the new directory. Collective."""
    source, target, moments = directory / "state", host.scratch / "universal", engine.moments or {}
    error: TrainingError | None = None
    if host.is_leader:
        try:
            if zero:
                universal.convert_from_shards(source, target, zero, moments)
            else:
                universal.convert_from_full(source, target, engine.trained_names, moments)
        # DeepSpeed's converter checks with assertions and indexes without checks. The other ranks wait for an answer.
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as cause:
            error = TrainingError(f"{directory}: cannot be converted for {engine.world_size} workers ({cause})")
    _raise_first(error)
    return host.scratch


def check_pickled_classes(file: Path, shown: str) -> None:
    """Check that a checkpoint file holds only classes that a training saves. Reads the pickle, not the tensors.

    Args:
        file: Local path.
        shown: Path or URI for the message.

    Raises:
        RunError: The file holds other classes, or is no torch file.
    """
    with _safe_classes():
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise RunError(f"{shown}: is not a file that torch has saved for a training; {_REMEDY}") from error
    if foreign:
        raise RunError(
            f"{shown}: holds {', '.join(sorted(foreign)[:3])}, which no training saves and could run code when it is "
            f"loaded; {_REMEDY}"
        )


@contextmanager
def weights_only_loads(shown: str) -> Iterator[None]:
    """Restrict every `torch.load` in the block to tensors, plain values and DeepSpeed's classes.

    `check_pickled_classes` covers the files of the manifest. This covers any other file that DeepSpeed may open.

    Args:
        shown: Path or URI of the checkpoint for the message.

    Raises:
        RunError: A file holds another class.
    """
    # Workaround, DeepSpeed 0.19.8: about twenty calls pass weights_only=False (in runtime/ and checkpoint/). torch
    # lets this variable override the argument (torch.serialization.load).
    # Process-wide, so a load in another thread is restricted as well.
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with _safe_classes():
            yield
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|global:|class) ([A-Za-z_][\w.]*\.\w+)", str(error))
        name = match.group(1) if match else "no pickle of numbers"
        raise RunError(f"{shown}: a file of it holds what no training saves ({name}); {_REMEDY}") from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _safe_classes() -> "torch.serialization.safe_globals":
    """Return a context in which torch's restricted unpickler knows the classes that DeepSpeed 0.19.8 saves."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
