"""Asynchronous checkpoints: a thread copies the states during the next forward passes and writes them.

Runs in train workers. Each rank writes its files and then a part record in `parts/`. Rank 0 waits for the part records
of all ranks and completes the checkpoint with its manifest. The threads call no collectives, as those would interleave
with the training's own. A failed checkpoint does not stop the run unless the job says so (`checkpoint.on_failure`).
`staging.py` copies and writes one rank's files, `catalog.py` removes old checkpoints, `reader.py` loads them.
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
_ATTEMPTS = 3
_FIRST_DELAY_S = 1.0
# Errors that do not pass by themselves: not worth a second attempt.
_PERMANENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
# NFS clients cache directory listings: a new file may become visible only after half a minute (nfs(5), acdirmin).
_VISIBLE_WITHIN_S = 60.0
# Pickle headers on top of the tensors' bytes.
_SIZE_MARGIN = 1.02
_READERS = 16


class PartRecord(Record):
    """parts/rank-00003.json: one rank has written its files of a checkpoint."""

    rank: int
    files: tuple[FileEntry, ...]


@dataclass
class _PendingSave:
    """One rank's side of a checkpoint that is being written."""

    state: TrainerState
    error: LauncherError | None = None
    is_staged: Event = field(default_factory=Event)
    """The states are copied: the next optimizer step may change the originals."""
    is_written: Event = field(default_factory=Event)
    """This rank's part is written, or has failed."""
    is_written_everywhere: Event = field(default_factory=Event)
    is_abandoned: Event = field(default_factory=Event)
    """Some rank's part has failed: rank 0 stops waiting for it."""
    thread: Thread | None = None


