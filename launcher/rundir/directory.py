"""A run directory: the paths of one run, read and written atomically on any storage. Runs anywhere.

`<storage>/<run name>/` is the whole truth about a run; what exists there is complete. Record types:
`rundir/records.py`.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from launcher.errors import CorruptRecordError, RunError, StorageUnavailableError
from launcher.formatting import mask_secrets
from launcher.rundir.records import MetricsLine, Record
from launcher.rundir.uri import (
    append_whole,
    describe_os_error,
    is_local,
    is_object_store,
    is_transient,
    join,
    parent,
    split_options,
    storage_error,
    translate_errors,
)
from launcher.rundir.uri import open_uri as open_uri  # a part of this module's interface
from launcher.spec.job import JobSpec
from launcher.spec.permissions import granted

R = TypeVar("R", bound=Record)
# Written anew every few seconds on an object store; a thousand steps and more fit in.
_PART_BYTES, _BLOCK_BYTES, _METRICS_PART = 1 << 19, 1 << 22, re.compile(r"metrics(-\d+)?\.jsonl")
RESTORE = "restore it from a copy, or begin a new run under another name"
_LINE: TypeAdapter[MetricsLine] = TypeAdapter(MetricsLine)


@dataclass(frozen=True)
class RunDir:
    """The files of one run. Paths are relative to the run's own directory.

    Args:
        uri: the directory, local or remote.
    """

    uri: str

    def __str__(self) -> str:
        """Return the URI for people: without its keys."""
        return mask_secrets(self.uri)

    def __repr__(self) -> str:
        """Return the same for logs."""
        return f"RunDir({mask_secrets(self.uri)!r})"

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return split_options(self.uri)[0].rstrip("/").rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """The directory as a local path, or None on remote storage."""
        fs, path = open_uri(self.uri)
        return Path(path) if is_local(fs) else None

    def path(self, relative: str) -> str:
        """`relative` as a path or URI of its own."""
        return join(self.uri, relative)

    def exists(self, relative: str = "") -> bool:
        """Whether a file or directory is there."""
        fs, root = open_uri(self.uri)
        with translate_errors(self.path(relative)):
            return bool(fs.get_file_info(f"{root}/{relative}".rstrip("/")).type != pafs.FileType.NotFound)

    def list(self, relative: str) -> list[str]:
        """Names inside a directory, sorted; empty where there is none.

        Raises:
            RunError: it is a file.
        """
        fs, root = open_uri(self.uri)
        try:
            with translate_errors(self.path(relative)):
                found = fs.get_file_info(pafs.FileSelector(f"{root}/{relative}".rstrip("/"), allow_not_found=True))
        except RunError as error:
            if isinstance(error.__cause__, NotADirectoryError):
                raise RunError(f"{self.path(relative)}: is no directory; {RESTORE}") from error
            raise
        return sorted(info.base_name for info in found)

    def read_bytes(self, relative: str) -> bytes:
        """A file's content.

        Raises:
            RunError: there is no such file.
        """
        fs, root = open_uri(self.uri)
        try:
            with fs.open_input_stream(f"{root}/{relative}") as stream:
                return bytes(stream.read())
        except FileNotFoundError as error:
            raise RunError(f"{self.path(relative)}: not found; is {self.uri} the directory of a run?") from error
        except OSError as error:
            raise storage_error(self.path(relative), error, RESTORE) from error

    def write_bytes(self, relative: str, content: bytes | Iterable[bytes], durable: bool = False) -> None:
        """Publish a file at once, given whole or in pieces: readers see the old content or the new, never a part.

        Args:
            relative: Its path.
            content: What it holds.
            durable: Whether it must outlast a power cut, which may leave a local file's new name without its content.

        Raises:
            RunError: the storage cannot be written.
        """
        fs, root = open_uri(self.uri)
        path = f"{root}/{relative}"
        local = is_local(fs)
        # An object store publishes an object when its stream closes; a file system needs the rename.
        target = f"{path}.{uuid.uuid4().hex[:12]}.tmp" if local else path
        folder = path.rsplit("/", 1)[0]
        new = local and not os.path.isdir(folder)
        pieces = (content,) if isinstance(content, bytes) else content
        try:
            if not is_object_store(fs):
                fs.create_dir(folder, recursive=True)
            with fs.open_output_stream(target) as stream:
                for piece in pieces:
                    stream.write(piece)
            if local:
                if durable:
                    sync(Path(target))
                os.replace(target, path)
                if durable:
                    sync(Path(folder))
        except OSError as error:
            if not local:
                raise storage_error(self.path(relative), error) from error
            with suppress(OSError):  # of what was begun nothing stays
                Path(target).unlink(missing_ok=True)
                os.rmdir(folder if new else "")
            mend = "give the job another output.storage, or make room and rights there"
            kind = StorageUnavailableError if is_transient(error) else RunError
            raise kind(f"{self.path(relative)}: cannot be written ({describe_os_error(error)}); {mend}") from error

    def delete(self, relative: str) -> None:
        """Remove a file or a directory with all it holds; nothing happens where there is none."""
        fs, root = open_uri(self.uri)
        with translate_errors(self.path(relative)), suppress(FileNotFoundError):  # another process was faster
            info = fs.get_file_info(f"{root}/{relative}")
            if info.type == pafs.FileType.Directory:
                fs.delete_dir(info.path)
            elif info.type == pafs.FileType.File:
                fs.delete_file(info.path)

    def upload(self, source: Path, relative: str) -> None:
        """Copy a local file or directory into the run."""
        self._copy(pafs.LocalFileSystem(), str(source), relative)

    def copy_from(self, other: "RunDir", relative: str, immutable: bool = False) -> None:
        """Take over a file or directory of another run; of a local directory that never changes, by hard links."""
        if immutable and self.local is not None and other.local is not None:
            self._link(other.local / relative, self.local / relative)
            return
        source, base = open_uri(other.uri)
        self._copy(source, f"{base}/{relative}", relative)

    def _link(self, source: Path, target: Path) -> None:
        """Take over a local directory that never changes; what an interrupted call has left is replaced."""
        staged = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            try:
                shutil.copytree(source, staged, copy_function=os.link)
            except OSError:  # another file system, or one without links
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(source, staged)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staged, target)
        except OSError as error:
            raise storage_error(str(target), error) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _copy(self, source: pafs.FileSystem, path: str, relative: str) -> None:
        fs, root = open_uri(self.uri)
        target = f"{root}/{relative}"
        with translate_errors(self.path(relative)):
            is_directory = source.get_file_info(path).type == pafs.FileType.Directory
            if not is_object_store(fs):
                fs.create_dir(target if is_directory else target.rsplit("/", 1)[0], recursive=True)
            pafs.copy_files(path, target, source_filesystem=source, destination_filesystem=fs)

    def publish_directory(self, source: Path, relative: str, keep: bool = False) -> None:
        """Copy a complete local directory to `relative`, at once.

        Args:
            source: The directory.
            relative: Where it goes.
            keep: Whether a directory that is there already stays, as in a cache whose entries are all alike: others
                may be reading it. Otherwise it is replaced.
        """
        local = self.local
        if local is None:
            self.delete(relative)
            self.upload(source, relative)
            return
        target, staged = local / relative, local / f"{relative}.{uuid.uuid4().hex[:12]}.tmp"
        staged.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(source, staged)
            for path in (*staged.rglob("*"), staged):
                sync(path)
            if not keep:
                shutil.rmtree(target, ignore_errors=True)
            if not (keep and target.exists()):
                os.replace(staged, target)
                sync(target.parent)
        except OSError as error:
            if not keep or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another publisher was faster
                raise storage_error(self.path(relative), error) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def download(self, relative: str, target: Path) -> Path:
        """A local copy of a directory; the directory itself where the run is local."""
        if self.local is not None:
            return self.local / relative
        fs, root = open_uri(self.uri)
        target.mkdir(parents=True, exist_ok=True)
        with translate_errors(self.path(relative)):
            pafs.copy_files(
                f"{root}/{relative}", str(target), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem()
            )
        return target

    def write_record(self, relative: str, record: Record, durable: bool = False) -> None:
        """Publish one record as JSON; `durable` as in `write_bytes`."""
        self.write_bytes(relative, (record.model_dump_json(indent=1) + "\n").encode(), durable)

    def read_record(self, relative: str, kind: type[R]) -> R:
        """One record, checked.

        Raises:
            CorruptRecordError: It does not hold such a record.
            RunError: There is no such file, it cannot be read, or a newer version of the launcher wrote it.
        """
        try:
            return kind.model_validate_json(self.read_bytes(relative))
        except ValidationError as error:
            newer = any(found["type"] == "extra_forbidden" for found in error.errors(include_url=False))
            told = f"{self.path(relative)}: {_unreadable(error, f'a valid {kind.__name__}')}"
            raise (RunError if newer else CorruptRecordError)(told) from error

    def find_record(self, relative: str, kind: type[R]) -> R | None:
        """One record, or None where the file does not exist."""
        return self.read_record(relative, kind) if self.exists(relative) else None

    def append_metrics(self, lines: Iterable[MetricsLine]) -> None:
        """Add lines to metrics.jsonl; one writer at a time."""
        text = "".join(line.model_dump_json() + "\n" for line in lines)
        if self.local is None:  # object stores cannot append: the last part is written anew while it is small
            name, old = "metrics.jsonl", b""
            if parts := self.metrics_parts():
                name, old = parts[-1], self.read_bytes(parts[-1])
            if len(old) > _PART_BYTES:
                name, old = f"metrics-{len(parts):06d}.jsonl", b""
            self.write_bytes(name, old + text.encode())
            return
        self.local.mkdir(parents=True, exist_ok=True)
        append_whole(self.local / "metrics.jsonl", text.encode())

    def read_metrics(self) -> Iterator[MetricsLine]:
        """The lines of metrics.jsonl, in order; none where there is no file. A torn last line is left out.

        Raises:
            RunError: a line is not a record.
        """
        for part in self.metrics_parts():
            lines = (line for block in self.blocks(part) for line in block.splitlines())
            for number, line in enumerate(lines, 1):
                yield read_line(self.path(part), number, line)

    def metrics_parts(self) -> tuple[str, ...]:
        """metrics.jsonl and, on an object store, what follows it as metrics-000001.jsonl and so on."""
        found = (name for name in self.list("") if _METRICS_PART.fullmatch(name))
        return tuple(sorted(found, key=lambda name: name.removesuffix(".jsonl")))

    def blocks(self, relative: str) -> Iterator[bytes]:
        """A file as blocks of whole lines, some MiB each where the run is local; a torn last line is left out."""
        local = self.local
        with (
            translate_errors(self.path(relative)),
            open(local / relative, "rb") if local is not None else BytesIO(self.read_bytes(relative)) as stream,
        ):
            while block := stream.read(_BLOCK_BYTES) + stream.readline():
                if whole := block[: block.rfind(b"\n") + 1]:
                    yield whole


def sync(path: Path) -> None:
    """Force a local file's content, or a directory's names, to the disk; not where its file system cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # of a directory, on some network mounts
            raise
    finally:
        os.close(descriptor)


