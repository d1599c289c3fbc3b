"""Rows that the splits of a job have in common, found in one pass over the training data. Runs on the client and head.

The hashes (`data/leakage/hashes.py`) of validation and test are kept; training rows are hashed in threads, batch by
batch, and looked up. Memory stays with the evaluation splits (some 60 bytes a row, 4 M rows at most) and one batch
per thread.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from launcher.data.fragments import Fragment
from launcher.data.leakage.hashes import Hashes, hash_rows
from launcher.data.sampler import RowIds, generator
from launcher.data.splits import Reading, Split, read_batches, read_rows
from launcher.data.windows import TRAIN
from launcher.rundir.leakage import LeakageRecord, LeakExample, LeakPair
from launcher.tasks.base import Task

_EXAMPLES = 5
_MAX_SEARCHED_ROWS, _MAX_SEARCHED_BYTES = 50_000_000, 32 << 30
"""Beyond this much training data whole fragments, drawn by the data's fingerprint, stand for all: half a minute of one
core for short texts, a minute for pictures."""
_MAX_HELD_ROWS = 4_000_000
"""Beyond so many evaluation rows those with the smallest hashes stand for all: the same contents in every split."""
_BATCH_ROWS, _BATCH_BYTES = 16384, 32 << 20
_LABELS_AT_ONCE = 1 << 20
_NONE = np.iinfo(np.int64).max


class SearchStopped(Exception):
    """The comparison was called off."""


@dataclass(frozen=True)
class Limits:
    """How much is compared at most.

    Args:
        searched_rows: training rows.
        searched_bytes: uncompressed bytes of the fragments they are in.
        held_rows: rows of validation and test together.
    """

    searched_rows: int = _MAX_SEARCHED_ROWS
    searched_bytes: int = _MAX_SEARCHED_BYTES
    held_rows: int = _MAX_HELD_ROWS


def find_duplicates(
    splits: dict[str, Split],
    task: Task,
    threads: int | None = None,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
) -> LeakageRecord:
    """Count the rows of validation and test that are in train, and those of test that are in validation.

    Args:
        splits: by name, `train` among them.
        task: tells which columns are inputs, and which labels.
        threads: that read and hash at the same time; None takes one per core.
        stop: set by another thread to call it off.
        limits: how much is compared at most.

    Raises:
        Stopped: it was called off.
        DataError: a file cannot be read.
    """
    started, limits = time.monotonic(), limits or Limits()
    others = {name: split for name, split in splits.items() if name != TRAIN}
    held = sum(split.rows for split in others.values())
    share = min(1.0, limits.held_rows / max(1, held))
    search = _Search(task.input_columns, task.target_columns, stop or threading.Event())
    pairs = []
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        known = {name: _know(search, split, share, pool) for name, split in others.items()}
        train = splits[TRAIN]
        chosen = _chosen(train, limits)
        found = {name: _Found(one) for name, one in known.items()}
        for _ in pool.map(partial(_search_fragment, search, train, tuple(found.values())), chosen):
            pass
        searched = sum(train.fragments[i].rows for i in chosen)
        pairs += [_pair(search, one, train, searched, share) for one in found.values()]
        if "validation" in known and "test" in known:
            pairs.append(_between(search, known["test"], known["validation"], share))
    return LeakageRecord(
        fingerprints={name: split.fingerprint for name, split in splits.items()},
        columns=task.input_columns,
        pairs=tuple(pairs),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Search:
    """What is compared."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    stop: threading.Event

    def hashed(self, fragment: Fragment) -> Iterator[tuple[Hashes, npt.NDArray[np.bool_]]]:
        """Hashes of the inputs of a fragment's rows, and whether there are any, batch by batch.

        Raises:
            Stopped: it was called off.
        """
        at_once = _BATCH_BYTES * fragment.rows // max(1, fragment.size_bytes)
        at_once = min(_BATCH_ROWS, max(16, at_once))
        for batch in read_batches(fragment, self._inputs, Reading(at_once)):
            if self.stop.is_set():
                raise SearchStopped
            yield hash_rows(_columns(batch, self.inputs))

    @property
    def _inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.inputs))  # a task may read one column as two things

    def labels(self, table: pa.Table) -> Hashes:
        """Hashes of the labels of some rows."""
        hashes, _ = hash_rows(_columns(table, self.targets))
        return hashes


def _columns(rows: pa.Table | pa.RecordBatch, names: Sequence[str]) -> list[pa.Array]:
    columns = [rows.column(name) for name in names]
    return [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]


@dataclass(frozen=True)
class _Known:
    """The hashes of one evaluation split.

    Args:
        split: the split.
        rows: (n,) ids of the rows that are looked for, in order.
        keys: (m,) their distinct hashes, sorted.
        key_of: (n,) which of them each row has.
        maybe: (2^k,) whether any key ends in these k bits: most rows are told apart here, without a search.
    """

    split: Split
    rows: RowIds
    keys: Hashes
    key_of: RowIds
    maybe: npt.NDArray[np.bool_]

    def match(self, hashes: Hashes) -> tuple[RowIds, RowIds]:
        """(positions in `hashes` of those that are known, which key each is)."""
        at = np.flatnonzero(self.maybe[hashes & np.uint64(len(self.maybe) - 1)])
        keys = np.searchsorted(self.keys, hashes[at])
        keys = np.minimum(keys, max(0, len(self.keys) - 1))
        same = self.keys[keys] == hashes[at] if len(self.keys) else np.zeros(len(at), np.bool_)
        return at[same], keys[same]


