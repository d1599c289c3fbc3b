"""Saves checkpoints while training goes on: a thread copies the states beside the next step's passes and writes them.

Train workers. Every worker writes its own part and says so in `parts/`; rank 0 waits for all of them and completes the
checkpoint with its manifest. Threads take part in no collective. A checkpoint that cannot be written costs the run
nothing but that checkpoint, unless the job file says otherwise (`checkpoint.on_failure`).
"""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from launcher.errors import LauncherError, RunError, StaleAttemptError, StorageUnavailableError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.events import record_event
from launcher.rundir.lease import Lease
from launcher.rundir.records import FileEntry, ManifestRecord, Record, TrainerState
from launcher.rundir.uri import describe_os_error
from launcher.spec.curve import spec_hash
from launcher.spec.job import JobSpec
from launcher.train.checkpoint import catalog
from launcher.train.checkpoint.staging import StagingBuffers, States, write_state_files
from launcher.train.fault_injection import FaultInjector

if TYPE_CHECKING:
    from launcher.train.engine import Engine

T = TypeVar("T")
_LOG = logging.getLogger("launcher")
_TRIES, _PAUSE_S = 3, 1.0
# What does not pass while one waits.
_FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
# A network file system may show a file to others only after half a minute (nfs(5), acdirmin).
_UNSEEN_S = 60.0
_MARGIN = 1.02
_READERS = 16


class PartRecord(Record):
    """parts/rank-00003.json: one worker has written its part."""

    rank: int
    files: tuple[FileEntry, ...]


@dataclass
class _Writing:
    """One checkpoint of one worker on its way to the storage."""

    state: TrainerState
    problem: LauncherError | None = None
    copied: Event = field(default_factory=Event)
    """No later step changes what is written."""
    written: Event = field(default_factory=Event)
    """This worker's part is there, or has failed."""
    all_written: Event = field(default_factory=Event)
    given_up: Event = field(default_factory=Event)
    thread: Thread | None = None


@dataclass(frozen=True)
class _Room:
    free: int
    lacks: int | None
    """Bytes that do not fit."""