def read_line(where: str, number: int, line: bytes) -> MetricsLine:
    """A line of metrics.jsonl; a `RunError` names it by file and number where it is no record."""
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        raise RunError(f"{where}:{number}: not a record of a run; {RESTORE}") from error


def find_run(location: str) -> RunDir:
    """The run at a path or URI; a local path is made absolute, as it must mean the same in every process.

    Raises:
        RunError: no run is there.
    """
    run = run_at(location)
    if not run.exists("job.yaml"):
        raise RunError(
            f"{run.uri}: no run there (it has no job.yaml); give the directory that `launcher train` printed"
        )
    return run


def run_at(location: str) -> RunDir:
    """The run directory at a path or URI, whatever is there; a local path is made absolute."""
    bare, options = split_options(location if "://" in location else os.path.abspath(os.path.expanduser(location)))
    return RunDir(bare.rstrip("/") + options)


def read_job(run: RunDir, name: str = "job.yaml") -> JobSpec:
    """The resolved job file of a run.

    Raises:
        RunError: there is none, or it is not one.
    """
    try:
        return JobSpec.model_validate(YAML(typ="safe", pure=True).load(run.read_bytes(name).decode()))
    except ValidationError as error:
        raise RunError(f"{run.path(name)}: {_unreadable(error, 'a resolved job file')}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise RunError(
            f"{run.path(name)}: not a resolved job file ({str(error).splitlines()[0]}); {RESTORE}"
        ) from error


def runnable_job(run: RunDir) -> JobSpec:
    """Return the resolved job file of a run, to be used without a user's changes.

    Raises:
        SpecError: It asks for a permission, which only the user gives.
        RunError: There is none, or it is not one.
    """
    return beside(run, granted(read_job(run), run.path("job.yaml"), ()))


def beside(run: RunDir, job: JobSpec) -> JobSpec:
    """Return a run's job with a storage that holds the run: its file might name any place, to write to."""
    storage = split_options(job.output.storage)[0].rstrip("/")
    if split_options(run.uri)[0].startswith(f"{storage}/"):
        return job
    return job.model_copy(update={"output": job.output.model_copy(update={"storage": parent(run.uri)})})


def _unreadable(error: ValidationError, what: str) -> str:
    """What is wrong with a record, and its remedy; a key that is unknown is a newer version's."""
    found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"holds {key}, which this version of the launcher does not know; use the version that wrote it"
    return f"not {what} ({f'{key}: ' if key else ''}{' '.join(first['msg'].split())}); {RESTORE}"