class _Found:
    """What another split has of a known one; threads add to it."""

    def __init__(self, known: _Known) -> None:
        self.known = known
        self.first: RowIds = np.full(len(known.keys), _NONE, np.int64)
        """(m,) lowest row of the other split with each key."""
        self.low: Hashes = np.full(len(known.keys), np.iinfo(np.uint64).max, np.uint64)
        """(m,) smallest and largest hash of the labels that the key has there: they differ where the labels do."""
        self.high: Hashes = np.zeros(len(known.keys), np.uint64)
        self._lock = threading.Lock()

    def add(self, keys: RowIds, rows: RowIds, labels: Hashes | None) -> None:
        """Rows of the other split that have some of the keys."""
        with self._lock:
            np.minimum.at(self.first, keys, rows)
            if labels is not None:
                np.minimum.at(self.low, keys, labels)
                np.maximum.at(self.high, keys, labels)


def _know(search: _Search, split: Split, share: float, pool: ThreadPoolExecutor) -> _Known:
    limit = np.uint64(min(2**64 - 1, int(share * 2**64)))

    def read(index: int) -> tuple[RowIds, Hashes]:
        rows, kept, begin = [], [], int(split.starts[index])
        for hashes, some in search.hashed(split.fragments[index]):
            at = np.flatnonzero(some & (hashes <= limit))
            rows.append(begin + at)
            kept.append(hashes[at])
            begin += len(hashes)
        return np.concatenate(rows), np.concatenate(kept)

    parts = list(pool.map(read, range(len(split.fragments))))
    rows, hashes = np.concatenate([r for r, _ in parts]), np.concatenate([h for _, h in parts])
    keys, key_of = np.unique(hashes, return_inverse=True)
    maybe = np.zeros(1 << max(10, (16 * len(keys)).bit_length()), np.bool_)
    maybe[keys & np.uint64(len(maybe) - 1)] = True
    return _Known(split, rows, keys, key_of, maybe)


def _chosen(train: Split, limits: Limits) -> list[int]:
    """Which fragments of the training data are searched: all, unless there are too many."""
    rows, size = train.rows, sum(f.size_bytes for f in train.fragments)
    if rows <= limits.searched_rows and size <= limits.searched_bytes:
        return list(range(len(train.fragments)))
    chosen: list[int] = []
    rows = size = 0
    for index in generator("leakage", train.fingerprint).permutation(len(train.fragments)).tolist():
        fragment = train.fragments[index]
        rows, size = rows + fragment.rows, size + fragment.size_bytes
        if chosen and (rows > limits.searched_rows or size > limits.searched_bytes):
            break
        chosen.append(index)
    return sorted(chosen)


def _search_fragment(search: _Search, train: Split, founds: Sequence[_Found], index: int) -> None:
    fragment, begin = train.fragments[index], 0
    hits: list[list[tuple[RowIds, RowIds]]] = [[] for _ in founds]
    for hashes, _ in search.hashed(fragment):
        for found, mine in zip(founds, hits, strict=True):
            at, keys = found.known.match(hashes)
            if len(at):
                mine.append((begin + at, keys))
        begin += len(hashes)
    for found, mine in zip(founds, hits, strict=True):
        if mine:
            rows, keys = np.concatenate([at for at, _ in mine]), np.concatenate([k for _, k in mine])
            # Labels are read where there are any to compare: most fragments have none, and answers may be long texts.
            labels = search.labels(read_rows(fragment, rows, list(search.targets))) if search.targets else None
            found.add(keys, rows + int(train.starts[index]), labels)


def _between(search: _Search, known: _Known, other: _Known, share: float) -> LeakPair:
    """Rows of one evaluation split that are in another; both are known."""
    found = _Found(known)
    at, keys = known.match(other.keys[other.key_of])
    rows = other.rows[at]
    found.add(keys, rows, _labels_of(search, other.split, rows))
    return _pair(search, found, other.split, other.split.rows, share)


def _pair(search: _Search, found: _Found, other: Split, searched: int, share: float) -> LeakPair:
    known = found.known
    at = np.flatnonzero(found.first[known.key_of] != _NONE)
    rows, keys = known.rows[at], known.key_of[at]
    labels = _labels_of(search, known.split, rows)
    differ = (found.low[keys] != labels) | (found.high[keys] != labels) if labels is not None else None
    return LeakPair(
        split=known.split.name,
        other=other.name,
        rows=len(known.rows),
        share=share,
        searched_rows=searched,
        other_rows=other.rows,
        duplicates=len(rows),
        other_label=int(differ.sum()) if differ is not None else None,
        examples=tuple(
            _example(known.split, int(row), other, int(found.first[key]))
            for row, key in zip(rows[:_EXAMPLES], keys[:_EXAMPLES], strict=True)
        ),
    )


def _example(split: Split, row: int, other: Split, there: int) -> LeakExample:
    (file, file_row), (other_file, other_file_row) = split.locate(row), other.locate(there)
    return LeakExample(file=file, file_row=file_row, other_file=other_file, other_file_row=other_file_row)


def _labels_of(search: _Search, split: Split, rows: RowIds) -> Hashes | None:
    if not search.targets:
        return None
    parts = [rows[i : i + _LABELS_AT_ONCE] for i in range(0, len(rows), _LABELS_AT_ONCE)]
    hashes = [search.labels(split.read(part, search.targets)) for part in parts]
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