class CheckpointWriter:
    """Writes the checkpoints of one training; all workers have one and call it together.

    Args:
        run: where they go.
        job: of the run.
        engine: this worker's.
        lease: under which they are written; None where nobody else can write (a trial of a sweep).
        chaos: faults on purpose.
    """

    def __init__(
        self,
        run: RunDir,
        job: JobSpec,
        engine: "Engine",
        lease: Lease | None = None,
        chaos: FaultInjector | None = None,
    ) -> None:
        self._run, self._job, self._engine, self._lease = run, job, engine, lease
        self._chaos = chaos or FaultInjector(run)
        # Trials of a sweep hand their checkpoints to each other at once, and share the machine's memory.
        self._background = lease is not None and job.checkpoint.background
        self._token = lease.token if lease is not None else 0
        self._copier = StagingBuffers()
        self._writing: _Writing | None = None

    @property
    def failed(self) -> bool:
        """Whether this worker's part of the checkpoint under way has failed."""
        return self._writing is not None and self._writing.problem is not None

    def save(self, state: TrainerState) -> None:
        """Begin a checkpoint (a collective), once the one before it is complete.

        Raises:
            TrainingError: it, or the one before, failed, and the job file says to stop then.
        """
        self.join()
        states = self._engine.local_state()
        if not self._has_room(states, state):
            return
        writing = self._writing = _Writing(state)
        if self._background:
            # Forward and backward passes only read what is saved: it is copied beside them, until the next update.
            self._engine.before_step = writing.copied.wait
        writing.thread = Thread(target=self._write, args=(writing, states), name="checkpoint", daemon=True)
        writing.thread.start()
        if not self._background:
            self.join()
        elif self._engine.has_sync_batch_norm:
            writing.copied.wait()

    def join(self) -> None:
        """Wait until the checkpoint under way is complete, or has failed (a collective).

        Raises:
            TrainingError: it has failed, and the job file says to stop then.
            StaleAttemptError: another attempt of the run has begun.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        assert writing.thread is not None
        writing.written.wait()
        problem = _first(writing.problem)
        (writing.given_up if problem is not None else writing.all_written).set()
        writing.thread.join()
        problem = problem or _first(writing.problem)
        if problem is not None:
            self._failed(writing.state, problem)

    def join_if_failed(self, failed: bool) -> None:
        """Say at once, not with the next checkpoint, that some worker has `failed` (a collective then)."""
        if failed:
            self.join()

    def _failed(self, state: TrainerState, problem: LauncherError) -> None:
        """The same on all workers."""
        if isinstance(problem, StaleAttemptError):
            raise problem
        if self._engine.rank == 0:
            with suppress(LauncherError):  # the storage may be what has failed
                # A manifest that seemed to fail may be there: its answer was lost, not the request.
                if not self._run.exists(f"{self._place(state)}/manifest.json"):
                    self._run.delete(self._place(state))
        if self._job.checkpoint.on_failure == "stop":
            raise TrainingError(f"the checkpoint of step {state.step} was not saved ({problem.message})")
        if self._engine.rank == 0:
            text = f"the checkpoint of step {state.step} was not saved ({problem.message}); training goes on"
            _LOG.warning("%s", text)
            record_event(self._run, "checkpoint-failed", state.step, text)

    def _place(self, state: TrainerState) -> str:
        return f"{catalog.checkpoint_dir(state.step)}/{catalog.files_dir(self._token)}"

    def _has_room(self, states: States, state: TrainerState) -> bool:
        """Whether the checkpoint fits onto a local storage; older ones than the last and the best give way to it."""
        sizes: list[int] = [0] * self._engine.world_size
        dist.all_gather_object(sizes, _bytes(states))
        needed, found = int(sum(sizes) * _MARGIN), [_Room(0, None)]
        if self._engine.rank == 0:
            with self._best_effort("room for it was not looked for"):
                self._run.delete(self._place(state))  # of an attempt that died before its manifest
                found = [self._room(needed, state)]
        dist.broadcast_object_list(found)
        lacks = found[0].lacks
        if lacks is None:
            return True
        self._failed(state, RunError(f"it takes {lacks >> 20} MiB, and {found[0].free >> 20} MiB are free"))
        return False

    def _room(self, needed: int, state: TrainerState) -> _Room:
        if self._run.local is None:
            return _Room(0, None)
        self._run.local.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._run.local).free
        if free < needed:
            catalog.prune(self._run, 1, state.best_step, self._token)
            free = shutil.disk_usage(self._run.local).free
        return _Room(free, needed if free < needed else None)

    @contextmanager
    def _best_effort(self, left: str) -> Iterator[None]:
        """Go on where the storage refuses what no checkpoint depends on, and say what is left undone."""
        try:
            yield
        except StaleAttemptError:
            raise
        except (LauncherError, OSError) as error:
            _LOG.warning("%s: %s (%s)", self._run.uri, left, error)

    def _write(self, writing: _Writing, states: States) -> None:
        """In a thread: this worker's part, and on rank 0 the whole."""
        try:
            place = self._place(writing.state)
            if self._background and not self._engine.saves_from_files:
                states = self._copier.copy(states)
                writing.copied.set()
            self._chaos.at("save")
            step, rank = writing.state.step, self._engine.rank
            files = tuple(retry_storage(partial(self._shard, place, step, name, tree)) for name, tree in states.items())
            part = PartRecord(rank=rank, files=files)
            retry_storage(partial(self._run.write_record, f"{place}/parts/rank-{rank:05d}.json", part))
            writing.written.set()
            self._chaos.at("upload")
            if rank == 0:
                retry_storage(partial(self._complete, writing))
        except LauncherError as error:
            writing.problem = error
        except OSError as error:
            writing.problem = RunError(f"{self._run.path(self._place(writing.state))}: {describe_os_error(error)}")
        except BaseException as error:  # noqa: BLE001  # thread border: told where it is waited for
            writing.problem = TrainingError(f"{type(error).__name__}: {error}")
        finally:
            writing.copied.set()
            writing.written.set()

    def _shard(self, place: str, step: int, name: str, tree: object) -> FileEntry:
        self._chaos.before_write(step)
        return write_state_files(self._run, place, name, tree)

    def _complete(self, writing: _Writing) -> None:
        """Rank 0: once all parts are there, the manifest; then what is not kept goes."""
        state, place = writing.state, self._place(writing.state)
        files = self._parts(writing, f"{place}/parts")
        if files is None:
            return
        self._check_lease()
        self._run.write_record(f"{place}/state.json", state, durable=True)
        manifest = ManifestRecord(
            step=state.step,
            world_size=self._engine.world_size,
            zero=self._engine.zero,
            spec_hash=spec_hash(self._job),
            files=files,
        )
        self._run.write_record(f"{place}/manifest.json", manifest, durable=True)
        # The checkpoint is complete: whatever is refused from here on leaves something too much behind, no more.
        with self._best_effort("what older attempts left of this checkpoint stays"):
            self._check_lease()
            catalog.remove_older(self._run, state.step, self._token)
            self._run.delete(f"{place}/parts")
        with self._best_effort("checkpoints that are not kept stay"):
            self._check_lease()
            catalog.prune(self._run, self._job.checkpoint.keep_last, state.best_step, self._token)
        with self._best_effort("what is left of incomplete checkpoints stays"):
            self._check_lease()
            catalog.remove_incomplete(self._run, state.step, self._token)

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _parts(self, writing: _Writing, folder: str) -> tuple[FileEntry, ...] | None:
        """The files of all workers; None when the checkpoint was given up.

        Raises:
            RunError: all have written theirs, and some cannot be seen from here.
        """
        deadline: float | None = None
        while len(names := self._seen(folder)) < self._engine.world_size:
            if writing.given_up.wait(0.05 if self._run.local is not None else 1.0):
                return None
            if writing.all_written.is_set():
                deadline = deadline or time.monotonic() + _UNSEEN_S
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{self._run.path(folder)}: {len(names)} of {self._engine.world_size} workers' parts are seen "
                        "from rank 0; is output.storage shared by all nodes?"
                    )
        with ThreadPoolExecutor(_READERS) as readers:
            parts = readers.map(lambda name: self._run.read_record(f"{folder}/{name}", PartRecord), names)
            return tuple(entry for part in parts for entry in part.files)

    def _seen(self, folder: str) -> list[str]:
        """Names of the parts that are there; what is being written has another ending."""
        return [name for name in self._run.list(folder) if name.endswith(".json")]


def retry_storage(act: Callable[[], T]) -> T:
    """Do what a storage may refuse for now, a few times if it does."""
    for tries in range(_TRIES):
        try:
            return act()
        except (OSError, StorageUnavailableError) as error:
            if tries == _TRIES - 1 or getattr(error, "errno", None) in _FINAL:
                raise
            time.sleep(_PAUSE_S * 2**tries)
    raise AssertionError("the last try returns or raises")


def _first(mine: LauncherError | None) -> LauncherError | None:
    """What went wrong on some worker, the same answer everywhere (a collective)."""
    found: list[LauncherError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    stale = (problem for problem in found if isinstance(problem, StaleAttemptError))
    return next(stale, next((problem for problem in found if problem is not None), None))


def _bytes(states: States) -> int:
    """Of all tensors, as they will be written."""
    seen: dict[int, int] = {}
    queue: list[object] = list(states.values())
    while queue:
        value = queue.pop()
        if isinstance(value, torch.Tensor):
            seen[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, list | tuple):
            queue += value
    return sum(seen.values())
