"""The directory predictions are written to: what it holds, what is missing, when it is complete. Head and workers.

    _predictions.json         written first: of which input, model and options the parts are
    part-00000000.parquet     a part; published at once, so what exists is complete
    _SUCCESS                  written last: rows, and how many have no prediction

Readers of Parquet directories (pyarrow, Spark, Ray Data) leave out names that begin with `_` or `.`.
"""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from launcher.errors import RowCountError, RunError
from launcher.predict.parts import Layout
from launcher.rundir.directory import RunDir, open_uri
from launcher.rundir.records import Record
from launcher.rundir.uri import describe_os_error

MANIFEST, FINISHED = "_predictions.json", "_SUCCESS"
_UNDER_WAY = ".part-"
# In a part's footer, where it costs a reader nothing; a column's null counts do not tell null lists from empty ones.
_SKIPPED = "launcher.skipped_rows"
_AT_ONCE = 16


class PredictionsRecord(Record):
    """_predictions.json: what the parts beside it are parts of."""

    input: str
    """Where the rows were read from, as it was given."""
    input_fingerprint: str
    """Hash of the input's files: names, rows, sizes, schema."""
    run: str
    model_fingerprint: str
    """Hash of the model's files: see `fingerprint.py`."""
    options: dict[str, str]
    """What else the predictions depend on: keys of `task:`, values as JSON."""
    rows: int
    part_rows: int
    piece_rows: int

    @property
    def layout(self) -> Layout:
        """How the rows are cut."""
        return Layout(self.rows, self.part_rows, self.piece_rows)


class FinishedRecord(Record):
    """_SUCCESS: every row of the input is in the parts beside it."""

    rows: int
    skipped_rows: int
    """Rows among them that could not be used and have a null prediction."""
    parts: int


@dataclass(frozen=True)
class Part:
    """A part that is there.

    Args:
        rows: in it.
        skipped_rows: rows among them without a prediction.
    """

    rows: int = 0
    skipped_rows: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(self.rows + other.rows, self.skipped_rows + other.skipped_rows)


def part_name(number: int) -> str:
    """File name of a part; names sort as the rows do."""
    return f"part-{number:08d}.parquet"


def create_output(output: RunDir, wanted: PredictionsRecord) -> PredictionsRecord:
    """Make the directory that of these predictions, or find that it is.

    Returns:
        The record that is in the directory now; where parts were there, theirs, with their layout.

    Raises:
        RunError: something else is there, or it cannot be written.
    """
    fs, path = open_uri(output.uri)
    if fs.get_file_info(path).type == pafs.FileType.File:
        raise RunError(f"{output.uri}: is a file; give a new directory, so that nothing is overwritten")
    names = output.list("")
    found = output.find_record(MANIFEST, PredictionsRecord) if MANIFEST in names else None
    if found is None and any(not name.endswith(".tmp") for name in names):  # a kill may have left the manifest's
        raise RunError(f"{output.uri}: is not empty; give a new directory, so that nothing is overwritten")
    if found is not None and any(name.startswith("part-") for name in names):
        differences = _differences(found, wanted)
        if differences:
            raise RunError(
                f"{output.uri}: holds other predictions ({'; '.join(differences)}); give another --output, or remove it"
            )
        return found
    try:
        output.write_record(MANIFEST, wanted)
    except RunError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        reason = describe_os_error(error.__cause__)
        raise RunError(f"{output.uri}: cannot be written ({reason}); give another --output") from error
    return wanted


def _differences(found: PredictionsRecord, wanted: PredictionsRecord) -> list[str]:
    said = []
    if found.input_fingerprint != wanted.input_fingerprint:
        old = f"{found.input} with {found.rows} rows"
        same = (found.input, found.rows) == (wanted.input, wanted.rows)
        said.append(
            f"of {old}, whose files have changed" if same else f"of {old}, not {wanted.input} with {wanted.rows}"
        )
    if found.model_fingerprint != wanted.model_fingerprint:
        again = "as it was before it changed" if found.run == wanted.run else f"not of {wanted.run}"
        said.append(f"by the model of {found.run}, {again}")
    keys = [*found.options, *(key for key in wanted.options if key not in found.options)]
    pairs = [(key, found.options.get(key, "absent"), wanted.options.get(key, "absent")) for key in keys]
    return said + [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]


