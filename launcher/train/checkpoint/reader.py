"""Checkpoints read back: sharded by rank, complete when `manifest.json` is there. Train workers.

`checkpoints/step-00000120/attempt-000003/` holds DeepSpeed's shards under `state/`, `state.json` (what the loop must
know) and `manifest.json` (sha256 and size of each file), written last. A checkpoint of another number of workers is
converted to DeepSpeed's universal format on the way in; one that is damaged is put aside.
`train/checkpoint/writer.py` writes them.
"""

import hashlib
import os
import socket
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from launcher.errors import CorruptCheckpointError, RunError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ManifestRecord, TrainerState
from launcher.rundir.uri import join, storage_error
from launcher.train.checkpoint import catalog, universal
from launcher.train.checkpoint.trusted import check_file_names, weights_only_loads

if TYPE_CHECKING:
    from launcher.train.engine import Engine


def load(run: RunDir, engine: "Engine", step: int, weights_only: bool = False) -> TrainerState:
    """Read a checkpoint back (a collective), with whatever number of workers there is now.

    Raises:
        CorruptCheckpointError: a file of it is missing or damaged; it is put aside, the workers must start again.
        RunError: its ZeRO stage cannot be read.
    """
    found = [catalog.newest_files_dir(run, step)]
    dist.broadcast_object_list(found)  # the same on all workers, whatever their mounts show them
    source = found[0]
    if source is None:
        raise CorruptCheckpointError(f"the checkpoint of step {step} is not there any more")
    with tempfile.TemporaryDirectory() as scratch:
        host = _Host.of(engine, Path(scratch))
        manifest = run.read_record(f"{source}/manifest.json", ManifestRecord)
        directory = _on_this_host(run, source, host, engine.world_size)
        problem = _verify(run.path(source), directory, manifest, _share(run, host, engine))
        if problem is not None:
            if engine.rank == 0:
                catalog.quarantine(run, step, problem)
            dist.barrier()
            raise CorruptCheckpointError(f"the checkpoint of step {step} is damaged ({problem})")
        directory = directory / manifest.folder
        with weights_only_loads(run.path(source)):
            if _fits(manifest, engine, weights_only):
                engine.load(directory, weights_only)
            else:
                engine.load(_universal(directory, host, engine, manifest.zero), weights_only, universal=True)
            if engine.ema is not None:
                engine.ema.load(directory)
        dist.barrier()  # others of this host may still read what the first has fetched, or converted
    return run.read_record(f"{source}/state.json", TrainerState)


def _fits(manifest: ManifestRecord, engine: "Engine", weights_only: bool) -> bool:
    """Whether the engine reads the checkpoint as it is.

    Raises:
        RunError: it can be read in no way.
    """
    written, here = manifest.zero, engine.zero
    catalog.check_stage(manifest, here)
    # Without ZeRO every rank reads the same file, whatever their number; weights alone are whole below stage 3.
    as_it_is = (
        (written == 0 or weights_only) if here == 0 else (written > 0 and manifest.world_size == engine.world_size)
    )
    if not as_it_is and engine.moments is None:
        raise RunError(
            f"the checkpoint of step {manifest.step} was written by {manifest.world_size} workers, and states of 8 "
            f"bits cannot be dealt anew; set cluster.workers: {manifest.world_size} to go on"
        )
    return as_it_is


@dataclass(frozen=True)
class _Host:
    """The workers of this machine, and a directory of their first one."""

    scratch: Path
    ranks: tuple[int, ...]
    rank: int

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]

    @staticmethod
    def of(engine: "Engine", scratch: Path) -> "_Host":
        """Find the workers that see the same files (a collective)."""
        hosts: list[tuple[str, str]] = [("", "")] * engine.world_size
        dist.all_gather_object(hosts, (_file_view(), str(scratch)))
        ranks = tuple(rank for rank, (host, _) in enumerate(hosts) if host == hosts[engine.rank][0])
        return _Host(Path(hosts[ranks[0]][1]), ranks, engine.rank)


def _file_view() -> str:
    """Name what this process sees as its files: pods and cloned machines may share a host name, and no files."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _on_this_host(run: RunDir, source: str, host: _Host, world_size: int) -> Path:
    """The checkpoint's directory; a remote one is fetched once per host (a collective)."""
    if run.local is not None:
        return run.local / source
    problem: RunError | None = None
    if host.leads:
        try:
            run.download(source, host.scratch / "checkpoint")
        except RunError as error:
            problem = error
        except OSError as error:
            problem = storage_error(run.path(source), error)
    _raise_first(problem, world_size)
    return host.scratch / "checkpoint"


def _raise_first(problem: RunError | None, world_size: int) -> None:
    """Raise on all workers what went wrong on one of them (a collective)."""
    problems: list[RunError | None] = [None] * world_size
    dist.all_gather_object(problems, problem)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise first


def _share(run: RunDir, host: _Host, engine: "Engine") -> slice:
    """Files this rank verifies: its part of the one directory all see, or of its host's copy."""
    if run.local is not None:
        return slice(engine.rank, None, engine.world_size)
    return slice(host.ranks.index(engine.rank), None, len(host.ranks))


def _verify(shown: str, directory: Path, manifest: ManifestRecord, mine: slice) -> str | None:
    """Return what is wrong with it, the same on all workers, each of which checks some of the files.

    Raises:
        RunError: A file cannot be read, which says nothing of its content (`StorageUnavailableError` where that may
        pass), or it holds what no training has saved.
    """
    problem, unreadable = None, None
    for entry in manifest.files[mine]:
        path = directory / manifest.folder / entry.path
        what = join(shown, path.relative_to(directory).as_posix())
        try:
            if catalog.checkpoint_bytes(path) != entry.size_bytes:
                problem = f"{what}: missing or cut short"
            elif _sha256(path) != entry.sha256:
                problem = f"{what}: its sha256 differs"
            elif path.suffix == ".pt":
                check_file_names(path, what)
        except RunError as error:
            unreadable = error
        except OSError as error:
            unreadable = storage_error(what, error)
    _raise_first(unreadable, dist.get_world_size())
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _universal(directory: Path, host: _Host, engine: "Engine", zero: int) -> Path:
    """The checkpoint in DeepSpeed's universal format, converted once per host, read by all its workers."""
    target = host.scratch
    problem: str | None = None
    if host.leads:
        try:
            if zero:
                universal.convert_from_shards(directory / "state", target / "universal", zero, engine.moments or {})
            else:
                universal.convert_from_full(
                    directory / "state", target / "universal", engine.trained_names, engine.moments or {}
                )
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            problem = f"{directory}: cannot be converted for {engine.world_size} workers ({error})"
    problems: list[str | None] = [None] * engine.world_size
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise TrainingError(next(p for p in problems if p))
    return target
