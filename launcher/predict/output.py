"""Output directory of predictions: its records, its parts, and when it is complete. Head and workers of `predict`.

    _predictions.json         written first: input, model and options that the parts belong to
    part-00000000.parquet     a part; published in one step, so what exists is complete
    _SUCCESS                  written last: number of rows, and of those without a prediction
    .predict.lock             only while a command writes to a local directory

Readers of Parquet directories (pyarrow, Spark, Ray Data) ignore names that begin with `_` or `.`.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from launcher.errors import RowCountError, RunError
from launcher.predict.parts import Layout
from launcher.rundir.directory import RunDir, open_uri
from launcher.rundir.records import Record
from launcher.rundir.uri import describe_os_error, is_local

MANIFEST, FINISHED = "_predictions.json", "_SUCCESS"
LOCK = ".predict.lock"
_UNFINISHED = ".part-"
# Key in a part's footer, which readers ignore. Null counts would not do: they do not tell null lists from empty ones.
_SKIPPED = "launcher.skipped_rows"
_FOOTER_THREADS = 16


class PredictionsRecord(Record):
    """_predictions.json: identity of the predictions in the directory."""

    damage_remedy = "give another --output, or remove this directory"

    input: str
    """Location of the rows, as the user gave it."""
    input_fingerprint: str
    """Hash of the input's files: names, rows, sizes, schema."""
    run: str
    model_fingerprint: str
    """Hash of the model's files: see `fingerprint.py`."""
    options: dict[str, str]
    """Keys of `task:` that the predictions depend on, values as JSON."""
    rows: int
    part_rows: int
    piece_rows: int

    @property
    def layout(self) -> Layout:
        """Return the cut into parts and pieces."""
        return Layout(self.rows, self.part_rows, self.piece_rows)


class FinishedRecord(Record):
    """_SUCCESS: every row of the input is in the parts."""

    damage_remedy = "remove it, and run the same command again"

    rows: int
    skipped_rows: int
    """Rows among them that could not be used and have a null prediction."""
    parts: int


@dataclass(frozen=True)
class Part:
    """Size of a part that is written, or the sum over several.

    Args:
        rows: Number of rows.
        skipped_rows: Rows among them without a prediction.
    """

    rows: int = 0
    skipped_rows: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(self.rows + other.rows, self.skipped_rows + other.skipped_rows)


def part_name(number: int) -> str:
    """Return the file name of a part; names sort like the rows."""
    return f"part-{number:08d}.parquet"


@contextmanager
def lock_output(output: RunDir) -> Iterator[None]:
    """Keep other commands out of a local directory until the block ends; if the directory is empty then, remove it.

    The kernel releases the lock of a process that is killed (flock(2)). An object store has no locks: there two
    commands that make the same predictions publish the same parts, each in one step.

    Raises:
        RunError: Another command is writing there.
    """
    directory = output.local
    lock = _lock_directory(directory) if directory is not None else None
    if directory is None or lock is None:
        yield
        return
    try:
        yield
    finally:
        # Under the lock, so that the name never stands for the lock of another command.
        with suppress(OSError):
            (directory / LOCK).unlink()
        os.close(lock)
        with suppress(OSError):
            directory.rmdir()


