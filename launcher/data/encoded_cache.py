"""Encoded rows on disk (`data.cache`): later epochs, runs and trials read what an earlier one encoded.

Runs on data workers and train workers. A directory ("entry") holds the blocks of one split under one encoding. Its name
is a hash of everything that decides how a row is encoded: the files (path, size, modification time), the parameters of
the task, and the files of its tokenizer or image processor. Another encoding has another directory, so no entry is ever
stale. Blocks are renamed into place when they are whole, a damaged one is made again, and any number of processes may
write at once. `in_memory.py` holds a whole split as one block.
"""

import hashlib
import inspect
import json
import logging
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from launcher.data.sampler import RowIds
from launcher.data.splits import Split
from launcher.errors import DataError
from launcher.rundir.uri import describe_os_error, join, redact_uri
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.tasks.samples import Encoded

BLOCK_ROWS = 512
"""Rows of a block: few enough that a block of pictures fits into memory, many enough for a tokenizer's threads."""
_MAX_BLOCKS_AT_ONCE, _BYTES_AT_ONCE = 16, 64 << 20
"""Blocks that are encoded together, as far as memory allows: one pass over a row group serves several blocks."""
_OPEN_BLOCKS = 4096
_USED_FILE = "used"
"""File of an entry whose modification time is that of the last use."""
_REFRESH_S = 10.0
"""Time between two measurements of the cache's size."""
_IN_USE_S = 3600.0
"""Entries that were used within this time are not evicted."""
_DIGEST_BYTES = 64
"""Bytes before the Arrow file of a block: its sha256 in hex. A multiple of 64 keeps the buffers of Arrow aligned."""
_PACKAGE = Path(__file__).parents[1]
# Another version of them may encode the same row differently.
_ENCODING_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pillow", "numpy", "pyarrow")
# Columns and metadata keys of a block file.
_LENGTH, _WEIGHT, _PLACE, _REASONS, _ROWS = "launcher.length", "launcher.weight", "launcher.place", "reasons", "rows"
_log = logging.getLogger("launcher")


class BlockError(ValueError):
    """Error for a file that is not a whole block."""


