"""Which rows of training a window has, and reading them through pools. Runs on data workers and the head.

A window is one range of positions in an epoch's order, or in a mixture one for each source, or two where a source
starts again. `sampler.py` has the order of an epoch, `mixture.py` the shares of sources; `stream.py` encodes the rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa

from launcher.data.mixture import SourceRows, cumulative_rows, passes, source_of, weights_of
from launcher.data.row_sample import sample_rows
from launcher.data.sampler import EpochSampler, RowIds, row_noise
from launcher.data.splits import Split
from launcher.data.windows import Window, training_window
from launcher.rundir.plan import Plan
from launcher.spec.job import JobSpec

_MIN_CACHED_POOL_BYTES = 256 << 20
"""A pool may take more memory than `shuffle_pool_mib`, as row groups say less than their texts take when decoded. One
above this size, and above twice its nominal size, is not held; each window then reads its own rows."""
_MIN_STEPS = 1024


@dataclass(frozen=True)
class _SamplerKey:
    """Cache key of a sampler. It hashes fingerprint and version, not the split with its many fragments."""

    fingerprint: str
    version: str
    class_names: str
    seed: int
    batch_size: int
    window_steps: int
    pool_bytes: int
    source: SourceRows | None
    split: Split = field(compare=False)

    @staticmethod
    def of(job: JobSpec, split: Split, source: SourceRows | None = None) -> "_SamplerKey":
        # All that `EpochSampler` and a read depend on, but the epoch. Whatever is missing here would silently serve the
        # order or the rows of another job: the trials of a sweep share this process.
        return _SamplerKey(
            split.fingerprint if source is None else f"{source.name}/{source.fingerprint}",
            split.version,
            str(split.fragments.names),
            job.seed,
            job.train.batch_size,
            job.data.window_steps,
            # A worker holds a pool of each source: together they take the memory of one.
            max(1 << 20, (job.data.shuffle_pool_mib << 20) // max(1, len(split.sources))),
            source,
            split,
        )

    @property
    def first_row(self) -> int:
        """Row id of the first row of the source, 0 without a mixture."""
        return 0 if self.source is None else self.source.first_row


@dataclass(frozen=True)
class RowRange:
    """Consecutive positions in one epoch's order of one source, or of all data without a mixture."""

    key: _SamplerKey
    epoch: int
    start: int
    stop: int

    @property
    def ids(self) -> RowIds:
        """Row ids in the split, int64 (stop - start,)."""
        return self.key.first_row + _sampler(self.key, self.epoch).rows_between(self.start, self.stop)

    def read(self, columns: tuple[str, ...]) -> pa.Table:
        """Return the rows, as slices of pools that this process holds."""
        order = _sampler(self.key, self.epoch)
        places = order.places(self.start, self.stop)
        # Footers give the size of encoded pages: a column of few distinct values is small there and large in memory.
        max_bytes = max(_MIN_CACHED_POOL_BYTES, 2 * order.pool_bytes)
        if any(order.pool_rows(pool) * _row_bytes(self.key, columns) > max_bytes for pool, _, _ in places):
            return self.key.split.read(self.ids, columns)
        # Slices do not copy. Where a range crosses into the next pool it refers to both, which stay in memory until the
        # join.
        parts = [
            _read_pool(self.key, self.epoch, pool, columns).slice(begin, end - begin) for pool, begin, end in places
        ]
        return pa.concat_tables(parts)


def row_ranges(job: JobSpec, split: Split, window: Window) -> list[RowRange]:
    """Return the rows of a training window, in the order in which they are encoded."""
    if not split.sources:
        key = _SamplerKey.of(job, split)
        return [RowRange(key, window.epoch, *_sampler(key, window.epoch).bounds(window.index))]
    first, stop = window.first_step, window.first_step + window.batches
    cumulative = _cumulative_rows(job, stop)
    ranges = []
    for index, source in enumerate(split.sources):
        key = _SamplerKey.of(job, split, source)
        for place in passes(int(cumulative[first, index]), int(cumulative[stop, index]), source.rows):
            ranges.append(RowRange(key, *place))
    return ranges


def source_counts(job: JobSpec, window: Window) -> RowIds:
    """Return the rows of each source in each global batch of a training window, int64 (batches, sources)."""
    first, stop = window.first_step, window.first_step + window.batches
    return np.diff(_cumulative_rows(job, stop)[first : stop + 1], axis=0)


def _cumulative_rows(job: JobSpec, steps: int) -> RowIds:
    assert job.data.mixture is not None
    # Powers of two: counting from the beginning for each window would take quadratic time.
    steps = max(_MIN_STEPS, 1 << (steps - 1).bit_length())
    return cumulative_rows(weights_of([*job.data.mixture.values()]), job.train.batch_size, steps)


def read_ranges(ranges: Sequence[RowRange], columns: tuple[str, ...]) -> pa.Table:
    """Return the rows of all ranges, one after the other."""
    return pa.concat_tables([part.read(columns) for part in ranges]).combine_chunks()


