"""Encoded rows on disk, so that later epochs, runs and trials read what an earlier one encoded. Any worker.

A directory holds the blocks of one split under one encoding; its name is a hash of the files (path, size, time of
change), the task's parameters and the files of its tokenizer or image processor, so what differs lies elsewhere and
nothing is ever stale. Blocks are published whole, one that is damaged is made anew, and any number of processes may
write at once. Switched on by `data.cache`.
"""

import hashlib
import inspect
import logging
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from launcher.data.blocks import Block, BlockError, gather
from launcher.data.sampler import RowIds
from launcher.data.splits import Split
from launcher.errors import DataError
from launcher.rundir.uri import describe_os_error, join, redact_uri
from launcher.spec.job import JobSpec
from launcher.tasks.base import Encoded, Task

BLOCK_ROWS = 512
"""Rows of a block: few enough that a block of pictures fits into memory, many enough for a tokenizer's threads."""
_MOST_AT_ONCE, _BYTES_AT_ONCE = 16, 64 << 20
"""Blocks that are read and encoded together: one pass over a row group serves several, as far as memory allows."""
_OPEN_BLOCKS = 4096
_USED = "used"
"""File of an entry whose time says when it was used last."""
_LOOK_S = 10.0
"""Between two looks at how much the cache holds."""
_IN_USE_S = 3600.0
"""What was used within this time is not thrown away for others."""
_log = logging.getLogger("launcher")


