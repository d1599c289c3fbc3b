"""Mixtures: how many rows of each source every global batch has, and which. Pure functions, wherever rows are read.

The shares are exact: the rows of a source in the first k batches differ from its weight times k batches by less than
one batch's rounding, as each batch passes its remainders on to the next (largest remainders first). Each source is an
endless sequence of its own epochs, in the order that it would have alone, and every batch takes the next rows of it. So
a batch depends on the job file alone: not on workers, not on where a run resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from launcher.data.sampler import RowIds
from launcher.errors import DataError
from launcher.spec.data import SourceSpec

_PARTS = 1_000_000
"""Weights are rounded to this many parts: integers carry remainders without an error that machines disagree on."""
_MAX_STEPS = 5_000_000
"""Limit on the steps of an epoch, which are counted one by one."""

Weights = tuple[tuple[tuple[int, float], ...], ...]
"""Weight of each source at some steps, ascending."""


def weights_of(sources: Sequence[SourceSpec]) -> Weights:
    """Return the weights of sources in a form that can be a cache key."""
    return tuple(
        tuple(sorted(source.weight.items())) if isinstance(source.weight, dict) else ((0, source.weight),)
        for source in sources
    )


def parts_at(weights: Weights, step: int) -> list[int]:
    """Return the share of each source at a step in millionths; their sum is a million.

    Raises:
        DataError: All weights are 0 at this step.
    """
    values = [float(np.interp(step, [k for k, _ in points], [w for _, w in points])) for points in weights]
    total = sum(values)
    if total <= 0.0:
        raise DataError(f"data.mixture: all weights are 0 at step {step}; give one source a positive weight there")
    exact = [value / total * _PARTS for value in values]
    return _round_to_sum(exact, _PARTS)


def _round_to_sum(exact: Sequence[float], total: int) -> list[int]:
    """Round numbers to integers of a given sum, none negative: the largest remainders are rounded up."""
    counts = [max(0, int(value // 1)) for value in exact]
    # Ties go to the first source, so that every machine rounds alike.
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    missing = total - sum(counts)
    for index in by_remainder[: max(0, missing)]:
        counts[index] += 1
    # Sources that had too much in earlier batches may leave the others more than there is room for.
    for index in reversed(by_remainder):
        if missing < 0 and counts[index]:
            counts[index] -= 1
            missing += 1
    return counts


@lru_cache(maxsize=8)
def cumulative_rows(weights: Weights, batch_size: int, steps: int) -> RowIds:
    """Return the rows of each source in the first k batches, for each k: int64 (steps + 1, sources).

    Args:
        weights: Weights of the sources.
        batch_size: Rows of a global batch.
        steps: Number of batches.
    """
    is_constant = all(len(points) == 1 for points in weights)
    parts = parts_at(weights, 0)
    owed = [0] * len(weights)
    counts = np.zeros((steps + 1, len(weights)), np.int64)
    for step in range(steps):
        if not is_constant:
            parts = parts_at(weights, step)
        owed = [rest + part * batch_size for rest, part in zip(owed, parts, strict=True)]
        taken = _round_to_sum([rest / _PARTS for rest in owed], batch_size)
        owed = [rest - count * _PARTS for rest, count in zip(owed, taken, strict=True)]
        counts[step + 1] = taken
    return counts.cumsum(axis=0)


def steps_per_epoch(weights: Weights, batch_size: int, rows: Sequence[int], names: Sequence[str], until: str) -> int:
    """Return the number of batches of an epoch of a mixture.

    Args:
        weights: Weights of the sources.
        batch_size: Rows of a global batch.
        rows: Number of rows of each source.
        names: Names of the sources, for messages.
        until: End of an epoch, `exhausted` or `repeat` (`data.until`).

    Raises:
        DataError: A source is too small for a batch, or the epoch would be too long.
    """
    sizes = np.array(rows, np.int64)
    if until == "exhausted":
        # Batches hold rows of the sources together, so no epoch has more than this.
        cumulative = cumulative_rows(weights, batch_size, -(-int(sizes.sum()) // batch_size))
        fits = (cumulative <= sizes).all(axis=1)
        steps = int(fits.sum()) - 1
        if steps < 1:
            short = int((cumulative[1] - sizes).argmax())
            raise DataError(
                f"data.mixture.{names[short]}: has {rows[short]} rows, fewer than its {cumulative[1][short]} of a "
                "single batch; set data.until: repeat, or lower its weight"
            )
        return steps
    shares = np.array(parts_at(weights, 0)) / _PARTS
    used = shares > 0
    # The first guess is exact up to rounding for constant weights; changing ones may need several times as many.
    guess = int((sizes[used] / shares[used]).max() / batch_size) + len(sizes) + 1
    while guess <= _MAX_STEPS:
        cumulative = cumulative_rows(weights, batch_size, guess)
        done = (cumulative >= sizes).all(axis=1) if used.all() else (cumulative[:, used] >= sizes[used]).all(axis=1)
        if done.any():
            return int(done.argmax())
        guess *= 2
    slow = names[int(np.argmax(np.where(used, sizes / np.maximum(shares, 1e-12), 0)))]
    raise DataError(
        f"data.mixture.{slow}: with its weight an epoch that uses all of its rows has more than {_MAX_STEPS} steps; "
        "raise its weight, or set data.until: exhausted"
    )


@dataclass(frozen=True)
class SourceRows:
    """Part of a split that is one source: consecutive rows and fragments.

    Args:
        name: Name of the source.
        first_row: Row id of its first row in the split.
        rows: Number of its rows.
        first_fragment: Position of its first fragment in the split.
        fragments: Number of its fragments.
        fingerprint: Fingerprint of its data, which decides its order.
    """

    name: str
    first_row: int
    rows: int
    first_fragment: int
    fragments: int
    fingerprint: str


def source_of(starts: Sequence[int], ids: RowIds) -> RowIds:
    """Return the index of the source of each row id, int64 (n,), given the first row id of each source."""
    index: RowIds = np.searchsorted(np.array(starts, np.int64), ids, side="right") - 1
    return index


def passes(begin: int, end: int, rows: int) -> list[tuple[int, int, int]]:
    """Return the places of a source's rows `begin` to `end`, counted over all its epochs: (epoch, start, stop)."""
    places = []
    while begin < end:
        epoch, start = divmod(begin, rows)
        stop = min(rows, start + end - begin)
        places.append((epoch, start, stop))
        begin += stop - start
    return places


