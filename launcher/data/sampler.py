"""The order of training: which rows are in window w of epoch e. Pure functions of numbers; no data is read.

Runs on data workers and on the head, with the same answer everywhere: the order depends on the fingerprint of the data,
the seed and the epoch alone. Terms, in the order in which they are built:

- piece: consecutive rows of one fragment; a large fragment is cut into several;
- pool: shuffled pieces of bounded total size, whose rows are permuted together;
- window: `window_rows` consecutive rows of the pools laid end to end; `cut_batches` cuts it into global batches.

Reading rows in a fully random order would decode a row group for every row, and shuffling whole fragments would leave
rows that are sorted by class unmixed. A pool has pieces from all over the files, is read once and fits into memory.
Read `stream.py` next.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from launcher.models.noise import mixed

RowIds = npt.NDArray[np.int64]
_MAX_POOL_ROWS = 1 << 20
"""Repeated values take next to no bytes in a file, but the ids of all rows of a pool are permuted in memory."""
_MIN_PIECES_PER_POOL = 32
"""Lower bound where there are several pools."""
_MAX_PIECES = 1_000_000
"""Approximate bound of an epoch: every process lays out all pieces, so those of very large data are larger."""


def generator(*parts: object) -> np.random.Generator:
    """Return a random generator that is a function of its arguments alone, the same on every machine.

    The arguments are hashed as text: changing one call's arguments changes the order of every run that resumes.
    """
    # Not Python's `hash`: that of a string differs from process to process, and every process must find the same order.
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    # NumPy keeps the bits of PCG64 across versions, but not what `Generator.permutation` makes of them (NEP 19): a run
    # that resumes under another NumPy may meet another order.
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def row_noise(seed: int, epoch: int, rows: RowIds) -> RowIds:
    """Return a seed for the augmentation of each row: a function of (seed, epoch, row), the same on any cluster.

    Returns:
        Seeds, int64 (n,), not negative.
    """
    # Not one generator per row: all rows take a few vector operations, and row k no draw for the rows before it.
    start = np.full(len(rows), generator("noise", seed, epoch).integers(0, 2**63), np.uint64)
    # The lowest bit is dropped, so that a seed fits into int64 without a sign.
    return (mixed(start, rows) >> np.uint64(1)).astype(np.int64)


# All processes build it from the same numbers, so no list of row ids ever travels between them.
@dataclass(frozen=True)
class EpochSampler:
    """The order of one epoch.

    Args:
        fragments: Rows and uncompressed bytes of each fragment, in file order.
        fingerprint: Fingerprint of the data; other data have another order.
        seed: Seed of the job.
        epoch: Number of the epoch, from 0.
        window_rows: Rows of a window; the last window of the epoch may have fewer.
        pool_bytes: Upper bound of a pool's size, unless it consists of one piece.
    """

    fragments: tuple[tuple[int, int], ...]
    fingerprint: str
    seed: int
    epoch: int
    window_rows: int
    pool_bytes: int

    # `cached_property` writes to the instance's `__dict__`, past the freeze; `slots=True` would break it.
    @cached_property
    def rows(self) -> int:
        """Number of rows of the epoch."""
        return sum(rows for rows, _ in self.fragments)

    @cached_property
    def pooled_pieces(self) -> tuple[RowIds, list[int]]:
        """Shuffled pieces, int64 (pieces, 3) of first row, rows and bytes, and the bounds of the pools among them."""
        # `pool_bytes` decides where pieces and pools end: another `shuffle_pool_mib` is another order, not only other
        # memory.
        pieces = _cut_pieces(self.fragments, self.pool_bytes)
        shuffled = pieces[generator("pieces", self.fingerprint, self.seed, self.epoch).permutation(len(pieces))]
        bounds = [0]
        pool_bytes = pool_rows = 0
        # A Python loop over up to a million pieces: `tolist` first, as plain integers add much faster than NumPy's
        # scalars.
        sizes = zip(shuffled[:, 1].tolist(), shuffled[:, 2].tolist(), strict=True)
        for number, (rows, size_bytes) in enumerate(sizes):
            # The first piece of a pool always fits: a pool has at least one.
            # Pieces are taken in the shuffled order. Searching for one that still fits would prefer small pieces, and
            # so some files.
            if number and (pool_bytes + size_bytes > self.pool_bytes or pool_rows + rows > _MAX_POOL_ROWS):
                bounds.append(number)
                pool_bytes = pool_rows = 0
            pool_bytes += size_bytes
            pool_rows += rows
        return shuffled, [*bounds, len(shuffled)] if len(shuffled) else [0]

    @cached_property
    def pool_starts(self) -> RowIds:
        """Position of each pool's first row in the epoch's order, then the number of rows: int64 (pools + 1,)."""
        shuffled, bounds = self.pooled_pieces
        row_ends = np.concatenate([[0], np.cumsum(shuffled[:, 1])]).astype(np.int64)
        # One number per pool and none per row: besides the pieces, this is all that a process holds of an epoch's
        # order.
        return row_ends[bounds]

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the first and the last position, exclusive, of a window in the epoch's order."""
        start = index * self.window_rows
        return start, min(self.rows, start + self.window_rows)

    def rows_between(self, start: int, stop: int) -> RowIds:
        """Return the row ids at some positions of the epoch's order, int64 (stop - start,)."""
        # Pools are permuted whole and sliced: no part of a permutation can be had without the rest of it.
        parts = [self.pool_ids(pool)[begin:end] for pool, begin, end in self.places(start, stop)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def position(self, row: int) -> int:
        """Return the position of a row in the epoch's order; the inverse of `rows_between`."""
        # One pool is permuted: that of the piece which the row is in.
        shuffled, bounds = self.pooled_pieces
        offset = row - shuffled[:, 0]
        piece = int(np.flatnonzero((offset >= 0) & (offset < shuffled[:, 1]))[0])
        pool = int(np.searchsorted(bounds, piece, side="right")) - 1
        return int(self.pool_starts[pool]) + int(np.flatnonzero(self.pool_ids(pool) == row)[0])

    def places(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return where rows are that lie between two positions: (pool, begin, end) among each pool's permuted rows."""
        # Windows ignore where pools end, so that every window but the last is full and the number of steps follows from
        # the number of rows alone. A window may therefore reach over several pools.
        first = int(np.searchsorted(self.pool_starts, start, side="right")) - 1
        places = []
        for pool in range(first, len(self.pool_starts) - 1):
            begin = int(self.pool_starts[pool])
            end = int(self.pool_starts[pool + 1])
            if begin >= stop:
                break
            places.append((pool, max(0, start - begin), min(end, stop) - begin))
        return places

    def pool_rows(self, pool: int) -> int:
        """Return the number of rows of a pool."""
        return int(self.pool_starts[pool + 1] - self.pool_starts[pool])

    def pool_ids(self, pool: int) -> RowIds:
        """Return the row ids of a pool, permuted."""
        shuffled, bounds = self.pooled_pieces
        pieces = shuffled[bounds[pool] : bounds[pool + 1]].tolist()
        # Rows of all pieces are mixed here. What is mixed is a pool, never an epoch: memory stays bounded for any data.
        ids = np.concatenate([np.arange(first, first + rows, dtype=np.int64) for first, rows, _ in pieces])
        # A generator per pool: a resumed run permutes only the pools that it reads.
        return generator("rows", self.fingerprint, self.seed, self.epoch, pool).permutation(ids)


def _cut_pieces(fragments: Sequence[tuple[int, int]], pool_bytes: int) -> RowIds:
    """Cut fragments into even pieces, (pieces, 3) as in `pooled_pieces`; if one pool holds all, one piece each."""
    rows, size_bytes = np.array(fragments, np.int64).reshape(-1, 2).T
    # Data of one pool need no cut: the rows of the whole split are permuted together anyway.
    slices = np.ones(len(rows), np.int64)
    if size_bytes.sum() > pool_bytes or rows.sum() > _MAX_POOL_ROWS:
        max_bytes = max(pool_bytes // _MIN_PIECES_PER_POOL, int(size_bytes.sum()) // _MAX_PIECES, 1)
        max_rows = max(_MAX_POOL_ROWS // _MIN_PIECES_PER_POOL, int(rows.sum()) // _MAX_PIECES)
        slices = np.maximum(-(-size_bytes // max_bytes), -(-rows // max_rows))
    # A piece has at least one row, however large that row is.
    slices = np.maximum(1, np.minimum(rows, slices))
    # Integer division spreads rows evenly over the slices of a fragment, without a rounding that machines disagree on.
    first = np.repeat(np.cumsum(rows) - rows, slices)
    number = np.arange(len(first)) - np.repeat(np.cumsum(slices) - slices, slices)
    rows, size_bytes, slices = (np.repeat(column, slices) for column in (rows, size_bytes, slices))
    begin = rows * number // slices
    end = rows * (number + 1) // slices
    pieces: RowIds = np.stack([first + begin, end - begin, size_bytes // slices], axis=1)
    nonempty: RowIds = pieces[end > begin]
    return nonempty


def cut_batches(lengths: RowIds, steps: int, batch_size: int, rng: np.random.Generator | None) -> list[RowIds]:
    """Cut the encoded rows of a window into its global batches; rows of similar length share a batch.

    Args:
        lengths: Length of each row, int64 (n,), in window order.
        steps: Number of batches in the plan. If rows were skipped, the remaining ones are spread evenly over them.
        batch_size: Rows of a full batch.
        rng: Generator that shuffles the batches; None leaves the batches with the longest rows first (evaluation).

    Returns:
        Positions in the window, `steps` arrays; each position once. Within a batch, long rows come first.
    """
    n = len(lengths)
    # A stable sort: with equal lengths (no length grouping) the window's order stays.
    # Of the whole window: the more rows there are to choose from, the less padding; hence `window_steps`.
    order = np.argsort(-lengths, kind="stable")
    # The usual case: all batches are full but one at most. The shuffle below may put that one anywhere in the window.
    if -(-n // batch_size) == steps:
        bounds = np.minimum(np.arange(steps + 1) * batch_size, n)
    else:
        # Skipped rows must not cost a step: the plan, the schedule of the learning rate and a checkpoint's step all
        # count batches. Filling batches from the front would leave the last ones empty.
        bounds = np.array([n * i // steps for i in range(steps + 1)])
    batches = [order[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    # The batches are shuffled, not the rows in them: without it every window would train on its longest rows first.
    return batches if rng is None else [batches[i] for i in rng.permutation(steps)]
