"""Directory of one run, on local or remote storage: read, publish and copy its files atomically. Runs anywhere.

`<storage>/<run name>/` holds all state of a run, and every file in it is complete. Read `rundir/records.py` for the
record types, `rundir/uri.py` for storages.
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
from launcher.rundir.records import RESTORE, MetricsLine, Record
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
from launcher.rundir.uri import open_uri as open_uri  # part of this module's interface
from launcher.spec.job import JobSpec
from launcher.spec.permissions import grant_permissions

R = TypeVar("R", bound=Record)
# An object store cannot append: the last part is uploaded again at every flush. 512 KiB hold over 1,000 steps.
_PART_BYTES = 1 << 19
_BLOCK_BYTES = 1 << 22
_METRICS_PART = re.compile(r"metrics(-\d+)?\.jsonl")
_LINE: TypeAdapter[MetricsLine] = TypeAdapter(MetricsLine)


@dataclass(frozen=True)
class RunDir:
    """The files of one run. Paths are relative to the run's own directory.

    Args:
        uri: Local path or URI of the directory.
    """

    uri: str

    def __str__(self) -> str:
        """Return the URI with its secrets masked."""
        return mask_secrets(self.uri)

    def __repr__(self) -> str:
        """Return the masked URI for logs."""
        return f"RunDir({mask_secrets(self.uri)!r})"

    @property
    def name(self) -> str:
        """Name of the run: the last part of its path."""
        return split_options(self.uri)[0].rstrip("/").rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """Directory as a local path; None on remote storage."""
        fs, path = open_uri(self.uri)
        return Path(path) if is_local(fs) else None

    def path(self, relative: str) -> str:
        """Return the full path or URI of a relative path."""
        return join(self.uri, relative)

    def exists(self, relative: str = "") -> bool:
        """Return True if the file or directory exists."""
        fs, root = open_uri(self.uri)
        with translate_errors(self.path(relative)):
            return bool(fs.get_file_info(f"{root}/{relative}".rstrip("/")).type != pafs.FileType.NotFound)

    def list(self, relative: str) -> list[str]:
        """Return the sorted names inside a directory; empty if it does not exist.

        Raises:
            RunError: The path is a file.
        """
        fs, root = open_uri(self.uri)
        try:
            with translate_errors(self.path(relative)):
                infos = fs.get_file_info(pafs.FileSelector(f"{root}/{relative}".rstrip("/"), allow_not_found=True))
        except RunError as error:
            if isinstance(error.__cause__, NotADirectoryError):
                raise RunError(f"{self.path(relative)}: is not a directory; {RESTORE}") from error
            raise
        return sorted(info.base_name for info in infos)

    def read_bytes(self, relative: str) -> bytes:
        """Return the content of a file.

        Raises:
            RunError: The file does not exist or cannot be read.
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
        """Publish a file atomically: readers see the old content or the new, never a part.

        Args:
            relative: Path inside the run.
            content: Content, whole or in pieces.
            durable: True to fsync. Without it, a power failure can leave a local file with no content.

        Raises:
            RunError: The storage cannot be written.
        """
        fs, root = open_uri(self.uri)
        path = f"{root}/{relative}"
        local = is_local(fs)
        # An object store publishes an object when its stream closes; a file system needs write-then-rename.
        # The temporary name is in the same folder, as a rename is atomic only within one file system, and unique, as
        # two processes may publish the same file at once.
        target = f"{path}.{uuid.uuid4().hex[:12]}.tmp" if local else path
        folder = path.rsplit("/", 1)[0]
        is_new_folder = local and not os.path.isdir(folder)
        pieces = (content,) if isinstance(content, bytes) else content
        try:
            if not is_object_store(fs):
                fs.create_dir(folder, recursive=True)
            # pyarrow 26 closes the stream even if the block raises (io.pxi, NativeFile.__exit__), and closing publishes
            # an object. So on an object store, pieces that fail half-way would replace the old content by a part of the
            # new.
            with fs.open_output_stream(target) as stream:
                for piece in pieces:
                    stream.write(piece)
            if local:
                if durable:
                    # Content before name: a file system may write the rename first, and a power failure would leave an
                    # empty file under the final name. The second fsync, of the folder, makes the rename itself last.
                    sync(Path(target))
                os.replace(target, path)
                if durable:
                    sync(Path(folder))
        except OSError as error:
            if not local:
                raise storage_error(self.path(relative), error) from error
            with suppress(OSError):
                Path(target).unlink(missing_ok=True)
                if is_new_folder:
                    # Fails if another process has put a file there meanwhile, which is then kept.
                    os.rmdir(folder)
            remedy = "give the job another output.storage, or free space and set permissions there"
            kind = StorageUnavailableError if is_transient(error) else RunError
            raise kind(f"{self.path(relative)}: cannot be written ({describe_os_error(error)}); {remedy}") from error

    def delete(self, relative: str) -> None:
        """Remove a file or a directory with its content; do nothing if it does not exist."""
        fs, root = open_uri(self.uri)
        # Another process may remove it first.
        with translate_errors(self.path(relative)), suppress(FileNotFoundError):
            info = fs.get_file_info(f"{root}/{relative}")
            if info.type == pafs.FileType.Directory:
                fs.delete_dir(info.path)
            elif info.type == pafs.FileType.File:
                fs.delete_file(info.path)

    def upload(self, source: Path, relative: str) -> None:
        """Copy a local file or directory into the run."""
        self._copy(pafs.LocalFileSystem(), str(source), relative)

    def copy_from(self, other: "RunDir", relative: str, immutable: bool = False) -> None:
        """Copy a file or directory of another run; hard-link an immutable local directory instead."""
        if immutable and self.local is not None and other.local is not None:
            # Only what nobody writes in place: a link shares its content, so a change in one run would appear in the
            # other. It costs no disk space and survives the deletion of either run.
            self._link(other.local / relative, self.local / relative)
            return
        source, base = open_uri(other.uri)
        self._copy(source, f"{base}/{relative}", relative)

    def _link(self, source: Path, target: Path) -> None:
        """Hard-link a local directory, or copy it; replace what an interrupted call left behind."""
        staged = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            try:
                shutil.copytree(source, staged, copy_function=os.link)
            # Hard links need one file system that supports them.
            except OSError:
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(source, staged)
            # os.replace cannot replace a directory that holds files. For a moment there is none.
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
            # Neither atomic nor fsynced: a reader may see some of the files, and some of their content.
            pafs.copy_files(path, target, source_filesystem=source, destination_filesystem=fs)

    def publish_directory(self, source: Path, relative: str, keep: bool = False) -> None:
        """Copy a complete local directory into the run and publish it atomically (on remote storage, file by file).

        Args:
            source: Local directory.
            relative: Path inside the run.
            keep: True to leave an existing directory, as in a cache with immutable entries that others may be reading.
                Otherwise it is replaced.
        """
        local = self.local
        if local is None:
            # Old files under other names would mix with the new ones. Until the upload ends, readers find only a part.
            self.delete(relative)
            self.upload(source, relative)
            return
        target, staged = local / relative, local / f"{relative}.{uuid.uuid4().hex[:12]}.tmp"
        staged.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(source, staged)
            # Content before name, as in `write_bytes`: all files and folders, then the rename, then the folder above.
            for path in (*staged.rglob("*"), staged):
                sync(path)
            if not keep:
                shutil.rmtree(target, ignore_errors=True)
            if not (keep and target.exists()):
                os.replace(staged, target)
                sync(target.parent)
        except OSError as error:
            # A directory that holds files cannot be replaced: another publisher came first, and its entry is as good.
            if not keep or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise storage_error(self.path(relative), error) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def download(self, relative: str, target: Path) -> Path:
        """Return a local copy of a directory; the directory itself if the run is local."""
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
        """Read and validate a record.

        Raises:
            CorruptRecordError: The content is not a valid record.
            RunError: The file is missing or unreadable, or a newer version of the launcher wrote it.
        """
        try:
            # From bytes: pydantic then also reports text that is not UTF-8 as an invalid record.
            return kind.model_validate_json(self.read_bytes(relative))
        except ValidationError as error:
            # An unknown key comes from a newer version: the record is intact, so it must not count as corrupt.
            is_newer = any(problem["type"] == "extra_forbidden" for problem in error.errors(include_url=False))
            message = (
                f"{self.path(relative)}: {_describe_invalid(error, f'a valid {kind.__name__}', kind.damage_remedy)}"
            )
            raise (RunError if is_newer else CorruptRecordError)(message) from error

    def find_record(self, relative: str, kind: type[R]) -> R | None:
        """Read a record; None if the file does not exist."""
        # Two requests. Catching the error of `read_bytes` would also hide a storage that refuses.
        return self.read_record(relative, kind) if self.exists(relative) else None

    def append_metrics(self, lines: Iterable[MetricsLine]) -> None:
        """Append lines to metrics.jsonl. One writer at a time."""
        text = "".join(line.model_dump_json() + "\n" for line in lines)
        # An object store cannot append: the last part is read and rewritten at each flush until it reaches _PART_BYTES.
        # Between the read and the write, the lines of a second writer would be lost.
        if self.local is None:
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
        """Yield the lines of metrics.jsonl in order; nothing if there is no file. An incomplete last line is ignored.

        Raises:
            RunError: A line is not a record.
        """
        for part in self.metrics_parts():
            # Bytes, not text: str.splitlines also splits at U+2028, which JSON leaves as it is and generated text may
            # hold.
            lines = (line for block in self.blocks(part) for line in block.splitlines())
            for number, line in enumerate(lines, 1):
                yield read_line(self.path(part), number, line)

    def metrics_parts(self) -> tuple[str, ...]:
        """Return the files of the log: metrics.jsonl and, on an object store, metrics-000001.jsonl and so on."""
        names = (name for name in self.list("") if _METRICS_PART.fullmatch(name))
        # Without the suffix, or "metrics-000001" would sort before "metrics": "-" comes before ".".
        return tuple(sorted(names, key=lambda name: name.removesuffix(".jsonl")))

    def blocks(self, relative: str) -> Iterator[bytes]:
        """Yield a file as blocks of whole lines, about 4 MiB each on local disks. Ignore an incomplete last line."""
        local = self.local
        with (
            translate_errors(self.path(relative)),
            open(local / relative, "rb") if local is not None else BytesIO(self.read_bytes(relative)) as stream,
        ):
            # `readline` completes the last line, however long. A rest without a line end is one that is being written,
            # or that a killed process has left.
            while block := stream.read(_BLOCK_BYTES) + stream.readline():
                if whole := block[: block.rfind(b"\n") + 1]:
                    yield whole


