"""Lease on a run: a fencing token that grows with each attempt decides who may write. Runs in every process.

A run can be started twice: by a retried job, by an impatient user, or by a partitioned node that reconnects. Each
attempt takes the next token by creating `attempts/<token>.json`, which only one process can. A process with an older
token may neither complete nor remove a checkpoint. Checkpoint files lie below their token, so that the files of two
attempts never mix.
"""

import errno
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import CorruptRecordError, RunError, StaleAttemptError
from launcher.processes.fork_client import process_began
from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record
from launcher.rundir.uri import storage_error

_FOLDER = "attempts"


class AttemptRecord(Record):
    """Content of attempts/000007.json: one start of a run's workers."""

    token: int
    host: str
    pid: int
    """Process id of the driver."""
    process_began: int | None
    """Start time of the driver in clock ticks of its system, to distinguish it from a later process of the same pid."""
    started_at: float
    """Seconds since the epoch."""
    resumes_from: int | None = None
    """Step of the checkpoint that the workers resume from; None if no workers start under this token."""

    @staticmethod
    def here(token: int, resumes_from: int | None = None) -> "AttemptRecord":
        """Return the record of an attempt that this process starts now."""
        return AttemptRecord(
            token=token, host=socket.gethostname(), pid=os.getpid(), process_began=process_began(os.getpid()),
            started_at=time.time(), resumes_from=resumes_from,
        )  # fmt: skip

    @property
    def is_here(self) -> bool:
        """Return True if the driver ran on this machine, so that its process can be looked up."""
        # Two machines of the same name are taken for one. A driver on the other one then looks dead, unless pid and
        # start time match by chance; the token still keeps it from writing after a newer attempt.
        return self.host == socket.gethostname() and self.process_began is not None

    @property
    def describe(self) -> str:
        """Attempt, process, host and start time, for a sentence."""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started_at))
        return f"attempt {self.token} (process {self.pid} on {self.host}, since {began})"


@dataclass(frozen=True)
class Lease:
    """Right to write to a run, until a newer attempt acquires the next lease.

    Args:
        run: Run directory.
        token: Fencing token of this attempt; larger than those of all earlier attempts.
    """

    run: RunDir
    token: int

    @staticmethod
    def acquire(run: RunDir, resumes_from: int | None = None) -> "Lease":
        """Start a new attempt and make all earlier ones stale.

        Records of old attempts are never removed: a free number could be taken twice.

        Args:
            run: Run directory.
            resumes_from: Step of the checkpoint that the workers resume from. Later checkpoints of older attempts no
                longer count.
        """
        while True:
            # Without a pause. On an object store, two processes that both withdraw may meet again; the time that their
            # requests take parts them.
            token = max(_tokens(run), default=0) + 1
            if _create_record(run, token, AttemptRecord.here(token, resumes_from)):
                return Lease(run, token)

    def renew(self, resumes_from: int | None = None) -> "Lease":
        """Acquire the next lease for the same driver; `resumes_from` as in `acquire`.

        Raises:
            StaleAttemptError: Another attempt has started since.
        """
        self.check()
        return Lease.acquire(self.run, resumes_from)

    def check(self) -> None:
        """Check that this is still the newest attempt. Costs one listing of the storage.

        Raises:
            StaleAttemptError: A newer attempt exists.
        """
        # A check, not a lock: a newer attempt may start right after it. So files lie below the token of their attempt,
        # and `Fences` excludes a manifest that was written too late.
        token = max(_tokens(self.run), default=0)
        if token > self.token:
            newest = newest_attempt(self.run)
            raise StaleAttemptError(
                f"{self.run.uri}: {newest.describe if newest else f'attempt {token}'} has taken over from attempt "
                f"{self.token}, which stops here and writes nothing more"
            )