def discard_empty(output: RunDir) -> None:
    """Leave nothing behind where no part was finished: a manifest alone would only be in the way."""
    names = output.list("")
    if any(name.startswith("part-") for name in names):
        return
    output.delete(MANIFEST)
    if output.local is not None and set(names) <= {MANIFEST} and output.local.is_dir():
        output.local.rmdir()


def remove_unfinished(output: RunDir) -> None:
    """Remove what killed workers left under way; nobody may be writing."""
    for name in output.list(""):
        if name.startswith(_UNDER_WAY):
            output.delete(name)


def complete_parts(output: RunDir, layout: Layout) -> dict[int, Part]:
    """The parts that are there, by number, as their footers tell; one that cannot be read counts as missing.

    Raises:
        RunError: a file is no part of these, or has another number of rows than its part.
    """
    named = {part_name(number): number for number in range(layout.parts)}
    names = [name for name in output.list("") if name.startswith("part-")]
    other = next((name for name in names if name not in named), None)
    if other is not None:
        raise RunError(f"{output.path(other)}: is no part of these predictions; remove it")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        footers = pool.map(lambda name: _footer(output.path(name)), names)
        found = {named[name]: part for name, part in zip(names, footers, strict=True) if part is not None}
    for number, part in found.items():
        if part.rows != len(layout.part(number)):
            raise RunError(
                f"{output.path(part_name(number))}: has {part.rows} rows, its part has {len(layout.part(number))}; "
                "remove it and run the same command again"
            )
    return found


def _footer(path: str) -> Part | None:
    fs, inner = open_uri(path)
    try:
        with fs.open_input_file(inner) as stream:
            metadata = pq.read_metadata(stream)
        return Part(metadata.num_rows, int((metadata.metadata or {})[_SKIPPED.encode()]))
    except (pa.ArrowInvalid, OSError, KeyError):
        return None  # torn by a storage that does not publish at once, or by a power cut


def finish(output: RunDir, layout: Layout, all_parts: Part) -> FinishedRecord:
    """Say that the output is complete.

    Args:
        output: the directory.
        layout: its parts.
        all_parts: sums over those that were found and those that were written.

    Raises:
        RowCountError: it is not.
    """
    names = [name for name in output.list("") if name.startswith("part-")]
    if all_parts.rows != layout.rows or names != [part_name(number) for number in range(layout.parts)]:
        raise RowCountError(
            f"{output.uri}: {all_parts.rows} rows in {len(names)} parts came out of {layout.rows} in {layout.parts}; "
            "remove it and predict again"
        )
    finished = FinishedRecord(rows=all_parts.rows, skipped_rows=all_parts.skipped_rows, parts=len(names))
    output.write_record(FINISHED, finished)
    return finished


class PartWriter:
    """Writes one part; obtained from `writing`."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self.rows = self.skipped_rows = 0

    def write(self, table: pa.Table, skipped_rows: int) -> None:
        """Add a piece, as a row group of its own."""
        self._writer.write_table(table)
        self.rows += len(table)
        self.skipped_rows += skipped_rows

    def seal(self) -> Part:
        """Nothing comes after this."""
        self._writer.add_key_value_metadata({_SKIPPED: str(self.skipped_rows)})
        return Part(self.rows, self.skipped_rows)


@contextmanager
def writing(output: RunDir, number: int, schema: pa.Schema) -> Iterator[PartWriter]:
    """A part that appears under its name when the block ends, and not at all where the block fails.

    Raises:
        RunError: the storage cannot be written.
    """
    fs, root = open_uri(output.uri)
    target = f"{root}/{part_name(number)}"
    local = isinstance(fs, pafs.LocalFileSystem)
    # An object store publishes an object when its stream closes; a file system needs the rename.
    path = f"{root}/{_UNDER_WAY}{number:08d}.{socket.gethostname()}.{os.getpid()}.tmp" if local else target
    try:
        try:
            with fs.open_output_stream(path) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                yield PartWriter(writer)
            if local:
                os.replace(path, target)
        except BaseException:
            _remove(fs, path)  # closing a stream publishes the half that was written
            raise
    except OSError as error:
        raise RunError(
            f"{output.path(part_name(number))}: cannot be written ({describe_os_error(error)}); make room and "
            "rights there, and run the same command again"
        ) from error


def _remove(fs: pafs.FileSystem, path: str) -> None:
    if fs.get_file_info(path).type == pafs.FileType.File:
        fs.delete_file(path)