def noise_of(ranges: Sequence[RowRange], ids: RowIds) -> RowIds:
    """Return the augmentation seed of each row, int64 (n,): another one in each epoch of its source.

    Args:
        ranges: Ranges of the rows.
        ids: Row ids of all ranges, one after the other; to find them once more would permute their pools again.
    """
    bounds = np.cumsum([part.stop - part.start for part in ranges])[:-1]
    # One seed per row, not one stream of draws: a row is augmented alike in any window size and in any order.
    parts = zip(ranges, np.split(ids, bounds), strict=True)
    return np.concatenate([row_noise(part.key.seed, part.epoch, own) for part, own in parts])


def row_epochs(ranges: Sequence[RowRange]) -> RowIds:
    """Return the epoch of each row of some ranges, one after the other, from 0: of its source in a mixture."""
    return np.repeat([part.epoch for part in ranges], [part.stop - part.start for part in ranges]).astype(np.int64)


def windows_of_row(job: JobSpec, plan: Plan, split: Split, row: int) -> Iterator[tuple[Window, int]]:
    """Yield each training window that reads a row, with the epoch (of its source in a mixture) in which it does.

    Nothing is read: a window follows from the order of an epoch alone. Its batches do not.
    """
    for epoch, step in _steps_of_row(job, plan, split, row):
        # From the window's first step, so that all of its batches are cut. A limit of steps may end the run before it.
        first = step - step % plan.steps_per_epoch % plan.window_steps
        if first < plan.total_steps:
            yield training_window(plan, job, first), epoch


def _steps_of_row(job: JobSpec, plan: Plan, split: Split, row: int) -> Iterator[tuple[int, int]]:
    """Yield each epoch in which a row is read, and a step of the window that reads it."""
    if not split.sources:
        key = _SamplerKey.of(job, split)
        for epoch in range(plan.epochs):
            yield epoch, epoch * plan.steps_per_epoch + _sampler(key, epoch).position(row) // job.train.batch_size
        return
    index = int(source_of([source.first_row for source in split.sources], np.array([row]))[0])
    source = split.sources[index]
    key = _SamplerKey.of(job, split, source)
    # To the end of the last window: a limit of steps ends the run within it, but not the rows that it is cut from.
    last = training_window(plan, job, plan.total_steps - 1)
    steps = last.first_step + last.batches
    taken = _cumulative_rows(job, steps)[: steps + 1, index]
    for epoch in range(-(-int(taken[-1]) // source.rows)):
        number = epoch * source.rows + _sampler(key, epoch).position(row - source.first_row)
        if number < taken[-1]:
            yield epoch, int(np.searchsorted(taken, number, side="right")) - 1


def epoch_sampler(job: JobSpec, split: Split, epoch: int) -> EpochSampler:
    """Return the order of one epoch of a job's training rows; not for mixtures, which have one for each source."""
    return _sampler(_SamplerKey.of(job, split), epoch)


# Pieces are laid out once per epoch and process, not once per window; a mixture has one sampler for each source.
@lru_cache(maxsize=64)
def _sampler(key: _SamplerKey, epoch: int) -> EpochSampler:
    columns, source = key.split.fragments, key.source
    part = slice(None) if source is None else slice(source.first_fragment, source.first_fragment + source.fragments)
    fragments = tuple(zip(columns.rows[part].tolist(), columns.size_bytes[part].tolist(), strict=True))
    window_rows = key.batch_size * key.window_steps
    return EpochSampler(fragments, key.fingerprint, key.seed, epoch, window_rows, key.pool_bytes)


@lru_cache(maxsize=4)
def _row_bytes(key: _SamplerKey, columns: tuple[str, ...]) -> float:
    """Return the mean size of a decoded row in memory, estimated from a few rows."""
    # Footers cannot tell: their sizes are those of encoded pages. The sample is read once per process.
    rows = sample_rows(key.split, columns, 32)
    return float(rows.nbytes) / max(1, len(rows))


@dataclass(frozen=True)
class _Pool:
    """Pool that this process holds."""

    key: _SamplerKey
    epoch: int
    number: int
    rows: pa.Table


@lru_cache(maxsize=1)
def _held_pools(version: str, columns: tuple[str, ...]) -> dict[SourceRows | None, _Pool]:
    """Return the pools that this process holds: one for each source of one split, for all trials of a sweep."""
    return {}


def _read_pool(key: _SamplerKey, epoch: int, number: int, columns: tuple[str, ...]) -> pa.Table:
    """Read the rows of a pool, permuted; windows come in order, so the last pool of each source is enough.

    The pieces of a pool are spread over all files, and a row group is decoded from its beginning: reading them for
    each window by itself would decode most of the files for each window.
    """
    pools = _held_pools(key.version, columns)
    # Removed first: the pool before must not stay in memory while the next one is read.
    pool = pools.pop(key.source, None)
    if pool is None or (pool.key, pool.epoch, pool.number) != (key, epoch, number):
        pool = None
        ids = key.first_row + _sampler(key, epoch).pool_ids(number)
        pool = _Pool(key, epoch, number, key.split.read(ids, columns))
    pools[key.source] = pool
    return pool.rows
