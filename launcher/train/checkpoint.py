"""Checkpoints: sharded by rank, complete when `manifest.json` is there. Train workers.

`checkpoints/step-00000120/` holds DeepSpeed's shards under `state/`, `state.json` (what the loop must know) and
`manifest.json` (sha256 and size of each file), written last. A checkpoint of another number of workers is converted
to DeepSpeed's universal format on the way in.
"""

import hashlib
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from launcher.errors import RunError, TrainingError
from launcher.records import FileEntry, ManifestRecord, RunStateRecord
from launcher.rundir import RunDir
from launcher.storage import join
from launcher.train import universal
from launcher.train.saved import directory_of, refuse_stage

if TYPE_CHECKING:
    from launcher.train.engine import Engine


def save(run: RunDir, engine: "Engine", state: RunStateRecord, spec_hash: str) -> None:
    """Write a checkpoint (a collective): shards by all ranks in parallel, then the manifest by rank 0."""
    target = directory_of(state.step)
    if engine.rank == 0:
        run.delete(target)  # an attempt that died before its manifest
    dist.barrier()
    local = run.local
    if local is not None:
        directory = local / target
        engine.save(directory)
        mine = _entries(directory, lambda path: _is_mine(path, engine.rank))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            # Ranks of one node share nothing here: each uploads what it wrote itself.
            engine.save(Path(scratch))
            mine = _entries(Path(scratch), lambda path: True)
            run.upload(Path(scratch), target)
    entries: list[list[FileEntry]] = [[] for _ in range(engine.world_size)]
    dist.all_gather_object(entries, mine)
    if engine.rank == 0:
        run.write_record(f"{target}/state.json", state)
        files = {entry.path: entry for part in entries for entry in part}
        manifest = ManifestRecord(
            step=state.step,
            world_size=engine.world_size,
            zero=engine.zero,
            spec_hash=spec_hash,
            files=tuple(files.values()),
        )
        run.write_record(f"{target}/manifest.json", manifest)
    dist.barrier()


def _is_mine(path: Path, rank: int) -> bool:
    """Hashing is shared out: a shard's own rank hashes it, rank 0 what belongs to nobody."""
    parts = path.name.replace("-", "_").split("_")
    owners = [int(b) for a, b in zip(parts[:-1], parts[1:], strict=True) if a == "rank" and b.isdigit()]
    model_states = path.name.startswith("mp_rank_")
    return rank == 0 if model_states or not owners else owners[0] == rank


def _entries(directory: Path, mine: Callable[[Path], bool]) -> list[FileEntry]:
    return [
        FileEntry(path=path.relative_to(directory).as_posix(), size_bytes=path.stat().st_size, sha256=_sha256(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and mine(path)
    ]


def load(run: RunDir, engine: "Engine", step: int, weights_only: bool = False) -> RunStateRecord:
    """Read a checkpoint back (a collective), with whatever number of workers there is now.

    Raises:
        RunError: a file of it is missing or damaged, or its ZeRO stage cannot be read.
    """
    source = directory_of(step)
    with tempfile.TemporaryDirectory() as scratch:
        host = _Host.of(engine, Path(scratch))
        manifest = run.read_record(f"{source}/manifest.json", ManifestRecord)
        directory = _on_this_host(run, source, host, engine.world_size)
        _verify(run.path(source), directory, manifest, _share(run, host, engine))
        if _fits(manifest, engine, weights_only):
            engine.load(directory, weights_only)
        else:
            engine.load(_universal(directory, host, engine, manifest.zero), weights_only, universal=True)
        if engine.average is not None:
            engine.average.load(directory)
        if run.local is None:
            dist.barrier()  # others of this host may read what the first has fetched
    return run.read_record(f"{source}/state.json", RunStateRecord)


def _fits(manifest: ManifestRecord, engine: "Engine", weights_only: bool) -> bool:
    """Whether the engine reads the checkpoint as it is.

    Raises:
        RunError: it can be read in no way.
    """
    saved, here = manifest.zero, engine.zero
    refuse_stage(manifest, here)
    # Without ZeRO every rank reads the same file, whatever their number; weights alone are whole below stage 3.
    as_it_is = (saved == 0 or weights_only) if here == 0 else (saved > 0 and manifest.world_size == engine.world_size)
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
        """Found by host name (a collective)."""
        hosts: list[tuple[str, str]] = [("", "")] * engine.world_size
        dist.all_gather_object(hosts, (socket.gethostname(), str(scratch)))
        ranks = tuple(rank for rank, (host, _) in enumerate(hosts) if host == hosts[engine.rank][0])
        return _Host(Path(hosts[ranks[0]][1]), ranks, engine.rank)


def _on_this_host(run: RunDir, source: str, host: _Host, world_size: int) -> Path:
    """The checkpoint's directory; a remote one is fetched once per host (a collective)."""
    if run.local is not None:
        return run.local / source
    problem: str | None = None
    if host.leads:
        try:
            run.download(source, host.scratch / "checkpoint")
        except (OSError, RunError) as error:
            problem = str(error)
    problems: list[str | None] = [None] * world_size
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise RunError(next(p for p in problems if p))
    return host.scratch / "checkpoint"


def _share(run: RunDir, host: _Host, engine: "Engine") -> slice:
    """Files this rank verifies: its part of the one directory all see, or of its host's copy."""
    if run.local is not None:
        return slice(engine.rank, None, engine.world_size)
    return slice(host.ranks.index(engine.rank), None, len(host.ranks))


def _verify(shown: str, directory: Path, manifest: ManifestRecord, mine: slice) -> None:
    """Each rank checks some of the files; all learn the verdict."""
    problem = None
    for entry in manifest.files[mine]:
        path = directory / entry.path
        what = f"{join(shown, entry.path)}: "
        remedy = f"delete {shown} to go on from the checkpoint before it"
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            problem = f"{what}missing or cut short; {remedy}"
        elif _sha256(path) != entry.sha256:
            problem = f"{what}damaged (its sha256 differs); {remedy}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise RunError(next(p for p in problems if p))


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
                universal.from_shards(directory / "state", target / "universal", zero, engine.moments or {})
            else:
                universal.from_whole(directory / "state", target / "universal", engine.trained, engine.moments or {})
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            problem = f"{directory}: cannot be converted for {engine.world_size} workers ({error})"
    problems: list[str | None] = [None] * engine.world_size
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise TrainingError(next(p for p in problems if p))
    return target
