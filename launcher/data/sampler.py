"""The canonical order: which rows make up window w of epoch e. Pure functions of numbers; no data is read.

Runs in Ray Data workers and on the head, with the same answer everywhere, because it depends only on the data's
fingerprint, the seed and the epoch. Fragments are cut into slices, which are shuffled and laid into pools of bounded
size; the rows of a pool are permuted, and the pools' rows, end to end, are cut into windows. A pool has slices from all
over the files, so that rows sorted by class are mixed too. Read `stream.py` next.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

RowIds = npt.NDArray[np.int64]
_POOL_ROWS = 1 << 20
"""In a pool at most: what repeats takes next to no bytes in a file, but the ids of all its rows are permuted."""


_SLICES = 32
"""Of which a pool consists at least, where there are several pools."""
_MOST_PIECES = 1_000_000
"""Of an epoch, about: slices of very large data are larger, as every process lays all of them."""


def generator(*parts: object) -> np.random.Generator:
    """A random generator that is a function of its arguments alone, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def row_noise(seed: int, epoch: int, rows: RowIds) -> RowIds:
    """A seed for each row's augmentation: a function of (seed, epoch, row), the same on any cluster.

    Returns:
        int64 (n,), not negative; SplitMix64 (Steele et al. 2014) of the row's number.
    """
    start = np.uint64(generator("noise", seed, epoch).integers(0, 2**63))
    with np.errstate(over="ignore"):
        z = start + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one fragment: the unit that moves when fragments are shuffled."""

    first: int
    rows: int
    size_bytes: int


@dataclass(frozen=True)
class EpochSampler:
    """The order of one epoch.

    Args:
        fragments: (rows, uncompressed bytes) of each fragment, in file order.
        fingerprint: of the data; another data set gets another order.
        seed: the job's seed.
        epoch: counted from 0.
        window_rows: rows per window; the last window of the epoch may have fewer.
        pool_bytes: rows are shuffled inside pools of about this size, or of a million rows.
    """

    fragments: tuple[tuple[int, int], ...]
    fingerprint: str
    seed: int
    epoch: int
    window_rows: int
    pool_bytes: int

    @cached_property
    def rows(self) -> int:
        """Rows in the epoch: all of them."""
        return sum(rows for rows, _ in self.fragments)

    @property
    def windows(self) -> int:
        """Windows in the epoch."""
        return -(-self.rows // self.window_rows)

    @property
    def pools(self) -> list[list[Piece]]:
        """The shuffled pieces, grouped into pools; at least one piece each."""
        laid, bounds = self._laid
        pieces = [Piece(*numbers) for numbers in laid.tolist()]
        return [pieces[begin:end] for begin, end in pairwise(bounds)]

    @cached_property
    def _laid(self) -> tuple[RowIds, list[int]]:
        """The shuffled pieces, (pieces, 3) as `Piece` has them, and where pools begin, with the end of the last."""
        pieces = _pieces(self.fragments, self.pool_bytes)
        laid = pieces[generator("pieces", self.fingerprint, self.seed, self.epoch).permutation(len(pieces))]
        bounds, filled, rows = [0], 0, 0
        sizes = zip(laid[:, 1].tolist(), laid[:, 2].tolist(), strict=True)
        for number, (more_rows, more_bytes) in enumerate(sizes):
            if number and (filled + more_bytes > self.pool_bytes or rows + more_rows > _POOL_ROWS):
                bounds.append(number)
                filled = rows = 0
            filled += more_bytes
            rows += more_rows
        return laid, [*bounds, len(laid)] if len(laid) else [0]

    @cached_property
    def pool_starts(self) -> RowIds:
        """First row of each pool in the epoch's order, and the number of rows behind them: (pools + 1,)."""
        laid, bounds = self._laid
        behind = np.concatenate([[0], np.cumsum(laid[:, 1])]).astype(np.int64)
        return behind[bounds]

    def window(self, index: int) -> RowIds:
        """Row ids of one window, in the order they are encoded.

        Returns:
            int64 (n,), n = `window_rows`, or fewer in the last window.
        """
        parts = [self.pool_ids(pool)[begin:end] for pool, begin, end in self.places(index)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def places(self, index: int) -> list[tuple[int, int, int]]:
        """Return where a window's rows lie: (pool, first, one past the last) among the shuffled rows of each pool."""
        start, stop = index * self.window_rows, min(self.rows, (index + 1) * self.window_rows)
        first = int(np.searchsorted(self.pool_starts, start, side="right")) - 1
        found = []
        for pool in range(first, len(self.pool_starts) - 1):
            begin, end = int(self.pool_starts[pool]), int(self.pool_starts[pool + 1])
            if begin >= stop:
                break
            found.append((pool, max(0, start - begin), min(end, stop) - begin))
        return found

    def pool_rows(self, pool: int) -> int:
        """Return the number of rows of a pool."""
        return int(self.pool_starts[pool + 1] - self.pool_starts[pool])

    def pool_ids(self, pool: int) -> RowIds:
        """Return the row ids of a pool, shuffled."""
        laid, bounds = self._laid
        mine = laid[bounds[pool] : bounds[pool + 1]].tolist()
        ids = np.concatenate([np.arange(first, first + rows, dtype=np.int64) for first, rows, _ in mine])
        return generator("rows", self.fingerprint, self.seed, self.epoch, pool).permutation(ids)


def _pieces(fragments: Sequence[tuple[int, int]], pool_bytes: int) -> RowIds:
    """Return fragments as pieces, (pieces, 3) as `Piece` has them, in even slices where one pool cannot hold all."""
    rows, size_bytes = np.array(fragments, np.int64).reshape(-1, 2).T
    slices = np.ones(len(rows), np.int64)
    if size_bytes.sum() > pool_bytes or rows.sum() > _POOL_ROWS:
        most_bytes = max(pool_bytes // _SLICES, int(size_bytes.sum()) // _MOST_PIECES, 1)
        most_rows = max(_POOL_ROWS // _SLICES, int(rows.sum()) // _MOST_PIECES)
        slices = np.maximum(-(-size_bytes // most_bytes), -(-rows // most_rows))
    slices = np.maximum(1, np.minimum(rows, slices))
    first = np.repeat(np.cumsum(rows) - rows, slices)
    number = np.arange(len(first)) - np.repeat(np.cumsum(slices) - slices, slices)
    rows, size_bytes, slices = (np.repeat(column, slices) for column in (rows, size_bytes, slices))
    begin, end = rows * number // slices, rows * (number + 1) // slices
    pieces: RowIds = np.stack([first + begin, end - begin, size_bytes // slices], axis=1)
    kept: RowIds = pieces[end > begin]
    return kept


def cut_batches(lengths: RowIds, steps: int, batch_size: int, rng: np.random.Generator | None) -> list[RowIds]:
    """Cut a window's encoded rows into its global batches; rows of like length share one.

    Args:
        lengths: (n,) length of each row, in window order.
        steps: batches the plan counted on; fewer rows than planned (skipped ones) are spread evenly over them.
        batch_size: rows per full batch.
        rng: shuffles the batches; None leaves those with the longest rows first, for evaluation.

    Returns:
        `steps` arrays of positions in the window; each position once. Within a batch, long rows come first.
    """
    n = len(lengths)
    order = np.argsort(-lengths, kind="stable")
    if -(-n // batch_size) == steps:
        bounds = np.minimum(np.arange(steps + 1) * batch_size, n)
    else:
        bounds = np.array([n * i // steps for i in range(steps + 1)])
    batches = [order[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    return batches if rng is None else [batches[i] for i in rng.permutation(steps)]
