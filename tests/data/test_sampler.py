"""The order has every row once, whatever the fragments are, and batches are cut as planned."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.sampler import EpochSampler, RowIds, cut_batches, generator

_fragments = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 5000)), min_size=1, max_size=20).map(tuple)
_quick = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def _orders(draw: st.DrawFn, min_rows: int = 1) -> EpochSampler:
    fragments = draw(_fragments.filter(lambda fragments: sum(rows for rows, _ in fragments) >= min_rows))
    return EpochSampler(
        fragments,
        draw(st.text("0123456789abcdef", min_size=1, max_size=8)),
        draw(st.integers(0, 2**31)),
        draw(st.integers(0, 20)),
        draw(st.integers(1, 200)),
        draw(st.integers(1, 20000)),
    )


def _count_windows(order: EpochSampler) -> int:
    return -(-order.rows // order.window_rows)


def _window(order: EpochSampler, index: int) -> RowIds:
    return order.rows_between(*order.bounds(index))


class _Piece(NamedTuple):
    first: int
    rows: int
    size_bytes: int


def _pools(order: EpochSampler) -> list[list[_Piece]]:
    shuffled, bounds = order.pooled_pieces
    return [[_Piece(*numbers) for numbers in shuffled[a:b].tolist()] for a, b in pairwise(bounds)]


def _all_ids(order: EpochSampler) -> RowIds:
    return np.concatenate([_window(order, i) for i in range(_count_windows(order))])


@_quick
@given(_orders())
def test_windows_have_each_row_exactly_once(order: EpochSampler) -> None:
    ids = _all_ids(order)
    assert ids.dtype == np.int64
    assert order.rows == sum(rows for rows, _ in order.fragments)
    assert np.array_equal(np.sort(ids), np.arange(order.rows))


@_quick
@given(_orders())
def test_every_window_but_the_last_is_full(order: EpochSampler) -> None:
    sizes = [len(_window(order, i)) for i in range(_count_windows(order))]
    assert sizes[:-1] == [order.window_rows] * (_count_windows(order) - 1)
    assert sizes[-1] == order.rows - order.window_rows * (_count_windows(order) - 1) > 0
    assert len(_window(order, _count_windows(order))) == 0


@_quick
@given(_orders())
def test_window_does_not_depend_on_earlier_calls(order: EpochSampler) -> None:
    whole = _all_ids(order)
    for index in reversed(range(_count_windows(order))):
        begin = index * order.window_rows
        assert np.array_equal(_window(replace(order), index), whole[begin : begin + order.window_rows])


@_quick
@given(_orders(), st.integers(1, 300))
def test_order_does_not_depend_on_the_size_of_windows(order: EpochSampler, window_rows: int) -> None:
    assert np.array_equal(_all_ids(order), _all_ids(replace(order, window_rows=window_rows)))


@_quick
@given(_orders(min_rows=20))
def test_seed_epoch_and_fingerprint_each_change_the_order(order: EpochSampler) -> None:
    ids = _all_ids(order)
    assert np.array_equal(ids, _all_ids(replace(order)))
    assert not np.array_equal(ids, _all_ids(replace(order, seed=order.seed + 1)))
    assert not np.array_equal(ids, _all_ids(replace(order, epoch=order.epoch + 1)))
    assert not np.array_equal(ids, _all_ids(replace(order, fingerprint=order.fingerprint + "x")))


@_quick
@given(_orders())
def test_pools_are_bounded_and_their_pieces_lie_inside_a_fragment(order: EpochSampler) -> None:
    bounds = np.concatenate([[0], np.cumsum([rows for rows, _ in order.fragments])])
    assert all(_pools(order))
    for pool in _pools(order):
        assert len(pool) == 1 or sum(piece.size_bytes for piece in pool) <= order.pool_bytes
        for piece in pool:
            owner = int(np.searchsorted(bounds, piece.first, side="right")) - 1
            assert piece.rows > 0
            assert piece.first + piece.rows <= bounds[owner + 1]


def test_small_data_set_is_one_pool_and_is_shuffled_as_a_whole() -> None:
    order = EpochSampler(((50, 100), (50, 100), (50, 100)), "f", 1, 0, 150, 300)
    assert len(_pools(order)) == 1
    # Were only fragments shuffled, each third would come out of one fragment.
    assert [len(np.unique(part // 50)) for part in _window(order, 0).reshape(3, 50)] == [3, 3, 3]


def test_pool_has_pieces_from_all_over_a_large_fragment() -> None:
    order = EpochSampler(((640, 64000),), "f", 1, 0, 7, 16000)
    assert [[(piece.rows, piece.size_bytes) for piece in pool] for pool in _pools(order)] == [[(5, 500)] * 32] * 4
    for pool in _pools(order):
        assert len({piece.first // 160 for piece in pool}) == 4  # of each quarter


@pytest.mark.parametrize(
    ("rows", "row_bytes", "group", "classes"), [(2_000_000, 300, 1 << 20, 2), (20_000, 110_000, 100, 100)]
)
def test_rows_sorted_by_class_are_mixed(rows: int, row_bytes: int, group: int, classes: int) -> None:
    """Test texts in the row groups of pyarrow, and pictures in those of `datasets`; batches of 32."""
    counts = [min(group, rows - begin) for begin in range(0, rows, group)]
    order = EpochSampler(tuple((n, n * row_bytes) for n in counts), "f", 1, 0, 32 * 32, 64 << 20)
    for index in np.linspace(0, _count_windows(order) - 2, 20).astype(int):
        held = np.bincount(_window(order, int(index)) * classes // rows, minlength=classes)
        if classes == 2:
            assert 0.15 < held[0] / held.sum() < 0.85
        else:
            assert np.count_nonzero(held) > 25


def test_number_of_pieces_of_very_large_data_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.data.sampler._MAX_PIECES", 10_000)
    order = EpochSampler(((1 << 20, 1 << 40),) * 100, "f", 1, 0, 1 << 20, 64 << 20)
    assert 9_000 < sum(map(len, _pools(order))) < 11_000


def test_pool_of_rows_without_bytes_is_bounded_too() -> None:
    order = EpochSampler(((10**7, 5), *((10**6, 5),) * 20), "f", 1, 0, 1000, 1000)
    assert max(sum(piece.rows for piece in pool) for pool in _pools(order)) <= 1 << 20
    assert sum(piece.rows for pool in _pools(order) for piece in pool) == 3 * 10**7
    assert len(_pools(order)) < 40


def test_fragments_without_bytes_have_their_rows_in_the_order() -> None:
    order = EpochSampler(((3, 0), (2, 0)), "f", 1, 0, 4, 10)
    assert sorted(_all_ids(order).tolist()) == [0, 1, 2, 3, 4]


def test_order_of_a_seed_never_changes() -> None:
    """Protect runs that resume with a newer version."""
    assert generator("a", 1, 2).integers(0, 1000, 4).tolist() == generator("a", 1, 2).integers(0, 1000, 4).tolist()
    assert generator("a", 1, 2).integers(0, 1 << 40) != generator("a", 12).integers(0, 1 << 40)
    assert generator("a", 1, 2).integers(0, 1000, 4).tolist() == [702, 915, 140, 450]
    order = EpochSampler(((4, 40), (5, 50), (3, 30)), "f", 7, 1, 12, 60)
    assert _window(order, 0).tolist() == [5, 8, 9, 3, 0, 6, 10, 4, 7, 2, 11, 1]


@st.composite
def _windows(draw: st.DrawFn) -> tuple[RowIds, int, int]:
    """Draw (lengths, steps, batch_size) with at most as many rows as the plan has."""
    batch_size = draw(st.integers(1, 20))
    steps = draw(st.integers(1, 12))
    rows = draw(st.integers(0, steps * batch_size))
    seed = draw(st.integers(0, 1000))
    return np.random.default_rng(seed).integers(1, 40, rows).astype(np.int64), steps, batch_size


@_quick
@given(_windows(), st.booleans())
def test_batches_have_each_position_once_and_the_planned_sizes(window: tuple[RowIds, int, int], group: bool) -> None:
    lengths, steps, batch_size = window
    batches = cut_batches(lengths, steps, batch_size, generator(0) if group else None)
    assert len(batches) == steps
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(len(lengths)))
    sizes = sorted((len(batch) for batch in batches), reverse=True)
    if -(-len(lengths) // batch_size) == steps:
        assert sizes == [batch_size] * (steps - 1) + [len(lengths) - batch_size * (steps - 1)]
    else:
        assert sizes[0] - sizes[-1] <= 1
        assert sizes[0] <= batch_size


@_quick
@given(_windows(), st.booleans())
def test_long_rows_come_first_within_a_batch(window: tuple[RowIds, int, int], group: bool) -> None:
    lengths, steps, batch_size = window
    for batch in cut_batches(lengths, steps, batch_size, generator(0) if group else None):
        assert np.all(np.diff(lengths[batch]) <= 0)


@_quick
@given(_windows())
def test_without_a_generator_the_longest_batches_come_first(window: tuple[RowIds, int, int]) -> None:
    lengths, steps, batch_size = window
    batches = cut_batches(lengths, steps, batch_size, None)
    assert np.all(np.diff(lengths[np.concatenate(batches)]) <= 0)


def _spread(lengths: RowIds, batches: list[RowIds]) -> int:
    return sum(int(lengths[batch].max() - lengths[batch].min()) for batch in batches if len(batch))


@_quick
@given(_windows())
def test_grouped_batches_do_not_overlap_in_length(window: tuple[RowIds, int, int]) -> None:
    lengths, steps, batch_size = window
    batches = [lengths[batch] for batch in cut_batches(lengths, steps, batch_size, generator(1)) if len(batch)]
    batches.sort(key=lambda batch: (int(batch.max()), int(batch.min())))
    assert all(low.max() <= high.min() for low, high in pairwise(batches))


@_quick
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 1000))
def test_grouping_never_widens_full_batches(batch_size: int, steps: int, seed: int) -> None:
    # Only for full batches: 10, 0, 0 in twos is [10 0][0] when grouped, and may be [0 0][10] by chance.
    lengths = np.random.default_rng(seed).integers(1, 40, steps * batch_size)
    grouped = cut_batches(lengths, steps, batch_size, generator(2))
    ungrouped = np.split(np.arange(len(lengths)), steps)
    assert _spread(lengths, grouped) <= _spread(lengths, ungrouped)


def test_grouped_batches_are_shuffled_by_their_generator() -> None:
    lengths = np.arange(200, dtype=np.int64)
    first, same, other = (
        [batch.tolist() for batch in cut_batches(lengths, 20, 10, generator(seed))] for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other
    assert sorted(first) == sorted(other)
    assert first != sorted(first, reverse=True)