def sync(path: Path) -> None:
    """Flush a local file or directory to disk (fsync), where the file system supports it."""
    # fsync flushes the file, not the descriptor: reading is enough, and a directory cannot be opened otherwise.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network mounts refuse it for directories. A full or broken disk must not pass: EIO and ENOSPC are raised.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def read_line(where: str, number: int, line: bytes) -> MetricsLine:
    """Parse a line of metrics.jsonl. Path and line number (from 1) are for the error.

    Raises:
        RunError: The line is not a record.
    """
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        raise RunError(f"{where}:{number}: not a record of a run; {RESTORE}") from error


def find_run(location: str) -> RunDir:
    """Return the run at a path or URI. A local path is made absolute, so that it means the same in every process.

    Raises:
        RunError: There is no run.
    """
    run = run_at(location)
    if not run.exists("job.yaml"):
        raise RunError(
            f"{run.uri}: no run there (it has no job.yaml); give the directory that `launcher train` printed"
        )
    return run


def run_at(location: str) -> RunDir:
    """Return the run directory at a path or URI, which need not exist. A local path is made absolute."""
    bare, options = split_options(location if "://" in location else os.path.abspath(os.path.expanduser(location)))
    return RunDir(bare.rstrip("/") + options)


def read_job(run: RunDir, name: str = "job.yaml") -> JobSpec:
    """Return the resolved job file of a run.

    Raises:
        RunError: The file is missing or invalid.
    """
    try:
        return JobSpec.model_validate(YAML(typ="safe", pure=True).load(run.read_bytes(name).decode()))
    except ValidationError as error:
        raise RunError(f"{run.path(name)}: {_describe_invalid(error, 'a resolved job file')}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise RunError(
            f"{run.path(name)}: not a resolved job file ({str(error).splitlines()[0]}); {RESTORE}"
        ) from error


def runnable_job(run: RunDir) -> JobSpec:
    """Return the resolved job file of a run, for use without overrides from the user.

    Raises:
        SpecError: The job asks for a permission, which only the user can give.
        RunError: The file is missing or invalid.
    """
    return with_storage_of_run(run, grant_permissions(read_job(run), run.path("job.yaml"), ()))


def with_storage_of_run(run: RunDir, job: JobSpec) -> JobSpec:
    """Return a run's job with `output.storage` set to the directory that holds the run.

    Security: the job file of a copied run may name any storage, and the launcher would write there.
    """
    storage = split_options(job.output.storage)[0].rstrip("/")
    if split_options(run.uri)[0].startswith(f"{storage}/"):
        return job
    return job.model_copy(update={"output": job.output.model_copy(update={"storage": parent(run.uri)})})


def _describe_invalid(error: ValidationError, what: str, remedy: str = RESTORE) -> str:
    """Describe what is wrong with a record, and the remedy. An unknown key means a newer version wrote it."""
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"holds {key}, which this version of the launcher does not know; use the version that wrote it"
    return f"not {what} ({f'{key}: ' if key else ''}{' '.join(first['msg'].split())}); {remedy}"