def _lock_directory(directory: Path) -> int | None:
    """Return a descriptor that locks a directory, which is made if it does not exist; None if it cannot be locked."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError:
            return None  # nobody can write there: `create_output` says why, unless the output is complete
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                return None  # a mount without locks
            raise RunError(
                f"{directory}: another `launcher predict` is writing there now; wait for it, or give another --output"
            ) from error
        # A command that ends may have removed the file between open and flock: then the lock is on a deleted file.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(directory / LOCK)):
                return lock
        os.close(lock)


def create_output(output: RunDir, requested: PredictionsRecord) -> PredictionsRecord:
    """Claim a directory for predictions, or find that an earlier command has claimed it for the same ones.

    Args:
        output: Directory that is new, empty, or holds parts of the same predictions.
        requested: Record of the predictions to make.

    Returns:
        The record that is now in the directory. If there are parts, it is theirs, with their layout.

    Raises:
        RunError: The directory holds something else, or cannot be written.
    """
    fs, path = open_uri(output.uri)
    if fs.get_file_info(path).type == pafs.FileType.File:
        raise RunError(f"{output.uri}: is a file; give a new directory, so that nothing is overwritten")
    names = [name for name in output.list("") if name != LOCK]
    existing = output.find_record(MANIFEST, PredictionsRecord) if MANIFEST in names else None
    # A killed command may have left the manifest's own temporary file.
    if existing is None and any(not name.endswith(".tmp") for name in names):
        raise RunError(f"{output.uri}: is not empty; give a new directory, so that nothing is overwritten")
    if existing is not None and any(name.startswith("part-") for name in names):
        differences = _differences(existing, requested)
        if differences:
            raise RunError(
                f"{output.uri}: holds other predictions ({'; '.join(differences)}); give another --output, or remove it"
            )
        # With the layout of the parts that exist, not the requested one: another version may cut differently.
        return existing
    try:
        # Before any part, so that a part never lies in a directory that does not say what it belongs to.
        output.write_record(MANIFEST, requested)
    except RunError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        reason = describe_os_error(error.__cause__)
        raise RunError(f"{output.uri}: cannot be written ({reason}); give another --output") from error
    return requested


def _differences(existing: PredictionsRecord, requested: PredictionsRecord) -> list[str]:
    differences = []
    if existing.input_fingerprint != requested.input_fingerprint:
        is_same_location = (existing.input, existing.rows) == (requested.input, requested.rows)
        change = "whose files have changed" if is_same_location else f"not {requested.input} with {requested.rows}"
        differences.append(f"of {existing.input} with {existing.rows} rows, {change}")
    if existing.model_fingerprint != requested.model_fingerprint:
        change = "as it was before it changed" if existing.run == requested.run else f"not of {requested.run}"
        differences.append(f"by the model of {existing.run}, {change}")
    keys = [*existing.options, *(key for key in requested.options if key not in existing.options)]
    pairs = [(key, existing.options.get(key, "absent"), requested.options.get(key, "absent")) for key in keys]
    return differences + [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]


def discard_empty(output: RunDir) -> None:
    """Remove the manifest of a directory without parts, so that `lock_output` removes an empty directory."""
    if not any(name.startswith("part-") for name in output.list("")):
        output.delete(MANIFEST)


def remove_unfinished(output: RunDir) -> None:
    """Remove files that killed workers have left half-written; no worker may be running."""
    for name in output.list(""):
        if name.startswith(_UNFINISHED):
            output.delete(name)


def complete_parts(output: RunDir, layout: Layout) -> dict[int, Part]:
    """Return the parts that are written, by number, from their footers; a part that cannot be read counts as missing.

    Raises:
        RunError: A file is no part of these predictions, or has another number of rows than its part.
    """
    numbers = {part_name(number): number for number in range(layout.parts)}
    names = [name for name in output.list("") if name.startswith("part-")]
    unknown = next((name for name in names if name not in numbers), None)
    if unknown is not None:
        raise RunError(f"{output.path(unknown)}: is no part of these predictions; remove it")
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        # Threads, as a footer in a remote storage is waiting; 153 parts of 10 million rows would otherwise be read one
        # by one.
        footers = pool.map(lambda name: _read_footer(output.path(name)), names)
        parts = {numbers[name]: part for name, part in zip(names, footers, strict=True) if part is not None}
    for number, part in parts.items():
        if part.rows != len(layout.part(number)):
            raise RunError(
                f"{output.path(part_name(number))}: has {part.rows} rows, its part has {len(layout.part(number))}; "
                "remove it and run the same command again"
            )
    return parts


def _read_footer(path: str) -> Part | None:
    fs, inner = open_uri(path)
    try:
        with fs.open_input_file(inner) as stream:
            metadata = pq.read_metadata(stream)
        return Part(metadata.num_rows, int((metadata.metadata or {})[_SKIPPED.encode()]))
    except (pa.ArrowInvalid, OSError, KeyError):
        # Cut short by a power cut, or by a storage that does not publish in one step.
        return None


def finish(output: RunDir, layout: Layout, total: Part) -> FinishedRecord:
    """Mark the output as complete.

    Args:
        output: Directory of the predictions.
        layout: Cut into parts.
        total: Sums over the parts that existed and those that were written.

    Raises:
        RowCountError: Rows or parts are missing, or there are too many.
    """
    names = [name for name in output.list("") if name.startswith("part-")]
    # Looked at once more instead of trusting the sums: another command may have written here or removed a part.
    if total.rows != layout.rows or names != [part_name(number) for number in range(layout.parts)]:
        raise RowCountError(
            f"{output.uri}: {total.rows} rows in {len(names)} parts came out of {layout.rows} in {layout.parts}; "
            "remove it and predict again"
        )
    record = FinishedRecord(rows=total.rows, skipped_rows=total.skipped_rows, parts=len(names))
    # Last: whoever sees this name may read everything next to it.
    output.write_record(FINISHED, record)
    return record


class PartWriter:
    """Writer of one part; `write_part` opens it."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self.rows = self.skipped_rows = 0

    def write(self, table: pa.Table, skipped_rows: int) -> None:
        """Add a piece, as its own row group."""
        self._writer.write_table(table)
        self.rows += len(table)
        self.skipped_rows += skipped_rows

    def finish(self) -> Part:
        """Write the number of skipped rows into the footer, after the last piece."""
        # Before the writer closes: the footer is written then, and cannot be changed later.
        self._writer.add_key_value_metadata({_SKIPPED: str(self.skipped_rows)})
        return Part(self.rows, self.skipped_rows)


@contextmanager
def write_part(output: RunDir, number: int, schema: pa.Schema) -> Iterator[PartWriter]:
    """Open a part for writing; it appears under its name when the block ends, and not at all if the block fails.

    Raises:
        RunError: The storage cannot be written.
    """
    fs, root = open_uri(output.uri)
    target = f"{root}/{part_name(number)}"
    # An object store publishes an object when its stream closes; a file system needs the rename.
    # Host and process in the name: a worker that was only thought dead may still write the same part.
    path = f"{root}/{_UNFINISHED}{number:08d}.{socket.gethostname()}.{os.getpid()}.tmp" if is_local(fs) else target
    try:
        try:
            with fs.open_output_stream(path) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                yield PartWriter(writer)
            # The rename comes after the writer and the stream have closed: the name never stands for half a part. No
            # fsync: a part that a power cut truncates has no footer, and the next command predicts it again.
            if is_local(fs):
                os.replace(path, target)
        except BaseException:
            # Leaving the `with` closed the stream, which published the half that was written.
            if fs.get_file_info(path).type == pafs.FileType.File:
                fs.delete_file(path)
            raise
    except OSError as error:
        raise RunError(
            f"{output.path(part_name(number))}: cannot be written ({describe_os_error(error)}); check free space and "
            "permissions there, and run the same command again"
        ) from error