class Fences:
    """Filter for checkpoints of stale attempts, written after a newer attempt had resumed from an earlier step.

    Args:
        run: Run directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._names = _attempt_files(run)
        self._known: dict[str, int | None] = {}

    def excludes(self, step: int, token: int) -> bool:
        """Return True if an attempt newer than `token` has resumed from a step before this one."""
        # An attempt that resumed from this step or a later one has taken it into account; others train it again.
        starts = (self._resume_step(name) for name in self._names if int(name[:6]) > token)
        return any(start is not None and start < step for start in starts)

    def _resume_step(self, name: str) -> int | None:
        if name not in self._known:
            try:
                self._known[name] = self._run.read_record(f"{_FOLDER}/{name}", AttemptRecord).resumes_from
            except CorruptRecordError:
                self._known[name] = None  # not written yet, as in `newest_attempt`
        return self._known[name]


def newest_attempt(run: RunDir) -> AttemptRecord | None:
    """Return the attempt that may write; None if there is none, or if its record is not written yet."""
    names = _attempt_files(run)
    try:
        return run.find_record(f"{_FOLDER}/{names[-1]}", AttemptRecord) if names else None
    except CorruptRecordError:
        return None  # created a moment ago, or its process was killed before it wrote (`_create_exclusive`)


def check_not_running(run: RunDir) -> None:
    """Check that no driver on this machine is working on the run. Drivers on other machines cannot be seen.

    Raises:
        RunError: A live driver works on the run.
    """
    newest = newest_attempt(run)
    if newest is not None and newest.pid != os.getpid() and is_alive(newest):
        raise RunError(
            f"{run.uri}: process {newest.pid} on this machine works on this run now; wait for it, or stop it "
            f"(kill {newest.pid}), and the same command resumes from its last checkpoint"
        )


def is_alive(attempt: AttemptRecord) -> bool:
    """Return True if the attempt's driver is running on this machine."""
    return attempt.is_here and process_began(attempt.pid) == attempt.process_began


def _tokens(run: RunDir) -> list[int]:
    # Six digits, so a run has at most 999,999 attempts. On an object store a suffix follows.
    return [int(name[:6]) for name in _attempt_files(run)]


def _attempt_files(run: RunDir) -> list[str]:
    """Return the file names of all attempts, oldest first."""
    return sorted(name for name in run.list(_FOLDER) if name[:6].isdigit())


# Error numbers of mounts without hard links, such as gcsfuse and SMB.
_NO_LINKS = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


def _create_exclusive(path: Path, content: bytes) -> bool:
    """Create a file with O_EXCL, then write its content; return False if it exists. Readers may see it empty."""
    try:
        # Killed before the write, it leaves an empty file: the number is taken, and readers treat it as not written.
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise storage_error(str(path), error) from error
    with os.fdopen(file, "wb") as stream:
        stream.write(content)
    return True


def _create_record(run: RunDir, token: int, record: AttemptRecord) -> bool:
    """Create the record of an attempt; return False if another process holds the token."""
    content = (record.model_dump_json(indent=1) + "\n").encode()
    if run.local is not None:
        path = run.local / _FOLDER / f"{token:06d}.json"
        staged = run.local / _FOLDER / f".{uuid.uuid4().hex}"
        run.write_bytes(f"{_FOLDER}/{staged.name}", content)
        try:
            # Atomic, with the content, and fails if the name exists; a rename would replace it. On NFS, a lost reply
            # may report an own link as existing: the number is then used up, and the next one is tried.
            os.link(staged, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise storage_error(str(path), error) from error
            return _create_exclusive(path, content)
        finally:
            staged.unlink()
        return True
    # pyarrow has no exclusive creation on object stores. Each process writes under a unique name, lists afterwards,
    # and withdraws if it sees a competitor. So at most one wins a token; if both withdraw, both try the next one.
    # It relies on listings that show a finished write at once, as those of S3, Google and Azure do.
    own_name = f"{token:06d}-{uuid.uuid4().hex[:12]}.json"
    run.write_bytes(f"{_FOLDER}/{own_name}", content)
    if [name for name in _attempt_files(run) if name.startswith(f"{token:06d}")] == [own_name]:
        return True
    run.delete(f"{_FOLDER}/{own_name}")
    return False