def cut_mixed_batches(
    lengths: RowIds, source: RowIds, counts: npt.NDArray[np.int64], rng: np.random.Generator
) -> list[RowIds]:
    """Cut the encoded rows of a window into its global batches with the rows of each source that its shares give.

    Args:
        lengths: Length of each row, int64 (n,), in window order.
        source: Index of the source of each row, int64 (n,).
        counts: Rows of each source in each batch, int64 (batches, sources). If rows were skipped, the remaining ones
            of a source are spread in these proportions.
        rng: Generator that decides which batch gets the longest rows.

    Returns:
        Positions in the window, one array for each batch; each position once. Within a batch, long rows come first.
    """
    steps = len(counts)
    # Slot 0 takes the longest rows of every source, and so on: rows of similar length share a batch. Batch `b` of the
    # window is slot `slots[b]`.
    slots = rng.permutation(steps)
    in_slot_order = np.argsort(slots)
    parts: list[list[RowIds]] = [[] for _ in range(steps)]
    for index in range(counts.shape[1]):
        rows = np.flatnonzero(source == index)
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        ends = np.concatenate([[0], np.cumsum(counts[in_slot_order, index])])
        if ends[-1] != len(rows):
            ends = len(rows) * ends // max(1, ends[-1])
        for slot, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            parts[in_slot_order[slot]].append(rows[begin:end])
    batches = [np.concatenate(batch) for batch in parts]
    return [batch[np.argsort(-lengths[batch], kind="stable")] for batch in batches]
