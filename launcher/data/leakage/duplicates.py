"""Rows that the splits of a job have in common, found in one pass over the training data. Runs on the client and head.

The hashes (`data/leakage/hashes.py`) of validation and test stay in memory. Training rows are hashed in threads, batch
by batch, and looked up among them. Memory depends on the evaluation splits (about 60 bytes per row, at most 4 million
rows) and on one batch per thread. `driver/preflight.py` decides when this runs and what follows.
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
"""Size of training data above which only some fragments, drawn by the fingerprint of the data, are searched: half a
minute of one core for short texts, a minute for pictures."""
_MAX_INDEXED_ROWS = 4_000_000
"""Number of evaluation rows above which only those with the smallest hashes are compared: a choice by content, so that
it is the same in every split."""
_BATCH_ROWS, _BATCH_BYTES = 16384, 32 << 20
_LABELS_AT_ONCE = 1 << 20
_NONE = np.iinfo(np.int64).max


class SearchStopped(Exception):  # noqa: N818  # another thread has asked for it
    """Raised in the search when another thread has stopped it."""


@dataclass(frozen=True)
class Limits:
    """Limits on how much is compared.

    Args:
        searched_rows: Maximum number of training rows.
        searched_bytes: Maximum uncompressed size of the fragments they are in.
        indexed_rows: Maximum number of rows of validation and test together.
    """

    searched_rows: int = _MAX_SEARCHED_ROWS
    searched_bytes: int = _MAX_SEARCHED_BYTES
    indexed_rows: int = _MAX_INDEXED_ROWS


def find_duplicates(
    splits: dict[str, Split],
    task: Task,
    threads: int | None = None,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
) -> LeakageRecord:
    """Count the rows of validation and test that are in train, and the rows of test that are in validation.

    Args:
        splits: Splits by name, `train` among them.
        task: Task; it says which columns are inputs and which are labels.
        threads: Number of threads that read and hash; None means one per core.
        stop: Event with which another thread stops the search.
        limits: Limits on how much is compared; None means the defaults.

    Raises:
        SearchStopped: `stop` was set.
        DataError: A file cannot be read.
    """
    started = time.monotonic()
    limits = limits or Limits()
    others = {name: split for name, split in splits.items() if name != TRAIN}
    rows = sum(split.rows for split in others.values())
    share = min(1.0, limits.indexed_rows / max(1, rows))
    search = _Search(task.input_columns, task.target_columns, stop or threading.Event())
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        # The small side is indexed and the large one streamed past it: memory does not grow with the training data.
        indexes = {name: _index_split(search, split, share, pool) for name, split in others.items()}
        train = splits[TRAIN]
        fragments = _searched_fragments(train, limits)
        matches = [_Matches(index) for index in indexes.values()]
        for _ in pool.map(partial(_search_fragment, search, train, matches), fragments):
            pass  # raises what a thread raised
        searched = int(train.fragments.rows[fragments].sum())
        pairs = [_leak_pair(search, of_split, train, searched, share) for of_split in matches]
        if "validation" in indexes and "test" in indexes:
            pairs.append(_compare_indexes(search, indexes["test"], indexes["validation"], share))
    return LeakageRecord(
        fingerprints={name: split.fingerprint for name, split in splits.items()},
        columns=task.input_columns,
        pairs=tuple(pairs),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Search:
    """Columns that are compared, and the event that stops the search."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    stop: threading.Event

    def hash_inputs(self, fragment: Fragment) -> Iterator[tuple[Hashes, npt.NDArray[np.bool_]]]:
        """Yield the hashes of the inputs of a fragment's rows, and whether any of them is not null, batch by batch.

        Raises:
            SearchStopped: `stop` was set.
        """
        rows = min(_BATCH_ROWS, max(16, _BATCH_BYTES * fragment.rows // max(1, fragment.size_bytes)))
        distinct = tuple(dict.fromkeys(self.inputs))  # a task may read one column as two things
        for batch in read_batches(fragment, distinct, Reading(rows)):
            if self.stop.is_set():
                raise SearchStopped
            yield hash_rows(_columns(batch, self.inputs))

    def hash_labels(self, table: pa.Table) -> Hashes:
        """Return the hashes of the labels of some rows."""
        hashes, _ = hash_rows(_columns(table, self.targets))
        return hashes


def _columns(rows: pa.Table | pa.RecordBatch, names: Sequence[str]) -> list[pa.Array]:
    columns = [rows.column(name) for name in names]
    return [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]


@dataclass(frozen=True)
class _Index:
    """Hashes of one evaluation split.

    Args:
        split: Split that was hashed.
        rows: Ids of the rows that are looked for, int64 (n,), ascending.
        keys: Distinct hashes of these rows, uint64 (m,), sorted.
        key_of: Position of each row's hash among the keys, int64 (n,).
        maybe: Table of the low k bits of the keys, bool (2^k,). It rejects most rows without a binary search.
    """

    split: Split
    rows: RowIds
    keys: Hashes
    key_of: RowIds
    maybe: npt.NDArray[np.bool_]

    def match(self, hashes: Hashes) -> tuple[RowIds, RowIds]:
        """Return the positions of the hashes that are keys, and the position of the key of each."""
        at = np.flatnonzero(self.maybe[hashes & np.uint64(len(self.maybe) - 1)])
        keys = np.searchsorted(self.keys, hashes[at])
        keys = np.minimum(keys, max(0, len(self.keys) - 1))
        is_equal = self.keys[keys] == hashes[at] if len(self.keys) else np.zeros(len(at), np.bool_)
        return at[is_equal], keys[is_equal]


class _Matches:
    """Rows of another split that match an index; threads add to it."""

    def __init__(self, index: _Index) -> None:
        self.index = index
        self.first: RowIds = np.full(len(index.keys), _NONE, np.int64)
        """Lowest row of the other split with each key, (m,)."""
        self.low: Hashes = np.full(len(index.keys), np.iinfo(np.uint64).max, np.uint64)
        """Smallest hash of the labels that each key has in the other split, (m,)."""
        self.high: Hashes = np.zeros(len(index.keys), np.uint64)
        """Largest hash of these labels: it differs from the smallest if the labels differ."""
        self._lock = threading.Lock()

    def add(self, keys: RowIds, rows: RowIds, labels: Hashes | None) -> None:
        """Add rows of the other split with their keys. The result does not depend on the order of calls."""
        with self._lock:
            # `.at`, as a key may come twice in one call: an assignment by index would keep only one of its rows.
            np.minimum.at(self.first, keys, rows)
            if labels is not None:
                np.minimum.at(self.low, keys, labels)
                np.maximum.at(self.high, keys, labels)


def _index_split(search: _Search, split: Split, share: float, pool: ThreadPoolExecutor) -> _Index:
    limit = np.uint64(min(2**64 - 1, int(share * 2**64)))

    def hash_fragment(index: int) -> tuple[RowIds, Hashes]:
        rows = []
        chosen = []
        begin = int(split.starts[index])
        for hashes, has_value in search.hash_inputs(split.fragments[index]):
            # Rows of nulls alone equal each other and would all count as leaks.
            at = np.flatnonzero(has_value & (hashes <= limit))
            rows.append(begin + at)
            chosen.append(hashes[at])
            begin += len(hashes)
        return np.concatenate(rows), np.concatenate(chosen)

    parts = list(pool.map(hash_fragment, range(len(split.fragments))))
    rows = np.concatenate([r for r, _ in parts])
    keys, key_of = np.unique(np.concatenate([h for _, h in parts]), return_inverse=True)
    maybe = np.zeros(1 << max(10, (16 * len(keys)).bit_length()), np.bool_)  # 1 in 16 to 32 entries is set
    maybe[keys & np.uint64(len(maybe) - 1)] = True
    return _Index(split, rows, keys, key_of, maybe)


def _searched_fragments(train: Split, limits: Limits) -> list[int]:
    """Return the fragments of the training data that are searched: all of them, unless they exceed the limits."""
    rows, sizes = train.fragments.rows, train.fragments.size_bytes
    order = np.arange(len(rows))
    if rows.sum() > limits.searched_rows or sizes.sum() > limits.searched_bytes:
        order = generator("leakage", train.fingerprint).permutation(len(rows))
    fits = (rows[order].cumsum() <= limits.searched_rows) & (sizes[order].cumsum() <= limits.searched_bytes)
    # At least one, however large.
    chosen: list[int] = np.sort(order[: max(1, int(fits.sum()))]).tolist()
    return chosen


def _search_fragment(search: _Search, train: Split, matches: Sequence[_Matches], index: int) -> None:
    """Add the rows of one fragment that match any of the indexes."""
    fragment = train.fragments[index]
    begin = 0
    hits: list[list[tuple[RowIds, RowIds]]] = [[] for _ in matches]
    for hashes, _ in search.hash_inputs(fragment):
        for of_split, pairs in zip(matches, hits, strict=True):
            at, keys = of_split.index.match(hashes)
            if len(at):
                pairs.append((begin + at, keys))
        begin += len(hashes)
    for of_split, pairs in zip(matches, hits, strict=True):
        if pairs:
            rows = np.concatenate([at for at, _ in pairs])
            keys = np.concatenate([k for _, k in pairs])
            # Labels are read for matches only: most fragments have none, and labels may be long texts.
            labels = search.hash_labels(read_rows(fragment, rows, list(search.targets))) if search.targets else None
            of_split.add(keys, rows + int(train.starts[index]), labels)


def _compare_indexes(search: _Search, index: _Index, other: _Index, share: float) -> LeakPair:
    """Compare two evaluation splits by their indexes, without reading the inputs again."""
    matches = _Matches(index)
    at, keys = index.match(other.keys[other.key_of])
    rows = other.rows[at]
    matches.add(keys, rows, _hash_labels_of(search, other.split, rows))
    return _leak_pair(search, matches, other.split, other.split.rows, share)


def _leak_pair(search: _Search, matches: _Matches, other: Split, searched_rows: int, share: float) -> LeakPair:
    index = matches.index
    at = np.flatnonzero(matches.first[index.key_of] != _NONE)
    rows = index.rows[at]
    keys = index.key_of[at]
    labels = _hash_labels_of(search, index.split, rows)
    has_other_label = (matches.low[keys] != labels) | (matches.high[keys] != labels) if labels is not None else None
    return LeakPair(
        split=index.split.name,
        other=other.name,
        rows=len(index.rows),
        share=share,
        searched_rows=searched_rows,
        other_rows=other.rows,
        duplicates=len(rows),
        other_label=int(has_other_label.sum()) if has_other_label is not None else None,
        examples=tuple(
            _example(index.split, int(row), other, int(matches.first[key]))
            for row, key in zip(rows[:_EXAMPLES], keys[:_EXAMPLES], strict=True)
        ),
    )


def _example(split: Split, row: int, other: Split, other_row: int) -> LeakExample:
    file, file_row = split.locate(row)
    other_file, other_file_row = other.locate(other_row)
    return LeakExample(file=file, file_row=file_row, other_file=other_file, other_file_row=other_file_row)


def _hash_labels_of(search: _Search, split: Split, rows: RowIds) -> Hashes | None:
    if not search.targets:
        return None
    parts = [rows[i : i + _LABELS_AT_ONCE] for i in range(0, len(rows), _LABELS_AT_ONCE)]
    hashes = [search.hash_labels(split.read(part, search.targets)) for part in parts]
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