@dataclass(frozen=True)
class Block:
    """Encoded consecutive rows of a split.

    Args:
        samples: Samples of the rows that can be used, in order.
        lengths: Length of each sample, int64 (samples,).
        weights: Weight of each sample, float64 (samples,).
        place: Position of each row among the samples, int64 (rows,); -1 for a row that cannot be used.
        reasons: Reason why a row cannot be used, by row of the block.
    """

    samples: pa.Table
    lengths: RowIds
    weights: np.ndarray
    place: RowIds
    reasons: dict[int, str]

    @staticmethod
    def of(parts: Sequence[Encoded], rows: Sequence[int]) -> "Block":
        """Join consecutive encoded parts; `rows` has the number of rows that each part was made of."""
        starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        place = np.full(int(starts[-1]), -1, np.int64)
        valid = np.concatenate([start + part.valid_rows for start, part in zip(starts[:-1], parts, strict=True)])
        place[valid] = np.arange(len(valid))
        return Block(
            # Permissive: a column that is null in a whole part has the type null there.
            pa.concat_tables([part.samples for part in parts], promote_options="permissive").combine_chunks(),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.weights for part in parts]),
            place,
            {int(start) + at: why for start, part in zip(starts[:-1], parts, strict=True) for at, why in part.problems},
        )

    def slice(self, begin: int, stop: int) -> "Block":
        """Return the rows from `begin` to `stop`, exclusive, as a block."""
        places = self.place[begin:stop]
        valid = places[places >= 0]
        # Places rise with the rows, so the samples of consecutive rows are consecutive too, and slicing copies nothing.
        first = int(valid[0]) if len(valid) else 0
        end = int(valid[-1]) + 1 if len(valid) else 0
        return Block(
            self.samples.slice(first, end - first),
            self.lengths[first:end],
            self.weights[first:end],
            np.where(places >= 0, places - first, -1),
            {row - begin: why for row, why in self.reasons.items() if begin <= row < stop},
        )

    def take(self, rows: RowIds) -> Encoded:
        """Return some rows of the block, as `Task.encode` would."""
        places = self.place[rows]
        valid = np.flatnonzero(places >= 0)
        chosen = places[valid]
        problems = tuple((int(i), self.reasons[int(rows[i])]) for i in np.flatnonzero(places < 0))
        return Encoded(self.samples.take(pa.array(chosen)), valid, self.lengths[chosen], self.weights[chosen], problems)

    def write(self, file: IO[bytes]) -> int:
        """Write the block as a file, the sha256 of the rest in hex and then an Arrow file; return its bytes."""
        valid = np.flatnonzero(self.place >= 0)
        extra = {_LENGTH: self.lengths, _WEIGHT: self.weights, _PLACE: valid}
        table = self.samples.combine_chunks()
        for name, values in extra.items():
            table = table.append_column(name, pa.array(values))
        metadata = {_REASONS: json.dumps(self.reasons), _ROWS: str(len(self.place))}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema.with_metadata(metadata)) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        # The digest goes first, so that a reader can compare without knowing where the Arrow file ends.
        return file.write(hashlib.sha256(content).hexdigest().encode()) + file.write(content)

    @staticmethod
    def open(path: Path) -> "Block":
        """Map a file of `write` into memory, after one pass over it for the checksum.

        Raises:
            FileNotFoundError: The file does not exist.
            BlockError: The file is truncated or damaged.
        """
        if path.stat().st_size <= _DIGEST_BYTES:
            raise BlockError(f"{path}: cut short")
        whole = pa.memory_map(str(path)).read_buffer()
        content = whole.slice(_DIGEST_BYTES)
        # Costs a pass over the file each time it is opened. Without it a damaged page would give wrong samples
        # unnoticed.
        if hashlib.sha256(content).hexdigest().encode() != whole.slice(0, _DIGEST_BYTES).to_pybytes():
            raise BlockError(f"{path}: damaged")
        table = pa.ipc.open_file(content).read_all()
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        place = np.full(int(metadata[_ROWS]), -1, np.int64)
        place[table.column(_PLACE).to_numpy()] = np.arange(len(table))
        return Block(
            table.drop_columns([_LENGTH, _WEIGHT, _PLACE]).replace_schema_metadata(),
            table.column(_LENGTH).to_numpy(),
            table.column(_WEIGHT).to_numpy(),
            place,
            {int(row): why for row, why in json.loads(metadata[_REASONS]).items()},
        )


def _gather(blocks: Sequence[tuple[Block, RowIds, RowIds]]) -> Encoded:
    """Return rows of several blocks, as `Task.encode` would.

    Args:
        blocks: Blocks, each with rows of it and the positions of these rows in the result. Together the positions are
            0 to n - 1.
    """
    parts = [(block.take(rows), places) for block, rows, places in blocks]
    valid = np.concatenate([places[part.valid_rows] for part, places in parts])
    # Blocks came one after another; the caller wants the order of its ids.
    order = np.argsort(valid)
    samples = pa.concat_tables([part.samples for part, _ in parts], promote_options="permissive")
    problems = [(int(places[at]), why) for part, places in parts for at, why in part.problems]
    return Encoded(
        samples.take(pa.array(order)).combine_chunks(),
        valid[order],
        np.concatenate([part.lengths for part, _ in parts])[order],
        np.concatenate([part.weights for part, _ in parts])[order],
        tuple(sorted(problems)),
    )


def cache_root(job: JobSpec) -> str | None:
    """Return the directory of a job's cache; None if the job has none.

    Raises:
        DataError: The cache would be in a remote storage.
    """
    if job.data.cache is None:
        return None
    root = job.data.cache.path or join(job.output.storage, ".cache/encoded")
    if "://" in root:
        raise DataError(
            f"data.cache: {redact_uri(job.output.storage)} is remote, and encoded rows are read in small pieces; set "
            "data.cache.path to a directory on the nodes' disks"
        )
    return root


def encoding_of(job: JobSpec) -> str:
    """Return the part of a job that decides how its rows are encoded, as JSON."""
    return job.model_dump_json(include={"task": True, "model": {"name", "revision", "from_config", "add_tokens"}})