class CheckpointWriter:
    """Writer of one training's checkpoints. Every rank has one; all ranks call it in the same order.

    Args:
        run: Run directory.
        job: Resolved job.
        engine: Engine of this rank.
        lease: Lease under which checkpoints are written; None if nobody else can write (a trial of a sweep).
        chaos: Injector of `--chaos` faults; None injects none.
    """

    def __init__(
        self,
        run: RunDir,
        job: JobSpec,
        engine: "Engine",
        lease: Lease | None = None,
        chaos: FaultInjector | None = None,
    ) -> None:
        self._run = run
        self._job = job
        self._engine = engine
        self._lease = lease
        self._chaos = chaos or FaultInjector(run)
        # A trial's checkpoint may be loaded by another trial right away, and trials share the node's memory.
        self._is_async = lease is not None and job.checkpoint.background
        self._token = lease.token if lease is not None else 0
        self._staging = StagingBuffers()
        self._pending: _PendingSave | None = None

    @property
    def has_failed(self) -> bool:
        """Return True if this rank's part of the pending checkpoint has failed."""
        return self._pending is not None and self._pending.error is not None

    def save(self, state: TrainerState) -> None:
        """Start a checkpoint after the previous one is complete. Collective.

        Raises:
            TrainingError: This or the previous checkpoint failed, and the job says to stop in this case.
        """
        # One checkpoint at a time: the next copy overwrites the buffers that the thread still writes from.
        self.join()
        # Collective. On the main thread, as a thread's collectives would mix with those of the training.
        states = self._engine.local_state()
        if not self._fits_on_disk(states, state):
            return
        pending = self._pending = _PendingSave(state)
        if self._is_async:
            # Forward and backward passes only read what is saved. So the copy runs at the same time, and only the next
            # optimizer step waits for its end.
            self._engine.before_step = pending.is_staged.wait
        # A daemon: a training that has failed ends without waiting for a slow storage.
        pending.thread = Thread(target=self._write, args=(pending, states), name="checkpoint", daemon=True)
        pending.thread.start()
        if not self._is_async:
            self.join()

    def join(self) -> None:
        """Wait until the pending checkpoint is complete or has failed. Collective.

        Raises:
            TrainingError: The checkpoint failed, and the job says to stop in this case.
            StaleAttemptError: A newer attempt of the run has started.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        assert pending.thread is not None
        # Two rounds: rank 0's thread waits for the other ranks' parts, so all ranks first exchange whether theirs is
        # written (or rank 0 would wait for a part that never comes), then whether rank 0 completed the checkpoint.
        pending.is_written.wait()
        error = _first_error(pending.error)
        (pending.is_abandoned if error is not None else pending.is_written_everywhere).set()
        pending.thread.join()
        # All ranks have the same first error, so all skip the second round or none.
        error = error or _first_error(pending.error)
        if error is not None:
            self._handle_failure(pending.state, error)

    def join_if_failed(self, failed: bool) -> None:
        """Report a failed checkpoint now instead of at the next save. Collective if `failed`, which all ranks share."""
        if failed:
            self.join()

    def _handle_failure(self, state: TrainerState, error: LauncherError) -> None:
        """Remove a failed checkpoint, and raise or warn as the job says. All ranks call it with the same error."""
        if isinstance(error, StaleAttemptError):
            raise error
        if self._engine.rank == 0:
            # The storage itself may have failed.
            with suppress(LauncherError):
                # A write that raised may still have succeeded, when only its answer was lost. A checkpoint with a
                # manifest is complete and stays.
                if not self._run.exists(f"{self._files_dir(state)}/manifest.json"):
                    self._run.delete(self._files_dir(state))
        text = f"the checkpoint of step {state.step} was not saved ({error.message})"
        if self._job.checkpoint.on_failure == "stop":
            raise TrainingError(text)
        if self._engine.rank == 0:
            text = f"{text}; training continues"
            _LOG.warning("%s", text)
            record_event(self._run, "checkpoint-failed", state.step, text)

    def _files_dir(self, state: TrainerState) -> str:
        return f"{catalog.checkpoint_dir(state.step)}/{catalog.files_dir(self._token)}"

    def _fits_on_disk(self, states: States, state: TrainerState) -> bool:
        """Return True if the checkpoint fits on a local storage, after pruning if necessary. Collective."""
        sizes: list[int] = [0] * self._engine.world_size
        # Collective. The disk is one for all ranks, and each knows its own files only.
        dist.all_gather_object(sizes, _count_bytes(states))
        needed = int(sum(sizes) * _SIZE_MARGIN)
        errors: list[RunError | None] = [None]
        if self._engine.rank == 0:
            with self._best_effort("free space is not checked"):
                # Left by an attempt with the same token that died before its manifest.
                self._run.delete(self._files_dir(state))
                errors = [self._check_disk(needed, state)]
        # Collective: rank 0's answer, or some ranks would start the checkpoint and others not.
        dist.broadcast_object_list(errors)
        if errors[0] is None:
            return True
        self._handle_failure(state, errors[0])
        return False

    def _check_disk(self, needed: int, state: TrainerState) -> RunError | None:
        """Return an error if a local disk has less than `needed` bytes free, even after pruning."""
        if self._run.local is None:
            return None
        self._run.local.mkdir(parents=True, exist_ok=True)
        # Before the first byte: a full disk would fail the write of metrics.jsonl too.
        free = shutil.disk_usage(self._run.local).free
        if free < needed:
            catalog.prune(self._run, 1, state.best_step, self._token)
            free = shutil.disk_usage(self._run.local).free
        return RunError(f"it takes {needed >> 20} MiB, and {free >> 20} MiB are free") if free < needed else None

    @contextmanager
    def _best_effort(self, consequence: str) -> Iterator[None]:
        """Log storage errors in the block, with their consequence, instead of raising them."""
        try:
            yield
        except StaleAttemptError:
            raise
        except (LauncherError, OSError) as error:
            _LOG.warning("%s: %s (%s)", self._run.uri, consequence, error)

    def _write(self, pending: _PendingSave, states: States) -> None:
        """Write this rank's part; on rank 0 complete the checkpoint. Runs in a thread and calls no collective."""
        directory = self._files_dir(pending.state)
        rank = self._engine.rank
        try:
            # States that are mapped from swap files are written directly: a copy would need all of them in memory.
            if self._is_async and not self._engine.saves_from_files:
                states = self._staging.copy(states)
                pending.is_staged.set()
            self._chaos.inject_at_place("save")
            write = partial(self._write_file, pending.state)
            files = tuple(_retry_storage(partial(write, name, tree)) for name, tree in states.items())
            part = PartRecord(rank=rank, files=files)
            _retry_storage(partial(self._run.write_record, f"{directory}/parts/rank-{rank:05d}.json", part))
            # Before the manifest: `join` waits for this on all ranks, and then tells rank 0 if all parts are there.
            pending.is_written.set()
            self._chaos.inject_at_place("upload")
            if rank == 0:
                _retry_storage(partial(self._complete, pending))
        except LauncherError as error:
            pending.error = error
        except OSError as error:
            pending.error = RunError(f"{self._run.path(directory)}: {describe_os_error(error)}")
        except BaseException as error:  # noqa: BLE001  # thread border: `join` raises it
            pending.error = TrainingError(f"{type(error).__name__}: {error}")
        finally:
            # The main thread waits for both without a timeout.
            pending.is_staged.set()
            pending.is_written.set()

    def _write_file(self, state: TrainerState, name: str, tree: object) -> FileEntry:
        self._chaos.inject_at_write(state.step)
        return write_state_files(self._run, self._files_dir(state), name, tree)

    def _complete(self, pending: _PendingSave) -> None:
        """Write state and manifest once all parts are visible, then remove old checkpoints. Runs on rank 0.

        The order makes a checkpoint atomic: files of all ranks (fsynced), state, manifest (fsynced). Only a manifest
        makes a checkpoint count. The lease is checked right before, so that a stale attempt completes nothing.
        """
        state = pending.state
        directory = self._files_dir(state)
        files = self._wait_for_parts(pending, f"{directory}/parts")
        if files is None:
            return
        self._check_lease()
        self._run.write_record(f"{directory}/state.json", state, durable=True)
        manifest = ManifestRecord(
            step=state.step,
            world_size=self._engine.world_size,
            zero=self._engine.zero,
            spec_hash=spec_hash(self._job),
            files=files,
        )
        self._run.write_record(f"{directory}/manifest.json", manifest, durable=True)
        # The checkpoint is complete. A failure from here on only leaves files that are no longer needed.
        with self._best_effort("files of older attempts remain in this checkpoint"):
            self._check_lease()
            catalog.remove_older(self._run, state.step, self._token)
            self._run.delete(f"{directory}/parts")
        with self._best_effort("checkpoints beyond checkpoint.keep_last remain"):
            self._check_lease()
            catalog.prune(self._run, self._job.checkpoint.keep_last, state.best_step, self._token)
        with self._best_effort("incomplete checkpoints remain"):
            self._check_lease()
            catalog.remove_incomplete(self._run, state.step, self._token)

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _wait_for_parts(self, pending: _PendingSave, directory: str) -> tuple[FileEntry, ...] | None:
        """Return the files of all ranks; None if the checkpoint is abandoned.

        Raises:
            RunError: All ranks have written their parts, and rank 0 cannot see some of them.
        """
        deadline: float | None = None
        while len(names := self._list_parts(directory)) < self._engine.world_size:
            # Listing an object store is a paid request; a local directory costs nothing.
            if pending.is_abandoned.wait(0.05 if self._run.local is not None else 1.0):
                return None
            if pending.is_written_everywhere.is_set():
                deadline = deadline or time.monotonic() + _VISIBLE_WITHIN_S
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{self._run.path(directory)}: rank 0 sees the parts of {len(names)} of "
                        f"{self._engine.world_size} workers; set output.storage to a storage that all nodes share"
                    )
        # A part is a small file, and on an object store a round trip: one by one, those of many ranks would take long.
        with ThreadPoolExecutor(_READERS) as readers:
            parts = readers.map(lambda name: self._run.read_record(f"{directory}/{name}", PartRecord), names)
            return tuple(entry for part in parts for entry in part.files)

    def _list_parts(self, directory: str) -> list[str]:
        """Return the names of the part records; one that is being written has another suffix."""
        return [name for name in self._run.list(directory) if name.endswith(".json")]


def _retry_storage(operation: Callable[[], T]) -> T:
    """Return the result of a storage operation, repeating it after errors that may be temporary."""
    for attempt in range(_ATTEMPTS):
        try:
            return operation()
        except (OSError, StorageUnavailableError) as error:
            if attempt == _ATTEMPTS - 1 or getattr(error, "errno", None) in _PERMANENT:
                raise
            time.sleep(_FIRST_DELAY_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _first_error(error: LauncherError | None) -> LauncherError | None:
    """Return the error of the lowest failed rank, but a StaleAttemptError before all others. Collective."""
    errors: list[LauncherError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    raised = [error for error in errors if error is not None]
    # A stale attempt must end, whatever `checkpoint.on_failure` says.
    stale = [error for error in raised if isinstance(error, StaleAttemptError)]
    return next(iter([*stale, *raised]), None)


def _count_bytes(states: States) -> int:
    """Return the bytes of all tensors; a tensor with several names counts once, as `torch.save` writes it once."""
    sizes: dict[int, int] = {}
    queue: list[object] = list(states.values())
    while queue:
        value = queue.pop()
        if isinstance(value, torch.Tensor):
            sizes[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, list | tuple):
            queue += value
    return sum(sizes.values())
