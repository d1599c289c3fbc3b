"""Who may write to a run: a token that grows with each start of its workers. Any process.

A run can be started twice: a retried job, an impatient user, a node that was cut off and comes back. Each start takes
the next token, as an empty place in `attempts/` that only one can fill; whoever holds an older one may neither complete
a checkpoint nor remove one. What both wrote before lies apart, as files of a checkpoint lie below their token.
"""

import errno
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import CorruptRecordError, RunError, StaleAttemptError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record
from launcher.rundir.uri import storage_error

_FOLDER = "attempts"


class AttemptRecord(Record):
    """attempts/000007.json: one start of a run's workers."""

    token: int
    host: str
    pid: int
    """Of the driver."""
    process_began: int | None
    """When the driver's process began, in the clock ticks of its system; tells it from a later one of the same pid."""
    started_at: float
    """Seconds since the epoch."""
    resumes_from: int | None = None
    """Step of the checkpoint that its workers start from; None where no workers start under this token."""

    @staticmethod
    def here(token: int, goes_on_from: int | None = None) -> "AttemptRecord":
        """One that this process begins now."""
        return AttemptRecord(
            token=token, host=socket.gethostname(), pid=os.getpid(), process_began=process_began(os.getpid()),
            started_at=time.time(), resumes_from=goes_on_from,
        )  # fmt: skip

    @property
    def is_here(self) -> bool:
        """Whether its process can be seen from here."""
        return self.host == socket.gethostname() and self.process_began is not None

    @property
    def describe(self) -> str:
        """For a sentence."""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started_at))
        return f"attempt {self.token} (process {self.pid} on {self.host}, since {began})"


@dataclass(frozen=True)
class Lease:
    """The right to write to a run until somebody takes a newer one.

    Args:
        run: the run.
        token: of this start; larger than those of all before it.
    """

    run: RunDir
    token: int

    @staticmethod
    def acquire(run: RunDir, goes_on_from: int | None = None) -> "Lease":
        """Begin a new attempt: all others are stale from here on. None is removed, or its place would be free.

        Args:
            run: The run.
            goes_on_from: Step of the checkpoint that workers start from; later ones of older attempts do not count.
        """
        while True:
            token = max(_tokens(run), default=0) + 1
            if _fill(run, token, AttemptRecord.here(token, goes_on_from)):
                break
        return Lease(run, token)

    def renew(self, goes_on_from: int | None = None) -> "Lease":
        """Take the next lease for the same driver; `goes_on_from` as for `take`.

        Raises:
            StaleAttemptError: somebody else has begun since.
        """
        self.check()
        return Lease.acquire(self.run, goes_on_from)

    def check(self) -> None:
        """Look whether this is still the newest attempt.

        Raises:
            StaleAttemptError: it is not.
        """
        newest = max(_tokens(self.run), default=0)
        if newest > self.token:
            found = newest_attempt(self.run)
            raise StaleAttemptError(
                f"{self.run.uri}: {found.describe if found else f'attempt {newest}'} has taken over from attempt "
                f"{self.token}, which ends here and writes nothing more"
            )


class Fences:
    """Which checkpoints do not count, as their attempt was taken over before it wrote them.

    Args:
        run: The run.
    """

    def __init__(self, run: RunDir) -> None:
        self._run, self._names = run, _names(run)
        self._known: dict[str, int | None] = {}

    def excludes(self, step: int, token: int) -> bool:
        """Return whether an attempt newer than `token` has gone on from a step before this one."""
        starts = (self._start(name) for name in self._names if int(name[:6]) > token)
        return any(start is not None and start < step for start in starts)

    def _start(self, name: str) -> int | None:
        if name not in self._known:
            try:
                self._known[name] = self._run.read_record(f"{_FOLDER}/{name}", AttemptRecord).resumes_from
            except CorruptRecordError:
                self._known[name] = None  # as in `newest_attempt`
        return self._known[name]


def newest_attempt(run: RunDir) -> AttemptRecord | None:
    """The one that may write; None where none was ever made."""
    names = _names(run)
    try:
        return run.find_record(f"{_FOLDER}/{names[-1]}", AttemptRecord) if names else None
    except CorruptRecordError:
        return None  # it was taken a moment ago, or its process was killed then (`_create`)


def check_not_running(run: RunDir) -> None:
    """Refuse to start a run whose driver works on this very machine; another machine's cannot be seen from here.

    Raises:
        RunError: it does.
    """
    found = newest_attempt(run)
    if found is not None and found.pid != os.getpid() and is_alive(found):
        raise RunError(
            f"{run.uri}: process {found.pid} on this machine works on this run now; wait for it, or stop it "
            f"(kill {found.pid}), and the same command goes on from its last checkpoint"
        )


def is_alive(attempt: AttemptRecord) -> bool:
    """Whether its driver is seen to run, on this machine."""
    return attempt.is_here and process_began(attempt.pid) == attempt.process_began


def process_began(pid: int) -> int | None:
    """When a process began, in clock ticks since its machine did; None where there is none, or the system is no Linux.

    Field 22 of /proc/PID/stat (proc(5)); a process that has ended and was not waited for counts as gone.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _tokens(run: RunDir) -> list[int]:
    return [int(name[:6]) for name in _names(run)]


def _names(run: RunDir) -> list[str]:
    """Of all attempts that are kept, oldest first."""
    return sorted(name for name in run.list(_FOLDER) if name[:6].isdigit())


# What mounts without hard links say, as gcsfuse's and SMB's.
_NO_LINKS = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


def _create(path: Path, content: bytes) -> bool:
    """Take a place by an exclusive creation; its content follows, so that a reader may find it empty for a moment."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise storage_error(str(path), error) from error
    with os.fdopen(file, "wb") as stream:
        stream.write(content)
    return True


def _fill(run: RunDir, token: int, record: AttemptRecord) -> bool:
    """Whether the place was free, and is ours now."""
    content = (record.model_dump_json(indent=1) + "\n").encode()
    if run.local is not None:
        path = run.local / _FOLDER / f"{token:06d}.json"
        begun = run.local / _FOLDER / f".{uuid.uuid4().hex}"
        run.write_bytes(f"{_FOLDER}/{begun.name}", content)
        try:
            os.link(begun, path)  # takes the place with its content in it, or not at all
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise storage_error(str(path), error) from error
            return _create(path, content)
        finally:
            begun.unlink()
        return True
    # An object store of pyarrow knows no exclusive creation: both write under names of their own and look then. Who
    # sees the other gives way, so that at most one stays; where both do, both try the next place.
    mine = f"{token:06d}-{uuid.uuid4().hex[:12]}.json"
    run.write_bytes(f"{_FOLDER}/{mine}", content)
    if [name for name in _names(run) if name.startswith(f"{token:06d}")] == [mine]:
        return True
    run.delete(f"{_FOLDER}/{mine}")
    return False