def root_of(job: JobSpec) -> str | None:
    """The directory of a job's cache; None where it has none.

    Raises:
        DataError: it would lie in a remote storage.
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
    """What of a job decides how its rows are encoded."""
    return job.model_dump_json(include={"task": True, "model": {"name", "revision", "from_config"}})


def encoded_rows(job: JobSpec, split: Split, task: Task, scored: bool, ids: RowIds) -> Encoded:
    """Rows of a split as `task.encode` gives them, from the job's cache, which keeps what it has not seen yet.

    Args:
        job: with `data.cache`.
        split: the rows' split.
        task: as it is used: for training, or as evaluations see it.
        scored: which of the two.
        ids: rows.
    """
    said = encoding_of(job)
    root = root_of(job)
    assert root is not None and job.data.cache is not None
    limit = int(job.data.cache.gib * 2**30)
    return _entry(_Key(root, limit, f"{split.version}\0{split.fragments.names}\0{said}\0{scored}", split, task)).take(
        ids
    )


@dataclass(frozen=True)
class _Key:
    root: str
    limit: int
    said: str
    split: Split = field(compare=False)
    task: Task = field(compare=False)


@lru_cache(maxsize=16)
def _entry(key: _Key) -> "Entry":
    directory = Path(key.root) / _digest(key.said, key.task)[:32]
    columns = key.task.input_columns + key.task.target_columns
    return Entry(directory, key.limit, key.split.rows, lambda ids: key.task.encode(key.split.read(ids, columns), True))


def _digest(said: str, task: Task) -> str:
    """Of all that decides how a row is encoded."""
    digest = hashlib.sha256(f"{said}\0{version('transformers')}\0{BLOCK_ROWS}".encode())
    digest.update(inspect.getsource(inspect.getmodule(type(task)) or type(task)).encode())
    # A tokenizer that was used saves how it was: one that is new is the same in every process.
    unused = type(task)(task.params, task.model, task.seed).processor()
    with tempfile.TemporaryDirectory() as folder:
        unused.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Entry:
    """The blocks of one split under one encoding.

    Args:
        directory: holds them; beside it lie those of others.
        limit: bytes that all of them may take; nothing is added beyond.
        rows: of the split.
        encode: rows by id.
    """

    def __init__(self, directory: Path, limit: int, rows: int, encode: Callable[[RowIds], Encoded]) -> None:
        self._directory, self._limit, self._rows, self._encode = directory, limit, rows, encode
        self._room, self._look_again = 0, 0.0
        self._open = lru_cache(_OPEN_BLOCKS)(Block.open)
        self._at_once = 1
        self._random = random.Random(os.getpid())

    def take(self, ids: RowIds) -> Encoded:
        """The rows, as they are encoded without a cache."""
        number = ids // BLOCK_ROWS
        self._fill(np.unique(number))
        parts: list[tuple[Block, RowIds, RowIds]] = []
        elsewhere: list[RowIds] = []
        for block in np.unique(number):
            places = np.flatnonzero(number == block)
            found = self._read(int(block))
            if found is None:
                elsewhere.append(places)
            else:
                parts.append((found, ids[places] - block * BLOCK_ROWS, places))
        if elsewhere:  # no room for them, or damaged
            places = np.concatenate(elsewhere)
            rows = Block.of([self._encode(ids[places])], [len(places)])
            parts.append((rows, np.arange(len(places)), places))
        return gather(parts)

    def _fill(self, blocks: RowIds) -> None:
        """Encode and publish the blocks that are missing, as far as there is room."""
        missing = [int(block) for block in blocks if not self._path(int(block)).exists()]
        self._look()
        # Begun at a place of its own, so that processes that miss the same blocks share the work.
        begin = self._random.randrange(len(missing)) if missing else 0
        missing = missing[begin:] + missing[:begin]
        while missing and self._room > 0:
            group, missing = missing[: self._at_once], missing[self._at_once :]
            absent = [block for block in group if not self._path(block).exists()]
            if absent:
                self._add(absent)

    def _add(self, blocks: list[int]) -> None:
        bounds = [(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self._rows)) for block in blocks]
        ids = np.concatenate([np.arange(begin, stop, dtype=np.int64) for begin, stop in bounds])
        whole, at = Block.of([self._encode(ids)], [len(ids)]), 0
        fit = _BYTES_AT_ONCE * len(blocks) // max(1, whole.samples.nbytes)
        self._at_once = max(1, min(_MOST_AT_ONCE, fit))
        for block, (begin, stop) in zip(blocks, bounds, strict=True):
            self._publish(block, whole.slice(at, at + stop - begin))
            at += stop - begin

    def _publish(self, number: int, block: Block) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=self._directory, prefix=".", delete=False) as file:
                self._room -= block.write(file)
            os.replace(file.name, self._path(number))
        except OSError as error:
            self._stop(error)

    def _read(self, block: int) -> Block | None:
        try:
            return self._open(self._path(block))
        except OSError:  # not there
            return None
        except BlockError:
            self._path(block).unlink(missing_ok=True)  # the next that needs it makes it anew
            return None

    def _path(self, block: int) -> Path:
        return self._directory / f"{block:08d}.block"

    def _look(self) -> None:
        """Now and then: say that the entry is in use, and find out how much room there is."""
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + _LOOK_S
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / _USED).touch()
            self._room = self._limit - evict(self._directory.parent, self._limit)
        except OSError as error:  # not to be written, or an entry went while it was looked at
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        """Training goes on without what cannot be kept."""
        _log.warning(
            "data.cache: %s: nothing is kept from now on (%s)", self._directory.parent, describe_os_error(error)
        )
        self._room, self._look_again = 0, math.inf


def evict(root: Path, limit: int) -> int:
    """Throw away entries that were not used for an hour, the longest unused first, until all fit into the limit.

    Returns:
        Bytes of those that are left.
    """
    entries = [used.parent for used in root.glob(f"*/{_USED}")]  # nothing else is ours
    sizes = {entry: _bytes_in(entry) for entry in entries}
    ages = {entry: time.time() - (entry / _USED).stat().st_mtime for entry in entries}
    for entry in sorted(entries, key=lambda one: -ages[one]):
        if sum(sizes.values()) <= limit or ages[entry] < _IN_USE_S:
            break
        shutil.rmtree(entry, ignore_errors=True)
        del sizes[entry]
    return sum(sizes.values())


def _bytes_in(entry: Path) -> int:
    total = 0
    for file in entry.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue  # published under its name, or thrown away, meanwhile
    return total