def encoded_rows(job: JobSpec, split: Split, task: Task, for_evaluation: bool, ids: RowIds) -> Encoded:
    """Return encoded rows of a split from the job's cache, which adds the rows that it does not have yet.

    Args:
        job: Job with `data.cache`.
        split: Split of the rows.
        task: Task as it is used, for training or for evaluation.
        for_evaluation: True if the task is used for evaluation.
        ids: Row ids.
    """
    root = cache_root(job)
    assert root is not None and job.data.cache is not None
    limit = int(job.data.cache.gib * 2**30)
    # `version`, not the fingerprint: another file of the same size and row count may have the same fingerprint.
    encoding = f"{split.version}\0{split.fragments.names}\0{encoding_of(job)}\0{for_evaluation}"
    return _entry(_EntryKey(root, limit, encoding, split, task)).take(ids)


@dataclass(frozen=True)
class _EntryKey:
    """Cache key of an open entry in this process."""

    root: str
    limit: int
    encoding: str
    split: Split = field(compare=False)
    task: Task = field(compare=False)


@lru_cache(maxsize=16)
def _entry(key: _EntryKey) -> "Entry":
    directory = Path(key.root) / _entry_digest(key.encoding, key.task)[:32]
    columns = key.task.input_columns + key.task.target_columns
    return Entry(directory, key.limit, key.split.rows, lambda ids: key.task.encode(key.split.read(ids, columns), True))


def _entry_digest(encoding: str, task: Task) -> str:
    """Hash everything that decides how a row is encoded: data, parameters, code of the task, tokenizer, libraries."""
    versions = {name: version(name) for name in _ENCODING_LIBRARIES}
    digest = hashlib.sha256(f"{encoding}\0{versions}\0{BLOCK_ROWS}".encode())
    # The whole package, as reading a column, rendering a chat and cutting windows are code of several folders; and the
    # module of a user's own task.
    own = Path(inspect.getfile(type(task)))
    for source in sorted({own, *_PACKAGE.rglob("*.py")}):
        digest.update(source.read_bytes())
    # Of a new task: a tokenizer that was used saves its last padding and truncation too, so its files would differ from
    # process to process.
    unused = type(task)(task.params, task.model, task.seed).processor()
    with tempfile.TemporaryDirectory() as folder:
        unused.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Entry:
    """Blocks of one split under one encoding.

    Args:
        directory: Directory of the blocks, next to those of other entries.
        limit: Size of all entries in bytes; beyond it nothing is added.
        rows: Number of rows of the split.
        encode: Function that encodes rows by id.
    """

    def __init__(self, directory: Path, limit: int, rows: int, encode: Callable[[RowIds], Encoded]) -> None:
        self._directory = directory
        self._limit = limit
        self._rows = rows
        self._encode = encode
        self._free_bytes = 0
        self._next_refresh = 0.0
        # An exception is not cached, so a block that is missing now is looked for again.
        self._open = lru_cache(_OPEN_BLOCKS)(Block.open)
        self._blocks_at_once = 1
        # Of the process, not of the job's seed: it spreads work and never touches a result.
        self._random = random.Random(os.getpid())

    def take(self, ids: RowIds) -> Encoded:
        """Return rows, encoded as they are without a cache."""
        number = ids // BLOCK_ROWS
        self._fill(np.unique(number))
        parts: list[tuple[Block, RowIds, RowIds]] = []
        uncached: list[RowIds] = []
        for index in np.unique(number):
            places = np.flatnonzero(number == index)
            block = self._read(int(index))
            if block is None:
                uncached.append(places)
            else:
                parts.append((block, ids[places] - index * BLOCK_ROWS, places))
        if uncached:  # the cache is full, or a block is damaged
            places = np.concatenate(uncached)
            rows = Block.of([self._encode(ids[places])], [len(places)])
            parts.append((rows, np.arange(len(places)), places))
        return _gather(parts)

    def _fill(self, blocks: RowIds) -> None:
        """Encode and publish the missing blocks, as far as the cache has space."""
        missing = [int(block) for block in blocks if not self._path(int(block)).exists()]
        self._refresh()
        # Every process begins at another block, so that processes that miss the same blocks share the work. Two that
        # encode the same block publish equal rows, so no lock is needed.
        begin = self._random.randrange(len(missing)) if missing else 0
        missing = missing[begin:] + missing[:begin]
        while missing and self._free_bytes > 0:
            group = missing[: self._blocks_at_once]
            missing = missing[self._blocks_at_once :]
            # Looked up again: another process may have published some of them since the list was made.
            absent = [block for block in group if not self._path(block).exists()]
            if absent:
                self._add(absent)

    def _add(self, blocks: list[int]) -> None:
        bounds = [(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self._rows)) for block in blocks]
        ids = np.concatenate([np.arange(begin, stop, dtype=np.int64) for begin, stop in bounds])
        whole = Block.of([self._encode(ids)], [len(ids)])
        # Known only after the first blocks, so it begins with one at a time.
        fitting = _BYTES_AT_ONCE * len(blocks) // max(1, whole.samples.nbytes)
        self._blocks_at_once = max(1, min(_MAX_BLOCKS_AT_ONCE, fitting))
        offset = 0
        for block, (begin, stop) in zip(blocks, bounds, strict=True):
            self._publish(block, whole.slice(offset, offset + stop - begin))
            offset += stop - begin

    def _publish(self, number: int, block: Block) -> None:
        try:
            # In the same directory, as a rename is atomic within one file system only.
            with tempfile.NamedTemporaryFile(dir=self._directory, prefix=".", delete=False) as file:
                self._free_bytes -= block.write(file)
            # Atomic: readers see a whole block or none. No fsync: a block that a power cut truncates fails its
            # checksum.
            os.replace(file.name, self._path(number))
        except OSError as error:
            self._disable(error)

    def _read(self, block: int) -> Block | None:
        try:
            return self._open(self._path(block))
        except OSError:
            # It does not exist, or was evicted a moment ago; `take` then encodes the rows.
            return None
        except BlockError:
            # The next process that needs the block makes it again.
            self._path(block).unlink(missing_ok=True)
            return None

    def _path(self, block: int) -> Path:
        return self._directory / f"{block:08d}.block"

    def _refresh(self) -> None:
        """Mark the entry as used and measure the free space, every few seconds."""
        now = time.monotonic()
        if now < self._next_refresh:
            return
        self._next_refresh = now + _REFRESH_S
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Before measuring: `evict` must see this entry as used, or it could remove what is about to be read.
            (self._directory / _USED_FILE).touch()
            self._free_bytes = self._limit - evict(self._directory.parent, self._limit)
        except OSError as error:  # not writable, or another process evicted an entry meanwhile
            self._disable(error)

    def _disable(self, error: OSError) -> None:
        """Add nothing from now on; training continues without a cache."""
        root = self._directory.parent
        _log.warning("data.cache: %s: no more rows are cached (%s)", root, describe_os_error(error))
        self._free_bytes = 0
        self._next_refresh = math.inf


def evict(root: Path, limit: int) -> int:
    """Remove entries that were not used for an hour, the least recently used first, until all fit into the limit.

    Returns:
        Size of the remaining entries in bytes.
    """
    entries = [used.parent for used in root.glob(f"*/{_USED_FILE}")]  # other folders are not the cache's own
    sizes = {entry: _directory_bytes(entry) for entry in entries}
    ages = {entry: time.time() - (entry / _USED_FILE).stat().st_mtime for entry in entries}
    for entry in sorted(entries, key=lambda entry: -ages[entry]):
        if sum(sizes.values()) <= limit or ages[entry] < _IN_USE_S:
            break
        # Blocks that another process has mapped stay readable: removing a name does not remove the pages.
        shutil.rmtree(entry, ignore_errors=True)
        del sizes[entry]
    return sum(sizes.values())


def _directory_bytes(entry: Path) -> int:
    total = 0
    for file in entry.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            # Renamed into place or evicted meanwhile.
            continue
    return total
